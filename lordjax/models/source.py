"""Sources: models that are read block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from lordjax.kernels.base import materialize
from lordjax.models.config import ModelConfig
from lordjax.names import layer


class Source(Protocol):
    """A model whose parameters are read one block at a time."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        ...

    def block(self, i: int) -> dict[str, Any]:
        """Returns the parameters of block ``i`` as a nested dict."""
        ...

    def non_block_params(self) -> dict[str, Any]:
        """Returns the parameters outside the blocks as a nested dict."""
        ...


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A `Source` of a parameter tree in memory.

    Attributes:
      config: the architecture.
      params: parameters of the whole model, nested.
    """

    config: ModelConfig
    params: Mapping[str, Any]

    def block(self, i: int) -> dict[str, Any]:
        """Returns the parameters of block ``i`` as a nested dict."""
        return self.params[layer(i)]

    def non_block_params(self) -> dict[str, Any]:
        """Returns the parameters outside the blocks as a nested dict."""
        return {k: v for k, v in self.params.items() if not k.startswith("layer_")}


@dataclasses.dataclass(frozen=True)
class Materialized:
    """A `Source` with dense kernels, so that a compressed model can be compressed again.

    Attributes:
      source: the model, with kernels of any kind.
    """

    source: Source

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.source.config

    def block(self, i: int) -> dict[str, Any]:
        """Returns the parameters of block ``i`` as a nested dict of arrays."""
        return materialize(self.source.block(i))

    def non_block_params(self) -> dict[str, Any]:
        """Returns the parameters outside the blocks as a nested dict of arrays."""
        return materialize(self.source.non_block_params())
