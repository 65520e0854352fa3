"""Specifications of a compression job for the cost model, and the names of its stages."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lordjax.allocation.measured_errors import BLOCK, removals, trials
from lordjax.allocation.policies import CURVELESS, INFLUENCED
from lordjax.calibration.backward_pass import needs_gradients
from lordjax.calibration.observers import sequences_per_step
from lordjax.compression.low_rank import GRADIENT_WINDOWS, checks_errors, held_out_count
from lordjax.compression.measured.held_out import places_of
from lordjax.compression.site_factors import on_host
from lordjax.forecast import shapes
from lordjax.methods import METHODS, Method, Module
from lordjax.models.config import ModelConfig
from lordjax.models.sites import Site, site_path, sites_for
from lordjax.models.stock import blocks_are_alike

STAGES = (
    *("gradients", "statistics", "factors", "held-out check", "comparison", "sequential"),
    *("apply", "write"),
)


@dataclasses.dataclass(frozen=True)
class CalibrationSpec(abc.ABC):
    """What every compression job has: a model, calibration sequences and the statistics to take.

    Subclasses say which statistics those are (`definition`).

    Attributes:
      config: architecture of the model.
      method: name of the method.
      sequences: number of calibration sequences.
      length: tokens of a sequence.
      gradient_windows: the backward pass reads at most this many sequences; None: all.
      tables: path of a table -> its format; other tables stay.
      chooses_tables: whether a budget chooses ``tables``, which needs predicted losses.

    Raises:
      ValueError: if there are too few sequences, or too few to hold one out.
    """

    config: ModelConfig
    method: str
    sequences: int
    length: int
    gradient_windows: int | None = dataclasses.field(default=GRADIENT_WINDOWS, kw_only=True)
    tables: Mapping[str, str] = dataclasses.field(default_factory=dict, kw_only=True, hash=False)
    chooses_tables: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.needs_sequences:
            return
        if self.sequences < 1 or self.length < 2:
            raise ValueError(
                f"{self.sequences} calibration sequences of {self.length} tokens; expected at "
                "least 1 sequence (--samples) of 2 tokens (--seq-len)"
            )
        if self.held_out and self.sequences < 2:
            raise ValueError(
                "1 calibration sequence; expected at least 2 (--samples), because one is held out "
                "to choose the temperature"
            )

    @property
    @abc.abstractmethod
    def definition(self) -> Method:
        """The method's sites and statistics."""

    @property
    def needs_sequences(self) -> bool:
        """Whether calibration sequences are read at all."""
        return True

    @property
    def compensates(self) -> bool:
        """Whether codes of tables compensate for the errors of earlier ones (GPTQ)."""
        return True

    @property
    def held_out(self) -> int:
        """Number of sequences that are held out."""
        return 0

    @property
    def measures_influence(self) -> bool:
        """Whether the forward pass measures the influence of every block."""
        return False

    @property
    def cross_fits(self) -> bool:
        """Whether errors are cross-fitted, if there are enough sequences."""
        return True

    @property
    def folds(self) -> int:
        """Number of folds of the calibration sequences."""
        return 1 + (self.cross_fits and self.sequences - self.held_out >= 2)

    @property
    def batch(self) -> int:
        """Sequences per step of the forward pass."""
        if not self.sequences:
            return 1
        step = sequences_per_step(self.sequences, self.length)
        return min(step, (self.sequences - self.held_out) // self.folds)

    @property
    def backward(self) -> tuple[int, int]:
        """Sequences that the backward pass reads, and sequences per step; ``(0, 1)``: none."""
        if not needs_gradients(self.definition, self.config):
            return 0, 1
        available = self.sequences - self.held_out
        sequences = max(self.gradient_windows or available, self.folds)
        return min(available, sequences), max(1, self.batch // 2)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites of a block that the method compresses."""
        return sites_for(self.definition.kinds, self.config)

    @property
    def block(self) -> dict[str, Any]:
        """Shapes of a block's parameters, float32."""
        return shapes.dense_shapes(self.config).block(0)

    @property
    def non_block_params(self) -> dict[str, Any]:
        """Shapes of the parameters outside the blocks, float32."""
        return shapes.dense_shapes(self.config).non_block_params()

    def residual_stream(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape of the residual stream ``[batch, length, hidden size]``, float32."""
        return jax.ShapeDtypeStruct((batch, self.length, self.config.hidden_size), jnp.float32)


@dataclasses.dataclass(frozen=True)
class CompressionSpec(CalibrationSpec):
    """A job of `lordjax.compress`; ``method`` is a key of `METHODS`.

    Attributes:
      allocation: a key of `POLICIES`; None: the method's default.
      prefix: how calibration statistics are taken, see `Method`; None: the method's default.
      ranks: site path -> rank, where ranks are known; None: no rank is known yet.
      keep: fraction of the block linear weights that is kept; 1 compresses nothing.
      temperature: temperature of the policy; None: it is chosen on held-out sequences, where the
        policy has one.
      meshed: whether the job runs on a device mesh, where no site is factorized on the host.
    """

    allocation: str | None = None
    prefix: str | None = None
    ranks: Mapping[str, int | None] | None = dataclasses.field(default=None, hash=False)
    keep: float = 0.8
    temperature: float | None = None
    meshed: bool = False

    @property
    def definition(self) -> Method:
        """The method's entry in `METHODS`."""
        return METHODS[self.method]

    def on_host(self, site: Site) -> Module | None:
        """Returns the module of a site that is factorized on the host, else None."""
        return None if self.meshed else on_host(self.method, site.kind)

    @property
    def policy(self) -> str:
        """The allocation policy."""
        return self.allocation or self.definition.allocation

    @property
    def calibration_mode(self) -> str:
        """How calibration statistics are taken: ``dense``, ``compressed`` or ``corrective``."""
        return self.prefix or self.definition.prefix

    @property
    def is_sequential(self) -> bool:
        """Whether blocks are compressed in order, each with inputs from the compressed ones."""
        return self.calibration_mode != "dense"

    @property
    def factors_first(self) -> bool:
        """Whether all sites are factorized before ranks are allocated."""
        return not self.is_sequential or self.policy not in CURVELESS

    @property
    def held_out(self) -> int:
        """Number of sequences that are held out."""
        given = self.method, self.policy, self.calibration_mode, self.sequences
        return held_out_count(*given)

    @property
    def checks_errors(self) -> bool:
        """Whether some predicted errors are checked on held-out sequences."""
        return checks_errors(self.method, self.policy, self.calibration_mode, self.sequences)

    @property
    def trials(self) -> list[tuple[int, str, list[str], float]]:
        """What the check of predicted errors measures; see `measured_errors.trials`."""
        layers = self.config.num_layers
        paths = [site_path(i, site) for i in range(layers) for site in self.sites]
        if not self.checks_errors:
            return []
        # Which blocks are measured without is not known yet: some in the middle.
        removes = self.definition.stock and blocks_are_alike(self.config)
        removed = [(layers // 2, BLOCK, [], 0.0)] * (removals(layers) if removes else 0)
        return trials(places_of(paths)) + removed

    @property
    def cross_fits(self) -> bool:
        """Whether errors are cross-fitted: whether the policy reads them."""
        return self.policy not in CURVELESS

    @property
    def measures_influence(self) -> bool:
        """Whether the forward pass measures the influence of every block."""
        return self.policy in INFLUENCED

    @property
    def chooses_temperature(self) -> bool:
        """Whether a temperature is chosen on held-out sequences."""
        return self.policy in INFLUENCED and self.temperature is None and self.keep < 1
