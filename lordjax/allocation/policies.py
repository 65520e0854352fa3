"""Which rank for which site, under one budget. Sees only numbers; NumPy only.

Every site offers *options*: leave it dense (error 0), or a rank that is a multiple of the tile
and below break-even, with the error that the method predicts. A policy picks one option each so
that the weights fit the budget.

The general problem - one option each, least total error, one budget - is a multiple-choice
knapsack (`knapsack`), whose gap to the optimum is known and printed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lordjax import names
from lordjax.allocation.knapsack import choose, fill
from lordjax.allocation.plan import SiteSize
from lordjax.names import did_you_mean, layer_index, layer_type

INFLUENCE_CAP = 0.95  # most that `block_influence` removes of a block
TILE = 8  # ranks are multiples of this; what matrix units and vector registers divide well
FINE = 16  # options of a site from which steps of several tiles are fine enough


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a site offers: its size and the predicted error at every rank.

    Attributes:
      size: weights at a rank.
      errors: ``[m + 1]``, non-increasing; ``errors[r]`` is the error at rank r, in a unit that
        is comparable between sites if the policy compares them.
      extra: weights that a compressed site needs besides (a new bias).
      influence: of the site's block, for `block_influence`.
    """

    size: SiteSize
    errors: np.ndarray
    extra: int = 0
    influence: float = 0.0

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
        """Weights at a rank (None = dense)."""
        return self.size.weights(rank) + (0 if rank is None else self.extra)

    def options(self, tile: int) -> tuple[list[int | None], np.ndarray, np.ndarray]:
        """Ranks (None = dense), costs ``[n]`` and errors ``[n]``, by rising cost."""
        step = self.size.step
        # (step, options it must leave): steps of several tiles are for wide sites only.
        tiles = ((math.lcm(step, tile), 1), (math.lcm(step, tile * self.size.tiles), FINE))
        for coarser, least in tiles:
            step = coarser if self.largest >= coarser * least else step
        ranks = list(range(step, self.largest + 1, step))
        costs = [self.cost(r) for r in ranks]
        errors = [float(self.errors[r]) for r in ranks]
        return [*ranks, None], np.array([*costs, self.size.dense], float), np.array([*errors, 0.0])


Ranks = dict[str, int | None]
Curves = Mapping[str, Curve]


