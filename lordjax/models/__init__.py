"""Flax models whose weights may be compressed."""

from lordjax.models.config import ModelConfig, Rope
from lordjax.models.transformer import Block, Transformer, init

__all__ = ["Block", "ModelConfig", "Rope", "Transformer", "init"]
