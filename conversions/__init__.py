"""Hugging Face checkpoints and GGUF files in; the only package that knows them."""
