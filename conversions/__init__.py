"""Reads Hugging Face checkpoints and GGUF files, and exports models for other programs.

No other package of lordjax knows these formats.
"""

from lordjax.conversions.families.config.resize import resized
from lordjax.conversions.readers.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint", "resized"]
