"""A plan: the rank and the quantization format of every site, readable and editable as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lordjax.kernels import normal_float, table
from lordjax.runtime import json_files
from lordjax.runtime.input_files import read_json, reading


@dataclasses.dataclass(frozen=True)
class SiteSize:
    """The number of linear weights of a site as a function of its rank.

    Attributes:
      dense: number of weights when the site stays dense.
      unit: number of weights per unit of rank.
      bias: length of the bias that corrects the site's output, in methods that have one.
      moved: length of a bias that appears when the site is compressed, whatever the method.
      step: ranks are multiples of this (2 where rotary pairs stay together).
      tiles: policies that optimize offer multiples of this many tiles if that leaves enough
        candidates (`curves.FINE`): wide sites need no finer choice. 0: every rank is offered.
    """

    dense: int
    unit: int
    bias: int = 0
    moved: int = 0
    step: int = 1
    tiles: int = 1

    @classmethod
    def matrix(cls, fan_in: int, fan_out: int) -> SiteSize:
        """Returns the size of a matrix that a factor pair may replace."""
        return cls(fan_in * fan_out, fan_in + fan_out, fan_out)

    @property
    def limit(self) -> float:
        """Rank at which the site saves nothing: break-even of a matrix, full width of a module."""
        return self.dense / self.unit

    @property
    def fixed(self) -> bool:
        """Whether no rank saves weights, so that the site stays dense."""
        return self.limit <= 1

    def weights(self, rank: int | None) -> int:
        """Returns the number of weights at a rank; None means dense, 0 a removed block."""
        return self.dense if rank is None else rank * self.unit


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compression does to every site of a model.

    Attributes:
      method: a key of `METHODS` or `QUANTIZERS`.
      ranks: site path -> rank (kept width, for a module); None leaves the site as it is; 0 at all
        sites of a block removes the block.
      keep: requested fraction of the block linear weights, in (0, 1]; None if none was requested.
      policy: a key of `POLICIES`, a solver of `knapsack.SOLVERS`, ``uniform``, or ``given`` where
        the caller gave the ranks.
      gap: relative distance of the plan's predicted error from a lower bound on the error of any
        plan within the budget; None for policies that do not optimize.
      temperature: temperature of policy ``block-influence``; None for other policies.
      formats: site path -> `normal_float.Format` as text; sites that are not quantized are absent.
      factors: quantization format of all factor pairs; None: the factors are plain arrays.
      bits: requested average bits per block weight; None if ``keep`` was requested.
      predicted: predicted loss in nats, ``in_sample`` on the calibration tokens and ``held_out`` on
        others; None if the method's errors have another unit.
      tables: path of an embedding or head -> its format (`kernels.table.parse`); those that stay as
        they are are absent.
      file_bytes: requested bytes of all files with weights; None if none were requested.
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
    predicted: Mapping[str, float] | None = None
    tables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    file_bytes: int | None = None

    def weights(self, sizes: Mapping[str, SiteSize]) -> int:
        """Returns the number of linear weights after the plan, both factors of a pair counted.

        Biases are not counted, neither before nor after the plan. `allocate` does charge a method's
        new biases to the budget.
        """
        return sum(sizes[path].weights(rank) for path, rank in self.ranks.items())

    def write(self, path: Path) -> None:
        """Writes the plan to a file as JSON; raises ValueError if a number is not finite."""
        path.write_text(json_files.dumps(dataclasses.asdict(self), indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Returns the plan in a JSON file.

        Raises:
          ValueError: if the file is not a plan, a rank is neither null nor a whole number of at
            least 0, or some sites of a block but not all have rank 0; names the file and the sites.
        """
        content = read_json(path)
        with reading(path, "not a plan", "correct it, or write it again"):
            plan = cls(**content)
            _check_types(plan)
            whole = {p.split("/", 1)[0] for p, r in plan.ranks.items() if r != 0}
            bad = {
                p: r
                for p, r in plan.ranks.items()
                if not _is_rank(r) or (r == 0 and p.split("/", 1)[0] in whole)
            }
            for text in [*plan.formats.values(), *([] if plan.factors is None else [plan.factors])]:
                normal_float.Format.parse(text)
            for text in plan.tables.values():
                table.parse(text)
        if bad:
            raise ValueError(
                f"{path}: ranks must be whole numbers of at least 1, null for dense, or 0 at "
                f"all sites of a removed block, got {bad}"
            )
        return plan


def _check_types(plan: Plan) -> None:
    """Raises TypeError if a field of a plan holds no value of its kind."""
    number, text = int | float | None, str | None
    kinds: dict[str, Any] = {"method": str, "policy": str, "factors": text}
    kinds |= {"ranks": dict, "formats": dict, "tables": dict, "predicted": dict | None}
    kinds |= dict.fromkeys(("keep", "gap", "temperature", "bits", "file_bytes"), number)
    for name, kind in kinds.items():
        value = getattr(plan, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} is {str(value)[:80]!r}; expected {kind}")
    texts = {**plan.formats, **plan.tables}
    for name, value in {**texts, **(plan.predicted or {})}.items():
        if not isinstance(value, str if name in texts else int | float):
            raise TypeError(f"{name} is {str(value)[:80]!r}")


def _is_rank(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def summary(plan: Plan, sizes: Mapping[str, SiteSize]) -> dict[str, Any]:
    """Returns the numbers of a plan for the report.

    Args:
      plan: what happens to every site.
      sizes: site path -> its size.

    Returns:
      ``weights_before`` and ``weights_after``; ``kept``, their ratio; the number of sites that stay
      ``dense`` and of those that are ``compressed``.
    """
    before = sum(size.dense for size in sizes.values())
    after = plan.weights(sizes)
    return {
        "weights_before": before,
        "weights_after": after,
        "kept": after / before,
        "dense": sum(rank is None for rank in plan.ranks.values()),
        "compressed": sum(rank is not None for rank in plan.ranks.values()),
    }
