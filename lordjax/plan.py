"""A plan: which rank every kernel gets. Data, made by `allocate`, readable and editable as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """Ranks by kernel path.

    Attributes:
      method: a key of `METHODS`.
      ranks: kernel path -> rank, or None to leave the kernel dense.
      keep: the share of block linear weights that was asked for, in (0, 1].
      policy: a key of `allocation.POLICIES`.
      gap: relative distance of the plan's predicted error from a lower bound on that of any
        plan within the budget; None for policies that do not optimise.
    """

    method: str
    ranks: Mapping[str, int | None]
    keep: float
    policy: str
    gap: float | None = None

    def weights(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Number of linear weights after the plan, factor pairs counted in full.

        Biases are no linear weights and are not counted, before or after; `allocation` does charge
        a method's new biases to the budget.
        """
        return sum(weights(shapes[path], rank) for path, rank in self.ranks.items())

    def write(self, path: Path) -> None:
        """Writes the plan as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Reads a plan.

        Raises:
          ValueError: if the file is not a plan; names the file and, of an edited plan, the kernels
            whose rank is neither a whole number from 1 on nor null.
        """
        try:
            plan = cls(**json.loads(path.read_text()))
            bad = {p: r for p, r in plan.ranks.items() if not _is_rank(r)}
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: not a plan ({error})") from error
        if bad:
            raise ValueError(f"{path}: ranks must be whole numbers from 1 on or null, got {bad}")
        return plan


def _is_rank(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 1)


def weights(shape: tuple[int, int], rank: int | None) -> int:
    """Weights of a kernel ``[in, out]`` at a rank (None = dense)."""
    fan_in, fan_out = shape
    return fan_in * fan_out if rank is None else rank * (fan_in + fan_out)


def summary(plan: Plan, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The figures of a plan: weights before and after, share kept, number of dense kernels."""
    before = sum(weights(shape, None) for shape in shapes.values())
    after = plan.weights(shapes)
    return {
        "weights_before": before,
        "weights_after": after,
        "kept": after / before,
        "dense": sum(rank is None for rank in plan.ranks.values()),
        "factored": sum(rank is not None for rank in plan.ranks.values()),
    }
