"""Readers of checkpoints: Hugging Face directories, torch files and GGUF files."""
