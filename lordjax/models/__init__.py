"""Flax models whose weights may be compressed."""

from lordjax.models.blocks import Block
from lordjax.models.config import ModelConfig, Rope
from lordjax.models.transformer import Transformer, init

__all__ = ["Block", "ModelConfig", "Rope", "Transformer", "init"]
