"""What a site offers to an allocation policy: its size and its predicted error at every rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from lordjax.allocation.plan import SiteSize

FINE = 16  # with this many candidates left, ranks may go up by several tiles at a time


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a site offers: its size and the predicted error at every rank.

    Attributes:
      size: number of weights at a rank.
      errors: ``[m + 1]`` errors, non-increasing; ``errors[r]`` is the error at rank r. If the
        policy compares sites, their errors need a common unit.
      extra: weights that a compressed site adds whatever its rank (a new bias).
      influence: block influence of the site's block, for `block_influence`.
      removal: the site's part of the error of removing its whole block; infinite where that is not
        known or not possible.
    """

    size: SiteSize
    errors: np.ndarray
    extra: int = 0
    influence: float = 0.0
    removal: float = math.inf

    @property
    def break_even(self) -> float:
        """Rank at which the site is as large as dense, the extra weights included."""
        return (self.size.dense - self.extra) / self.size.unit

    @property
    def largest(self) -> int:
        """Largest rank that saves weights; 0 if there is none."""
        most = min(int(np.ceil(self.break_even)) - 1, len(self.errors) - 1)
        return most // self.size.step * self.size.step

    def cost(self, rank: int | None) -> int:
        """Returns the number of weights at a rank; None means dense, 0 a removed block."""
        return self.size.weights(rank) + (self.extra if rank else 0)

    def error(self, rank: int | None) -> float:
        """Returns the predicted error at a rank; None means dense, 0 a removed block."""
        if rank is None:
            return 0.0
        return float(self.errors[rank]) if rank else self.removal

    def candidates(self, tile: int) -> tuple[list[int | None], np.ndarray, np.ndarray]:
        """Returns ranks (None: dense), costs ``[n]`` and errors ``[n]``, by rising cost.

        Args:
          tile: ranks are multiples of this and of the site's step, if the site has ``tiles``.
        """
        step, tile = self.size.step, tile if self.size.tiles else 1
        # (step, number of candidates it must leave): wide sites go up by several tiles at a time.
        wide = tile * max(self.size.tiles, 1)
        tiles = ((math.lcm(step, tile), 1), (math.lcm(step, wide), FINE))
        for coarser, least in tiles:
            step = coarser if self.largest >= coarser * least else step
        ranks = list(range(step, self.largest + 1, step))
        costs = [self.cost(r) for r in ranks]
        errors = [float(self.errors[r]) for r in ranks]
        return [*ranks, None], np.array([*costs, self.size.dense], float), np.array([*errors, 0.0])


Ranks = dict[str, int | None]  # site path -> rank; None: dense
Curves = Mapping[str, Curve]  # site path -> curve


def planned_weights(curves: Curves, ranks: Ranks) -> int:
    """Returns the number of weights of all sites at their ranks."""
    return sum(curves[path].cost(rank) for path, rank in ranks.items())


def dense_weights(curves: Curves) -> int:
    """Returns the number of weights of all sites when they stay dense."""
    return sum(curve.size.dense for curve in curves.values())
