"""Which rank for which site, under one budget. Sees only numbers; NumPy only.

Every site offers *candidates*: leave it dense (error 0), or a rank that is a multiple of the tile
and below break-even, with the error that the method predicts. A policy picks one candidate per site
so that the weights fit the budget.

The general problem is a multiple-choice knapsack: one candidate per site, least total error, one
budget. `knapsack` solves it and reports the gap to the optimum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lordjax.allocation.block_influence import block_influence
from lordjax.allocation.curves import Curves, Ranks, dense_weights, planned_weights
from lordjax.allocation.knapsack import UnmetBudgetError, choose
from lordjax.allocation.per_type import per_type, stock
from lordjax.allocation.plan import SiteSize
from lordjax.names import did_you_mean, layer_index, layer_type, listed

TILE = 8  # ranks are multiples of this, which suits matrix units and vector registers


def _by_ratio(curves: Curves, ratio: float) -> Ranks:
    """Returns the largest rank (at least 1) that costs ``ratio · dense``; dense at ratio 1.

    Without extra weights that is ``floor(ratio · break-even)``, rounded down to the site's step.
    A site stays dense if even its least rank saves nothing.
    """
    if ratio >= 1:
        return dict.fromkeys(curves, None)
    ranks: Ranks = {}
    for path, curve in curves.items():
        size = curve.size
        rank = int((ratio * size.dense - curve.extra) / size.unit) // size.step * size.step
        rank = max(size.step, rank)
        ranks[path] = rank if rank < curve.break_even else None
    return ranks


def uniform(curves: Curves, keep: float, tile: int) -> tuple[Ranks, float | None]:
    """Keeps the same fraction of every kernel: ``rank = floor(keep · break-even)`` (SVD-LLM, ASVD).

    Ranks are not rounded to the tile: that would make the published protocol's ranks smaller.
    """
    del tile
    return _by_ratio(curves, keep), None


# ROM's table (theory/lord_rom §4.3): fraction of the blocks to compress, by the overall budget.
_ROM_KEEP = (0.33, 0.5, 0.8, 0.9)
_ROM_BLOCKS = (1.0, 0.75, 0.375, 0.25)


def last_k(curves: Curves, keep: float, tile: int) -> tuple[Ranks, float | None]:
    """Compresses only the last blocks, all of their kernels at one ratio (ROM's budgets).

    ROM's table gives the fraction of blocks at budgets of 90, 80 and 50 %; between them we
    interpolate. The ratio inside the blocks spends what the dense blocks leave of the budget (with
    equal blocks ``1 - blocks·(1 - ratio) = keep``). It is rounded down to hundredths, which
    reproduces the paper's 0.60, 0.46 and 0.33.

    Raises:
      ValueError: if the budget needs a ratio of zero.
    """
    del tile
    if keep >= 1:
        return dict.fromkeys(curves, None), None
    layers = sorted({layer_index(path) for path in curves})
    fraction = float(np.interp(keep, _ROM_KEEP, _ROM_BLOCKS))
    k = max(1, round(fraction * len(layers)))
    chosen = set(layers[-k:])
    inside = {path: curve for path, curve in curves.items() if layer_index(path) in chosen}
    total, within = (dense_weights(some) for some in (curves, inside))
    ratio = np.floor(100 * (1 - (1 - keep) * total / within) + 1e-9) / 100
    if ratio <= 0:
        raise ValueError(
            f"keep {keep}: the last {k} of {len(layers)} blocks are too few to save that much; "
            "ask for a larger keep or use another policy"
        )
    return {**dict.fromkeys(curves, None), **_by_ratio(inside, ratio)}, None


def energy(curves: Curves, keep: float, tile: int) -> tuple[Ranks, float | None]:
    """Gives every kernel the smallest rank that keeps a fraction τ of its energy.

    One τ holds for all kernels; bisection finds the largest that fits the budget.
    """
    budget = keep * dense_weights(curves)
    candidates = {path: curve.candidates(tile) for path, curve in curves.items()}

    def at(tau: float) -> Ranks:
        ranks = {}
        for path, (offered, _, errors) in candidates.items():
            allowed = (1 - tau) * curves[path].errors[0]
            ranks[path] = offered[int(np.argmax(errors <= allowed))]
        return ranks

    low, high = 0.0, 1.0
    if planned_weights(curves, at(high)) <= budget:
        return at(high), None
    for _ in range(60):
        tau = (low + high) / 2
        low, high = (tau, high) if planned_weights(curves, at(tau)) <= budget else (low, tau)
    return at(low), None


def global_(curves: Curves, keep: float, tile: int) -> tuple[Ranks, float | None]:
    """Minimizes the total predicted error within the budget; dense is one of the candidates."""
    candidates = [curve.candidates(tile) for curve in curves.values()]
    budget = keep * dense_weights(curves)
    choices = choose([c[1] for c in candidates], [c[2] for c in candidates], budget)
    ranks = {
        path: ranks[i]
        for path, (ranks, _, _), i in zip(curves, candidates, choices.index, strict=True)
    }
    return ranks, choices.gap


# (curves, keep, tile, **options) -> ranks, and the optimality gap if it is known
Policy = Callable[..., tuple[Ranks, float | None]]

POLICIES: dict[str, Policy] = {
    "uniform": uniform,
    "per-type": per_type,
    "last-k": last_k,
    "energy": energy,
    "global": global_,
    "block-influence": block_influence,
    "stock": stock,
}


# Policies that read shapes only.
CURVELESS = ("uniform", "last-k")
# Policies that read the block influence.
INFLUENCED = ("block-influence",)
# Policies that may remove whole blocks, fixed sites included.
REMOVING = ("stock",)


def check_policy(name: str, temperature: float | None = None) -> None:
    """Checks the name of an allocation policy and its option.

    Raises:
      KeyError: if there is no such policy; suggests one.
      ValueError: if a temperature is given to a policy that has none.
    """
    if name not in POLICIES:
        raise KeyError(f"no allocation policy {name!r}; {did_you_mean(name, POLICIES)}")
    if temperature is not None and name not in INFLUENCED:
        raise ValueError(
            f"policy {name!r} has no temperature; leave the temperature out or use policy "
            f"{', '.join(INFLUENCED)}"
        )


def _without_fixed(curves: Curves, keep: float) -> tuple[Curves, float]:
    """Returns the sites that can save weights, and the fraction of those that may stay.

    Raises:
      ValueError: if the other sites alone exceed the budget.
    """
    free = {path: curve for path, curve in curves.items() if not curve.size.fixed}
    total, within = dense_weights(curves), dense_weights(free)
    fixed = total - within
    if keep * total <= fixed:
        raise UnmetBudgetError(
            f"keep {keep} cannot be met: {fixed / total:.4g} of the weights are in layers that "
            "this method leaves as they are; ask for a larger keep or choose another method",
            fixed,
        )
    return free, keep if not fixed else (keep * total - fixed) / within


def allocate(
    curves: Curves, keep: float, policy: str, tile: int = TILE, **options: Any
) -> tuple[Ranks, float | None]:
    """Allocates ranks to all sites within ``keep · Σ dense weights``.

    Args:
      curves: site path -> size and predicted errors of the site.
      keep: fraction of the dense weights to keep, in (0, 1].
      policy: a key of `POLICIES`.
      tile: ranks are multiples of this, in policies that optimize.
      **options: keyword arguments of the policy.

    Returns:
      Site path -> rank (None: dense); the relative optimality gap, None if it is not known.

    Raises:
      KeyError: if there is no such policy.
      ValueError: if ``keep`` is outside (0, 1] or cannot be met, or an error is not finite.
    """
    check_policy(policy)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    bad = [path for path, curve in curves.items() if not np.isfinite(curve.errors).all()]
    if bad:
        raise ValueError(
            f"predicted errors are not finite at {listed(bad)}; check the weights and the "
            "calibration tokens, or choose another method"
        )
    if keep == 1:
        return dict.fromkeys(curves, None), None
    removes = policy in REMOVING and any(np.isfinite(c.removal) for c in curves.values())
    free = (curves, keep) if removes else _without_fixed(curves, keep)
    try:
        ranks, gap = POLICIES[policy](*free, tile, **options)
    except UnmetBudgetError as error:
        error.least += dense_weights(curves) - dense_weights(free[0])
        raise
    ranks = {path: ranks.get(path) for path in curves}
    # The least rank (1 or the tile) and matrices too small to factor can exceed the budget.
    spent, dense = planned_weights(curves, ranks), dense_weights(curves)
    if spent > keep * dense * (1 + 1e-12):
        raise UnmetBudgetError(
            f"keep {keep} cannot be met by policy {policy!r}: it needs at least "
            f"{spent / dense:.4g}; ask for a larger keep",
            spent,
        )
    return ranks, gap


GIVEN = "given"  # policy of a plan whose ranks the caller gave


def ranks_by_pattern(sizes: Mapping[str, SiteSize], patterns: Mapping[str, int]) -> Ranks:
    """Returns the rank of every site: that of the first pattern that matches, else dense.

    Args:
      sizes: site path -> its size.
      patterns: regular expression -> rank. A pattern has to match a layer type (``mlp/down``) or a
        layer (``layer_3/mlp/down``) in full.

    Raises:
      KeyError: if a pattern decides no site; suggests layer types.
      ValueError: if a rank saves nothing or is no multiple of the site's step.
    """
    ranks: Ranks = dict.fromkeys(sizes, None)
    unused = dict(patterns)
    for path, size in sizes.items():
        names = (layer_type(path), path.removesuffix("/kernel"))
        for pattern, rank in patterns.items():
            if not size.fixed and any(re.fullmatch(pattern, name) for name in names):
                unused.pop(pattern, None)
                if not 1 <= rank < size.limit or rank % size.step:
                    step = f" and a multiple of {size.step}" if size.step > 1 else ""
                    raise ValueError(
                        f"{path}: got rank {rank}; expected one that saves weights, from 1 to "
                        f"{math.ceil(size.limit) - 1}{step}, or leave the pattern out"
                    )
                ranks[path] = rank
                break
    if unused:
        first = min(unused)
        types = dict.fromkeys(layer_type(path) for path in sizes)
        raise KeyError(
            f"no layer is left for {first!r}: no layer matches it in full, or an earlier pattern "
            f"matches first; {did_you_mean(first, types)}"
        )
    return ranks
