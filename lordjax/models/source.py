"""A model that is read block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from lordjax.kernels.base import materialize
from lordjax.models.config import ModelConfig


class Source(Protocol):
    """Where parameters come from, a block at a time."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        ...

    def block(self, i: int) -> dict[str, Any]:
        """Nested dict of ``layer_i``."""
        ...

    def non_block_params(self) -> dict[str, Any]:
        """Nested dict of everything outside the blocks."""
        ...


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A `Source` over a parameter tree."""

    config: ModelConfig
    params: Mapping[str, Any]

    def block(self, i: int) -> dict[str, Any]:
        """Nested dict of ``layer_i``."""
        return self.params[f"layer_{i}"]

    def non_block_params(self) -> dict[str, Any]:
        """Nested dict of everything outside the blocks."""
        return {k: v for k, v in self.params.items() if not k.startswith("layer_")}


@dataclasses.dataclass(frozen=True)
class Materialized:
    """A `Source` whose kernels are multiplied out: a compressed model as one to compress."""

    source: Source

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.source.config

    def block(self, i: int) -> dict[str, Any]:
        """Nested dict of ``layer_i``, arrays only."""
        return materialize(self.source.block(i))

    def non_block_params(self) -> dict[str, Any]:
        """Nested dict of everything outside the blocks."""
        return self.source.non_block_params()
