"""Hugging Face checkpoints and GGUF files in; the only package that knows them."""

from lordjax.conversions.readers.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
