"""A compression whose cost is asked for, and the names of its stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lordjax.allocation.policies import CURVELESS, INFLUENCED
from lordjax.calibration.backward_pass import needs_gradients
from lordjax.calibration.observers import sequences_per_step
from lordjax.compression.low_rank import GRADIENT_WINDOWS, HELD_OUT
from lordjax.compression.site_factors import on_host
from lordjax.forecast import shapes
from lordjax.methods import METHODS, Method, Module
from lordjax.models.config import ModelConfig
from lordjax.models.sites import Site, sites_for

STAGES = ("gradients", "statistics", "factors", "comparison", "sequential", "apply", "write")


@dataclasses.dataclass(frozen=True)
class CompressionSpec:
    """What `compress` is asked for.

    Attributes:
      config: the model.
      method: a key of `METHODS`.
      windows: of calibration.
      length: tokens of a window.
      allocation: a key of `POLICIES`; None = the method's own.
      prefix: see `Method`; None = the method's own.
      ranks: site path -> rank, as far as they are known; None: of no site.
      keep: 1: nothing is compressed.
      temperature: None: chosen on held-out windows, where the policy has one.
      gradient_windows: at most as many see the backward pass; None = all.
      meshed: whether devices of a mesh take turns; then nothing is factored on the host.

    Raises:
      ValueError: if there are no windows, or too few to hold one out.
    """

    config: ModelConfig
    method: str
    windows: int
    length: int
    allocation: str | None = None
    prefix: str | None = None
    ranks: Mapping[str, int | None] | None = dataclasses.field(default=None, hash=False)
    keep: float = 0.8
    temperature: float | None = None
    gradient_windows: int | None = GRADIENT_WINDOWS
    meshed: bool = False

    def __post_init__(self) -> None:
        if self.windows < 1 or self.length < 2:
            raise ValueError(
                f"{self.windows} windows of {self.length} tokens; at least 1 of 2 is needed"
            )
        if self.held_out and self.windows < 2:
            raise ValueError("one calibration window: at least 2 are needed to hold one out")

    @property
    def row(self) -> Method:
        """The method's row."""
        return METHODS[self.method]

    def on_host(self, site: Site) -> Module | None:
        """The module of a site, if it is factored on the host."""
        return None if self.meshed else on_host(self.method, site.kind)

    @property
    def policy(self) -> str:
        """How the budget is shared out."""
        return self.allocation or self.row.allocation

    @property
    def walks(self) -> bool:
        """Whether blocks are compressed one after the other, each on the compressed ones."""
        return (self.prefix or self.row.prefix) != "dense"

    @property
    def factors_first(self) -> bool:
        """Whether all sites are factored before a budget is known."""
        return not self.walks or self.policy not in CURVELESS

    @property
    def held_out(self) -> int:
        """Windows that only choose a temperature."""
        return max(1, min(HELD_OUT, self.windows // 8)) if self.policy in INFLUENCED else 0

    @property
    def compares(self) -> bool:
        """Whether a temperature is chosen."""
        return bool(self.held_out) and self.temperature is None and self.keep < 1

    @property
    def batch(self) -> int:
        """Windows of a step."""
        return sequences_per_step(self.windows, self.length)

    @property
    def backward(self) -> tuple[int, int]:
        """Windows that the backward pass sees, and how many in a step."""
        if not needs_gradients(self.row, self.config):
            return 0, 1
        seen = self.windows - self.held_out
        return min(seen, self.gradient_windows or seen), max(1, self.batch // 2)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Of a block."""
        return sites_for(self.row.kinds, self.config)

    @property
    def block(self) -> dict[str, Any]:
        """Shapes of a block, float32."""
        return shapes.shapes(self.config).block(0)

    @property
    def non_block_params(self) -> dict[str, Any]:
        """Shapes outside the blocks, float32."""
        return shapes.shapes(self.config).non_block_params()

    def stream(self, rows: int) -> Any:
        """Shape of the residual stream of some windows."""
        return jax.ShapeDtypeStruct((rows, self.length, self.config.hidden_size), jnp.float32)
