"""Candidates for a matrix, and the tables of candidates that a budget chooses from.

A `Candidate` is a quantization format or none, and a rank or none. So dense, low rank, quantized,
and quantized with a low-rank term are one problem.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lordjax.allocation.knapsack import SOLVERS
from lordjax.kernels import normal_float
from lordjax.names import did_you_mean


@dataclasses.dataclass(frozen=True)
class QuantizationMethod:
    """A quantization method: one row of `QUANTIZERS`.

    Attributes:
      summary: one line for tables and ``--help``.
      weighting: default weighting of errors, a key of `WEIGHTINGS`.
      rank: default rank of the low-rank terms; None: there are none.
      counts_low_rank: whether a budget counts low-rank terms; then the solver chooses their ranks.
      factors: default format of the low-rank factors; None: 16 bits.
    """

    summary: str
    weighting: str
    rank: int | None = None
    counts_low_rank: bool = False
    factors: str | None = None


QUANTIZERS: dict[str, QuantizationMethod] = {
    "nf": QuantizationMethod("NormalFloat, format chosen per matrix", "none"),
    "lq": QuantizationMethod(
        "LQ-LoRA: quantized weights plus a low-rank term of one rank", "none", rank=32
    ),
    "auto": QuantizationMethod(
        "dense, low rank, quantized or both, chosen per matrix under one budget",
        "both",
        counts_low_rank=True,
        factors="nf8-8-bfloat16-64-256",
    ),
}

# Formats that a budget may mix: those of the published grid, without near duplicates.
FORMATS = (
    *(
        normal_float.Format(b, 4, "bfloat16", block, 256)
        for b in (2, 3, 4)
        for block in (64, 32, 16)
    ),
    normal_float.Format(8, 8, "bfloat16", 64, 256),
)
RANKS = (4, 8, 16, 24, 32, 48, 64)  # beside quantized weights, where the solver chooses the rank
LOW_RANK_ONLY_RANKS = (64, 128, 192, 256)  # without quantized weights


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to store a matrix; neither a format nor a rank means dense.

    Attributes:
      form: quantization format; None: the matrix has no quantized weights.
      rank: rank of the low-rank term; None: the matrix has none.
      dtype: dtype of a table outside the blocks that stays dense; None: that of the model.
    """

    form: normal_float.Format | None
    rank: int | None
    dtype: str | None = None


def candidate_bytes(
    candidate: Candidate,
    shape: tuple[int, ...],
    itemsize: int,
    factors: normal_float.Format | None,
    *,
    low_rank: bool = True,
) -> int:
    """Returns the bytes of a matrix that is stored as a candidate.

    Args:
      candidate: how the matrix is stored.
      shape: ``(in, out)`` of the matrix.
      itemsize: bytes of a number that is not quantized.
      factors: format of the low-rank factors; None: they are not quantized.
      low_rank: whether the low-rank term counts.
    """
    fan_in, fan_out = shape
    if candidate.form is None and candidate.rank is None:
        own = None if candidate.dtype is None else np.dtype(candidate.dtype).itemsize
        return fan_in * fan_out * (own or itemsize)
    quantized = 0 if candidate.form is None else candidate.form.nbytes(fan_in * fan_out)
    if candidate.rank is None or not low_rank:
        return quantized
    counts = (fan_in * candidate.rank, candidate.rank * fan_out)
    return quantized + sum(n * itemsize if factors is None else factors.nbytes(n) for n in counts)


def array_count(candidate: Candidate, factors: normal_float.Format | None) -> int:
    """Returns the number of arrays that a matrix is stored as.

    Args:
      candidate: how the matrix is stored.
      factors: format of the low-rank factors; None: they are not quantized.
    """
    of_quantized = 4  # codes, scales, scales of scales, offset
    if candidate.form is None and candidate.rank is None:
        return 1
    factor = 1 if factors is None else of_quantized
    pair = 0 if candidate.rank is None else 2 * factor
    return pair + (0 if candidate.form is None else of_quantized)


