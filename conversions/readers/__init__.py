"""Readers of checkpoints: Hugging Face directories, torch files, GGUF."""