def _by_ratio(curves: Curves, ratio: float) -> Ranks:
    """The largest rank (1 at least) that costs ``ratio · dense``; dense at ratio 1.

    Without extra weights that is ``floor(ratio · break-even)``, and a multiple of the site's step.
    Sites so small that the least rank is no smaller stay dense.
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


def _spent(curves: Curves, ranks: Ranks) -> int:
    """Weights of all sites at their ranks."""
    return sum(curves[path].cost(rank) for path, rank in ranks.items())


def _dense(curves: Curves) -> int:
    """Weights of all sites when left dense."""
    return sum(curve.size.dense for curve in curves.values())


def uniform(curves: Curves, keep: float, tile: int) -> tuple[Ranks, float | None]:
    """The same share of every kernel: ``rank = floor(keep · break-even)`` (SVD-LLM, ASVD).

    No tile rounding: it would make the published protocol's ranks smaller.
    """
    del tile
    return _by_ratio(curves, keep), None


# ROM's table (theory/lord_rom §4.3): share of blocks that is compressed, by the overall budget.
_ROM_KEEP = (0.33, 0.5, 0.8, 0.9)
_ROM_BLOCKS = (1.0, 0.75, 0.375, 0.25)


def last_k(curves: Curves, keep: float, tile: int) -> tuple[Ranks, float | None]:
    """Only the last blocks, all kernels of a block at one ratio (ROM's budgets).

    ROM's own table gives the share of blocks at 90, 80 and 50 %; between them it is
    interpolated. The ratio inside spends what the dense blocks leave of the budget - with equal
    blocks ``1 - blocks·(1 - ratio) = keep`` - and is rounded down to hundredths, which reproduces
    the paper's 0.60, 0.46 and 0.33.

    Raises:
      ValueError: if the budget needs a ratio of zero.
    """
    del tile
    if keep >= 1:
        return dict.fromkeys(curves, None), None
    layers = sorted({layer_index(path) for path in curves})
    share = float(np.interp(keep, _ROM_KEEP, _ROM_BLOCKS))
    k = max(1, round(share * len(layers)))
    chosen = set(layers[-k:])
    inside = {path: curve for path, curve in curves.items() if layer_index(path) in chosen}
    total, within = (_dense(some) for some in (curves, inside))
    ratio = np.floor(100 * (1 - (1 - keep) * total / within) + 1e-9) / 100
    if ratio <= 0:
        raise ValueError(f"keep {keep}: the last {k} of {len(layers)} blocks are too few for it")
    return {**dict.fromkeys(curves, None), **_by_ratio(inside, ratio)}, None


def per_type(curves: Curves, keep: float, tile: int) -> tuple[Ranks, float | None]:
    """One rank per layer type, the same in every block (LoRD), types weighed by their error."""
    types: dict[str, list[str]] = {}
    for path in curves:
        types.setdefault(layer_type(path), []).append(path)
    merged = {}
    uneven = [n for n, paths in types.items() if len({curves[path].size for path in paths}) > 1]
    if uneven:
        raise ValueError(
            f"one rank per type, but sizes differ between blocks at {', '.join(uneven)} "
            "(compressed before?); use another policy"
        )
    for name, paths in types.items():
        errors = np.sum([curves[path].errors for path in paths], axis=0)
        merged[name] = (dataclasses.replace(curves[paths[0]], errors=errors), len(paths))
    options = {name: curve.options(tile) for name, (curve, _) in merged.items()}
    costs = [options[name][1] * count for name, (_, count) in merged.items()]
    errors = [options[name][2] for name in merged]
    choices = choose(costs, errors, keep * _dense(curves))
    chosen = {name: options[name][0][i] for name, i in zip(merged, choices.index, strict=True)}
    return {path: chosen[layer_type(path)] for path in curves}, choices.gap


def energy(curves: Curves, keep: float, tile: int) -> tuple[Ranks, float | None]:
    """The smallest rank that keeps a share τ of every kernel's energy; τ by bisection."""
    budget = keep * _dense(curves)
    options = {path: curve.options(tile) for path, curve in curves.items()}

    def at(tau: float) -> Ranks:
        ranks = {}
        for path, (offered, _, errors) in options.items():
            allowed = (1 - tau) * curves[path].errors[0]
            ranks[path] = offered[int(np.argmax(errors <= allowed))]
        return ranks

    low, high = 0.0, 1.0
    if _spent(curves, at(high)) <= budget:
        return at(high), None
    for _ in range(60):
        tau = (low + high) / 2
        low, high = (tau, high) if _spent(curves, at(tau)) <= budget else (low, tau)
    return at(low), None


def global_(curves: Curves, keep: float, tile: int) -> tuple[Ranks, float | None]:
    """Least total predicted error within the budget, dense being one of the options."""
    options = [curve.options(tile) for curve in curves.values()]
    budget = keep * _dense(curves)
    choices = choose([o[1] for o in options], [o[2] for o in options], budget)
    ranks = {
        path: ranks[i]
        for path, (ranks, _, _), i in zip(curves, options, choices.index, strict=True)
    }
    return ranks, choices.gap


def influence_removal(
    scores: np.ndarray, removed: float, temperature: float, cap: float = INFLUENCE_CAP
) -> np.ndarray:
    """Share to remove from every block, little from those of high influence (MoDeGPT).

    The maximiser of ``Σ s (1 - φ) + ε Σ H(φ)``, ``H(φ) = -φ log φ``, under ``mean φ = removed`` and
    ``0 ≤ φ ≤ cap``: ``φ = min(cap, c·exp(-s/ε))`` with c fixed by the budget, found by pinning
    the blocks above the cap and scaling the others until none is above.

    Args:
      scores: ``[blocks]`` influence; see `stats.Influence`.
      removed: mean share, in [0, cap].
      temperature: ε; small removes from few blocks, infinity from all alike.
      cap: most of a block.

    Raises:
      ValueError: if ``removed`` is above the cap, or the temperature is not positive.

    Source: MoDeGPT, equations 10 and 11; the cap: theory/modegpt §5.3.
    """
    if not 0 <= removed <= cap:
        raise ValueError(f"share to remove {removed:.3g} is not in [0, {cap}], the cap of a block")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    scores = np.asarray(scores, float)
    pinned = np.zeros(len(scores), bool)
    while True:
        free = removed * len(scores) - cap * pinned.sum()
        # Relative to the least of those that are left: others may be too small to represent.
        least = scores[~pinned].min() if not pinned.all() else 0.0
        weights = np.where(pinned, 0.0, np.exp(-np.maximum(scores - least, 0) / temperature))
        shares = np.where(pinned, cap, weights * (free / max(weights.sum(), 1e-300)))
        above = ~pinned & (shares > cap)
        if not above.any():
            return shares
        pinned |= above


def block_influence(
    curves: Curves, keep: float, tile: int, *, temperature: float = 0.1
) -> tuple[Ranks, float | None]:
    """MoDeGPT's: one share per block from its influence, the same for all sites of the block.

    Ranks are rounded down to the tile; what that leaves of the budget is spent where a step saves
    most error per weight.
    """
    if 1 - keep > INFLUENCE_CAP:
        raise ValueError(
            f"the budget leaves {keep:.3g} of what can shrink, and no block may lose more than "
            f"{INFLUENCE_CAP}; ask for a larger keep"
        )
    layers = sorted({layer_index(path) for path in curves})
    scores = {layer_index(path): curve.influence for path, curve in curves.items()}
    removed = influence_removal(np.array([scores[i] for i in layers]), 1 - keep, temperature)
    kept = dict(zip(layers, 1 - removed, strict=True))
    options = [curve.options(tile) for curve in curves.values()]
    index = np.array(
        [
            max(0, int(np.searchsorted(costs, kept[layer_index(path)] * costs[-1], "right")) - 1)
            for path, (_, costs, _) in zip(curves, options, strict=True)
        ]
    )
    costs, errors = [o[1] for o in options], [o[2] for o in options]
    index = fill(costs, errors, keep * _dense(curves), index)
    return {path: o[0][i] for path, o, i in zip(curves, options, index, strict=True)}, None


def _without_fixed(curves: Curves, keep: float) -> tuple[Curves, float]:
    """The sites of which weights can be saved, and the share of those that may stay.

    Raises:
      ValueError: if the others alone are more than the budget.
    """
    free = {path: curve for path, curve in curves.items() if not curve.size.fixed}
    total, within = _dense(curves), _dense(free)
    fixed = total - within
    if keep * total <= fixed:
        raise ValueError(
            f"keep {keep} cannot be met: {fixed / total:.4g} of the weights are in layers that "
            "this method leaves as they are; ask for a larger keep or choose another method"
        )
    return free, keep if not fixed else (keep * total - fixed) / within


Policy = Callable[..., tuple[Ranks, float | None]]  # (curves, keep, tile, **options)

POLICIES: dict[str, Policy] = {
    "uniform": uniform,
    "per-type": per_type,
    "last-k": last_k,
    "energy": energy,
    "global": global_,
    "block-influence": block_influence,
}


# Policies that look at shapes only.
CURVELESS = ("uniform", "last-k")
# Policies that look at the influence of blocks.
INFLUENCED = ("block-influence",)


def allocate(
    curves: Curves, keep: float, policy: str, tile: int = TILE, **options: Any
) -> tuple[Ranks, float | None]:
    """Ranks for all sites under ``keep · Σ dense weights``, and the optimality gap if known.

    Args:
      curves: kernel path -> what it offers.
      keep: share of the dense weights that may stay, in (0, 1].
      policy: a key of `POLICIES`.
      tile: ranks are multiples of this, in policies that optimise.
      **options: of the policy.

    Raises:
      KeyError: if there is no such policy.
      ValueError: if ``keep`` is outside (0, 1] or cannot be met, or an error is not finite.
    """
    if policy not in POLICIES:
        raise KeyError(f"no allocation policy {policy!r}; known: {', '.join(POLICIES)}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    bad = [path for path, curve in curves.items() if not np.isfinite(curve.errors).all()]
    if bad:
        raise ValueError(f"predicted errors are not finite at {', '.join(bad)}")
    if keep == 1:
        return dict.fromkeys(curves, None), None
    ranks, gap = POLICIES[policy](*_without_fixed(curves, keep), tile, **options)
    ranks = {path: ranks.get(path) for path in curves}
    # Ranks of at least 1 (or the tile), and matrices too small to factor, can be too much.
    spent, dense = _spent(curves, ranks), _dense(curves)
    if spent > keep * dense * (1 + 1e-12):
        raise ValueError(
            f"keep {keep} cannot be met by policy {policy!r}: it needs at least "
            f"{spent / dense:.4g}; ask for a larger keep"
        )
    return ranks, gap


GIVEN = "given"  # the policy of a plan whose ranks were


def ranks_by_pattern(sizes: Mapping[str, SiteSize], patterns: Mapping[str, int]) -> Ranks:
    """Ranks of all sites: that of the first pattern that matches, else dense.

    Args:
      sizes: site path -> its size.
      patterns: regular expression -> rank. It has to match a layer type (``mlp/down``) or a layer
        (``layer_3/mlp/down``) in full.

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
                        f"{path}: rank {rank} saves nothing; expected one from 1 to "
                        f"{math.ceil(size.limit) - 1}{step}, or leave the layer out"
                    )
                ranks[path] = rank
                break
    if unused:
        first = min(unused)
        types = dict.fromkeys(layer_type(path) for path in sizes)
        raise KeyError(f"no layer is left for {first!r}; {did_you_mean(first, types)}")
    return ranks


def check_policy(name: str, temperature: float | None = None) -> None:
    """Checks the name of an allocation policy and its option.

    Raises:
      KeyError: with a hint if there is no such policy.
      ValueError: if a temperature is given to a policy that has none.
    """
    if name not in POLICIES:
        raise KeyError(f"no allocation policy {name!r}; {names.did_you_mean(name, POLICIES)}")
    if temperature is not None and name not in INFLUENCED:
        raise ValueError(
            f"policy {name!r} has no temperature; leave it out or use {', '.join(INFLUENCED)}"
        )