def ranks_tried(
    method: str, rank: int | None, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ranks in a matrix's table: with quantized weights (0: no rank), and without."""
    chosen = QUANTIZERS[method].counts_low_rank
    beside = (0, *RANKS) if chosen else (rank or 0,)
    only = LOW_RANK_ONLY_RANKS if chosen else ()
    return tuple(r for r in beside if r < min(shape)), tuple(r for r in only if r < min(shape))


@dataclasses.dataclass(frozen=True)
class Table:
    """The candidates of one matrix, by rising size.

    Attributes:
      candidates: ways to store the matrix.
      sizes: ``[n]`` bytes that a budget counts.
      errors: ``[n]`` predicted errors.
    """

    candidates: list[Candidate]
    sizes: np.ndarray
    errors: np.ndarray

    @classmethod
    def pareto(cls, rows: Iterable[tuple[int, float, Candidate]]) -> Table:
        """Returns the Pareto front of (size, error, candidate): none is beaten in both numbers."""
        best: list[tuple[int, float, Candidate]] = []
        for size, error, candidate in sorted(rows, key=lambda each: each[:2]):
            if not best or error < best[-1][1]:
                best.append((size, error, candidate))
        sizes, errors = (np.array([each[k] for each in best], float) for k in range(2))
        return cls([candidate for _, _, candidate in best], sizes, errors)

    def rows(self) -> list[list[Any]]:
        """Returns the table as JSON: ``[size, error, format, rank, dtype]`` per candidate."""
        forms = [None if each.form is None else str(each.form) for each in self.candidates]
        ranks = [each.rank for each in self.candidates]
        dtypes = [each.dtype for each in self.candidates]
        columns = self.sizes.tolist(), self.errors.tolist(), forms, ranks, dtypes
        return [list(row) for row in zip(*columns, strict=True)]

    @classmethod
    def parse(cls, rows: Iterable[Sequence[Any]]) -> Table:
        """Returns the table that `rows` wrote."""
        return cls.pareto(
            (
                size,
                error,
                Candidate(None if form is None else normal_float.Format.parse(form), rank, dtype),
            )
            for size, error, form, rank, dtype in rows
        )

    def resized(self, size: Callable[[Candidate], int]) -> Table:
        """Returns the table for a budget that counts other bytes.

        Args:
          size: bytes of a candidate.
        """
        pairs = zip(self.candidates, self.errors, strict=True)
        return Table.pareto((size(each), float(error), each) for each, error in pairs)


def check_solver(name: str) -> None:
    """Raises KeyError with a suggestion if there is no such solver."""
    if name not in SOLVERS:
        raise KeyError(f"no solver {name!r}; {did_you_mean(name, SOLVERS)}")


def check_choice(solver: str, **budgets: Any) -> None:
    """Raises ValueError unless exactly one budget is not None; see also `check_solver`."""
    if sum(given is not None for given in budgets.values()) != 1:
        *names, last = budgets
        *values, end = map(str, budgets.values())
        raise ValueError(
            f"give exactly one of {', '.join(names)} and {last}, got {', '.join(values)} and {end}"
        )
    check_solver(solver)


def choose(
    tables: Mapping[str, Table], budget: float, count: int, method: str, solver: str
) -> tuple[dict[str, Candidate], float]:
    """Chooses a candidate for every matrix: least predicted error within a budget.

    Args:
      tables: site path -> candidates.
      budget: bytes of all matrices together.
      count: number of weights of all matrices, for messages.
      method: name of the method, for messages.
      solver: a key of `SOLVERS`; see `check_solver`.

    Returns:
      Site path -> candidate, and the gap to the best possible error.

    Raises:
      ValueError: if the budget cannot be met, or a predicted error is not finite.
    """
    least = sum(table.sizes[0] for table in tables.values())
    if least > budget:
        raise ValueError(
            f"{8 * budget / count:.4g} bits per weight cannot be met: method {method!r} needs at "
            f"least {8 * least / count:.4g}; ask for more"
        )
    return solve(tables, budget, solver)


def solve(
    tables: Mapping[str, Table], budget: float, solver: str
) -> tuple[dict[str, Candidate], float]:
    """Does the same as `choose`, for a budget that can be met."""
    bad = [path for path, table in tables.items() if not np.isfinite(table.errors).all()]
    if bad:
        raise ValueError(f"broken weights: predicted errors are not finite at {', '.join(bad)}")
    columns = [t.sizes for t in tables.values()], [t.errors for t in tables.values()]
    found = SOLVERS[solver](*columns, budget)
    pairs = zip(tables.items(), found.index, strict=True)
    return {path: table.candidates[i] for (path, table), i in pairs}, found.gap
