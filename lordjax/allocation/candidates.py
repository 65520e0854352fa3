"""What a matrix may become, and the tables of it that a budget chooses from.

An `Option` is a format of codes or none, and a rank or none; so dense, low rank, codes, and codes
with a product are one problem.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lordjax.kernels import normal_float


@dataclasses.dataclass(frozen=True)
class Kind:
    """One row of `QUANTIZERS`.

    Attributes:
      summary: one line for tables and ``--help``.
      weighting: the default key of `WEIGHTINGS`.
      rank: the default rank of the products; None: there are none.
      all_in: a budget counts products too, and the solver chooses ranks.
      factors: default format of the products' factors; None: 16 bits.
    """

    summary: str
    weighting: str
    rank: int | None = None
    all_in: bool = False
    factors: str | None = None


QUANTIZERS: dict[str, Kind] = {
    "nf": Kind("NormalFloat codes, format chosen per matrix", "none"),
    "lq": Kind("LQ-LoRA: codes and a product of one rank on top", "none", rank=32),
    "auto": Kind(
        "dense, low rank, codes or both, chosen per matrix under one budget",
        "both",
        all_in=True,
        factors="nf8-8-bfloat16-64-256",
    ),
}

# Formats that a budget may mix: what the published grid offers, without near duplicates.
FORMATS = (
    *(
        normal_float.Format(b, 4, "bfloat16", block, 256)
        for b in (2, 3, 4)
        for block in (64, 32, 16)
    ),
    normal_float.Format(8, 8, "bfloat16", 64, 256),
)
RANKS = (4, 8, 16, 24, 32, 48, 64)  # on top of codes, where the solver chooses
LOW_RANK_ONLY_RANKS = (64, 128, 192, 256)  # without codes


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What one matrix may become.

    Attributes:
      form: of its codes; None: it has none.
      rank: of its product; None: it has none. Neither: it stays dense.
    """

    form: normal_float.Format | None
    rank: int | None


def candidate_bytes(
    option: Candidate,
    shape: tuple[int, ...],
    itemsize: int,
    factors: normal_float.Format | None,
    *,
    products: bool = True,
) -> int:
    """Bytes of a matrix ``[in, out]`` as an option says.

    Args:
      option: what it becomes.
      shape: of it.
      itemsize: bytes of a number that is no code.
      factors: format of a product's factors; None: they are no codes.
      products: whether a product counts.
    """
    fan_in, fan_out = shape
    if option == Candidate(None, None):
        return fan_in * fan_out * itemsize
    codes = 0 if option.form is None else option.form.nbytes(fan_in * fan_out)
    if option.rank is None or not products:
        return codes
    counts = (fan_in * option.rank, option.rank * fan_out)
    return codes + sum(n * itemsize if factors is None else factors.nbytes(n) for n in counts)


def ranks_tried(
    method: str, rank: int | None, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ranks that a matrix's table holds: on top of codes (0: none), and without codes."""
    all_in = QUANTIZERS[method].all_in
    above = (0, *RANKS) if all_in else (rank or 0,)
    alone = LOW_RANK_ONLY_RANKS if all_in else ()
    return tuple(r for r in above if r < min(shape)), tuple(r for r in alone if r < min(shape))


@dataclasses.dataclass(frozen=True)
class Table:
    """What one matrix may become, by rising size.

    Attributes:
      options: of the matrix.
      sizes: ``[n]`` bytes that a budget counts.
      errors: ``[n]`` predicted.
    """

    options: list[Candidate]
    sizes: np.ndarray
    errors: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[tuple[int, float, Candidate]]) -> Table:
        """Of (size, error, option), without options that another one beats in both."""
        best: list[tuple[int, float, Candidate]] = []
        for size, error, option in sorted(rows, key=lambda each: each[:2]):
            if not best or error < best[-1][1]:
                best.append((size, error, option))
        sizes, errors = (np.array([each[k] for each in best], float) for k in range(2))
        return cls([option for _, _, option in best], sizes, errors)

    def rows(self) -> list[list[Any]]:
        """The table as JSON."""
        forms = [None if option.form is None else str(option.form) for option in self.options]
        ranks = [option.rank for option in self.options]
        columns = self.sizes.tolist(), self.errors.tolist(), forms, ranks
        return [list(row) for row in zip(*columns, strict=True)]

    @classmethod
    def parse(cls, rows: Iterable[Sequence[Any]]) -> Table:
        """Inverse of `rows`."""
        return cls.of(
            (
                size,
                error,
                Candidate(None if form is None else normal_float.Format.parse(form), rank),
            )
            for size, error, form, rank in rows
        )
