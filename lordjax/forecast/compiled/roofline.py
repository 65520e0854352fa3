"""The least time that a program takes on a card: by its operations, or by the bytes it moves.

A program is no faster than its operations at the card's peak rates, and no faster than its bytes at
the card's bandwidth; the larger of the two counts. Factorizations run below the peak. Wang et al.
(arXiv 2410.02170) report that ``syevd`` reaches less than 3 % of an H100's peak, and that its
tridiagonalization takes over 90 % of the time. That step has 4/3 n³ operations; `flops` counts 9 n³
for all of ``syevd``. Time between launches is not counted, so real runs take longer.
"""

from __future__ import annotations

from collections.abc import Mapping

from lordjax.runtime.cards import Card
from lordjax.runtime.flops import OpCounts

# Share of the peak, in operations as `flops` counts them: 9 n³ instead of 4/3 n³ in 90 % of the
# time.
EIGH_SHARE = 0.03 * 0.9 * 9 / (4 / 3)
PRODUCTS = ("product", "thin", "cholesky")


def rate(card: Card, kind: str) -> float | None:
    """Returns the largest FLOPs per second of a kind of operation; None if it is not counted.

    Args:
      card: the GPU.
      kind: a key of `OpCounts`.
    """
    name, _, rest = kind.partition(" ")
    dtype, *others = rest.split() or [""]
    if name in PRODUCTS:
        if dtype == "float32" and name != "cholesky" and "highest" not in others:
            dtype = "tf32"
        return card.rates.get(dtype, card.rates["float32"])
    if name in ("eigh", "svd"):
        return EIGH_SHARE * card.rates.get(dtype, card.rates["float32"])
    return None


def computing_seconds(card: Card, ops: OpCounts) -> float:
    """Returns the least seconds of a program's operations."""
    rates = {kind: rate(card, kind) for kind in ops}
    return sum(ops[kind] / each for kind, each in rates.items() if each is not None)


def least_seconds(card: Card, ops: OpCounts, nbytes: float, sent: Mapping[str, int]) -> float:
    """Returns the least seconds of one run of a program.

    Args:
      card: the GPU.
      ops: operations of a device.
      nbytes: bytes that a device reads and writes.
      sent: collective -> bytes of a device.
    """
    moving = nbytes / card.bandwidth
    return max(computing_seconds(card, ops), moving, sum(sent.values()) / card.link)
