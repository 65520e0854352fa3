"""A plan: which rank and which codes every site gets. Data, readable and editable as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lordjax.kernels import normal_float


@dataclasses.dataclass(frozen=True)
class SiteSize:
    """How many linear weights a site has at a rank.

    Attributes:
      dense: when left as it is.
      unit: per rank.
      bias: of the bias that corrects its output, in methods that have one.
      moved: of a bias that appears when it is compressed, whatever the method.
      step: ranks are multiples of this (2 where rotary pairs stay together).
      tiles: policies that optimise offer multiples of this many tiles, where that leaves enough
        options (`allocation.FINE`): wide sites need no finer choice.
    """

    dense: int
    unit: int
    bias: int = 0
    moved: int = 0
    step: int = 1
    tiles: int = 1

    @classmethod
    def matrix(cls, fan_in: int, fan_out: int) -> SiteSize:
        """Of a factor pair in place of a matrix."""
        return cls(fan_in * fan_out, fan_in + fan_out, fan_out)

    @property
    def limit(self) -> float:
        """Rank at which the site is as large as dense (break-even), or is dense (full width)."""
        return self.dense / self.unit

    @property
    def fixed(self) -> bool:
        """Whether no rank saves weights."""
        return self.limit <= 1

    def weights(self, rank: int | None) -> int:
        """Weights at a rank (None = dense)."""
        return self.dense if rank is None else rank * self.unit


@dataclasses.dataclass(frozen=True)
class Plan:
    """Ranks by site path.

    Attributes:
      method: a key of `METHODS`.
      ranks: site path -> rank (width, for a module), or None to leave the site as it is.
      keep: the share of block linear weights that was asked for, in (0, 1], if one was.
      policy: a key of `allocation.POLICIES`, or ``given`` where ranks were.
      gap: relative distance of the plan's predicted error from a lower bound on that of any
        plan within the budget; None for policies that do not optimise.
      temperature: of ``block-influence``.
      formats: site path -> `nf.Format` of its codes, as text; sites without codes are absent.
      factors: format of the codes of all factor pairs; None: they are arrays.
      bits: the average per block weight that was asked for, in place of ``keep``.
    """

    method: str
    ranks: Mapping[str, int | None]
    keep: float | None
    policy: str
    gap: float | None = None
    temperature: float | None = None
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    factors: str | None = None
    bits: float | None = None

    def weights(self, sizes: Mapping[str, SiteSize]) -> int:
        """Number of linear weights after the plan, factor pairs counted in full.

        Biases are no linear weights and are not counted, before or after; `allocation` does charge
        a method's new biases to the budget.
        """
        return sum(sizes[path].weights(rank) for path, rank in self.ranks.items())

    def write(self, path: Path) -> None:
        """Writes the plan as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Reads a plan.

        Raises:
          ValueError: if the file is not a plan; names the file and, of an edited plan, the sites
            whose rank is neither a whole number from 1 on nor null.
        """
        try:
            plan = cls(**json.loads(path.read_text()))
            bad = {p: r for p, r in plan.ranks.items() if not _is_rank(r)}
            for text in [*plan.formats.values(), *([] if plan.factors is None else [plan.factors])]:
                normal_float.Format.parse(text)
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a plan ({error})") from error
        if bad:
            raise ValueError(f"{path}: ranks must be whole numbers from 1 on or null, got {bad}")
        return plan


def _is_rank(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 1)


def summary(plan: Plan, sizes: Mapping[str, SiteSize]) -> dict[str, Any]:
    """The figures of a plan: weights before and after, share kept, number of dense sites."""
    before = sum(size.dense for size in sizes.values())
    after = plan.weights(sizes)
    return {
        "weights_before": before,
        "weights_after": after,
        "kept": after / before,
        "dense": sum(rank is None for rank in plan.ranks.values()),
        "compressed": sum(rank is not None for rank in plan.ranks.values()),
    }
