"""Which rank for which kernel, under one budget. Sees only numbers; NumPy only.

Every kernel offers *options*: leave it dense (error 0), or a rank that is a multiple of the tile
and below break-even, with the error that the method predicts. A policy picks one option each so
that the weights fit the budget.

The general problem - one option each, least total error, one budget - is a multiple-choice
knapsack. `choose` solves its Lagrangian dual by bisection: at a price μ every kernel takes the
option of least ``error + μ·cost`` on its own, and the dual value is a lower bound on the error of
*any* plan, so the gap to the optimum is known and printed (specs of LoRD §6 item 10).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from lordjax.sites import layer_index, layer_type

TILE = 8  # ranks are multiples of this; what matrix units and vector registers divide well


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a kernel offers: its shape and the predicted error at every rank.

    Attributes:
      shape: ``(in, out)``.
      errors: ``[m + 1]``, non-increasing; ``errors[r]`` is the error at rank r, in a unit that
        is comparable between kernels if the policy compares them.
      extra: weights that a factored kernel needs besides its factors (a new bias).
    """

    shape: tuple[int, int]
    errors: np.ndarray
    extra: int = 0

    @property
    def dense(self) -> int:
        """Weights when left dense."""
        return self.shape[0] * self.shape[1]

    @property
    def break_even(self) -> float:
        """Rank at which the factor pair is as large as the dense kernel."""
        return (self.dense - self.extra) / sum(self.shape)

    def cost(self, rank: int) -> int:
        """Weights at a rank."""
        return rank * sum(self.shape) + self.extra

    def options(self, tile: int) -> tuple[list[int | None], np.ndarray, np.ndarray]:
        """Ranks (None = dense), costs ``[n]`` and errors ``[n]``, by rising cost."""
        largest = min(int(np.ceil(self.break_even)) - 1, len(self.errors) - 1)
        step = tile if largest >= tile else 1
        ranks: list[int | None] = list(range(step, largest + 1, step))
        costs = [self.cost(r) for r in ranks if r is not None]
        errors = [float(self.errors[r]) for r in ranks if r is not None]
        return [*ranks, None], np.array([*costs, self.dense], float), np.array([*errors, 0.0])


@dataclasses.dataclass(frozen=True)
class Choices:
    """Chosen option of every item, the total error, and a lower bound on it."""

    index: np.ndarray
    error: float
    bound: float

    @property
    def gap(self) -> float:
        """``(error - bound) / error``; 0 for an optimum."""
        return 0.0 if self.error <= 0 else max(0.0, (self.error - self.bound) / self.error)


def choose(costs: list[np.ndarray], errors: list[np.ndarray], budget: float) -> Choices:
    """Picks one option per item: least Σ error with Σ cost ≤ budget, up to the returned gap.

    Args:
      costs: per item, the costs of its options, ``[n_i]``, rising.
      errors: per item, the errors of its options, ``[n_i]``.
      budget: most total cost.

    Raises:
      ValueError: if even the cheapest options exceed the budget.
    """
    least = sum(c[0] for c in costs)
    if least > budget:
        raise ValueError(
            f"budget {budget:.0f} is below the least possible size {least:.0f}; "
            "ask for a larger keep"
        )

    def at(price: float) -> np.ndarray:
        # Ties go to the cheaper option: argmin takes the first.
        return np.array([int(np.argmin(e + price * c)) for c, e in zip(costs, errors, strict=True)])

    def total(values: list[np.ndarray], index: np.ndarray) -> float:
        return float(sum(v[i] for v, i in zip(values, index, strict=True)))

    low, high = 0.0, 1.0
    if total(costs, at(0.0)) <= budget:
        index = at(0.0)
        return Choices(index, total(errors, index), total(errors, index))
    while total(costs, at(high)) > budget:
        high *= 4.0
        if not np.isfinite(high):
            break
    bound = -np.inf
    for _ in range(100):
        price = (low + high) / 2
        index = at(price)
        spent = total(costs, index)
        bound = max(bound, total(errors, index) + price * (spent - budget))
        low, high = (price, high) if spent > budget else (low, price)
    index = _fill(costs, errors, budget, at(high))
    return Choices(index, total(errors, index), bound)


def _fill(
    costs: list[np.ndarray], errors: list[np.ndarray], budget: float, index: np.ndarray
) -> np.ndarray:
    """Spends what is left of the budget on the upgrades that gain most error per cost."""
    index = index.copy()
    left = budget - sum(c[i] for c, i in zip(costs, index, strict=True))
    while True:
        best = (0.0, -1, -1)
        for item, (c, e) in enumerate(zip(costs, errors, strict=True)):
            gain, price = e[index[item]] - e, c - c[index[item]]
            rate = np.where((price > 0) & (price <= left) & (gain > 0), gain, 0.0)
            rate = rate / np.maximum(price, 1.0)
            option = int(np.argmax(rate))
            if rate[option] > best[0]:
                best = (float(rate[option]), item, option)
        rate, item, option = best
        if item < 0:
            return index
        left -= costs[item][option] - costs[item][index[item]]
        index[item] = option


Ranks = dict[str, int | None]
Curves = Mapping[str, Curve]


def _by_ratio(curves: Curves, ratio: float) -> Ranks:
    """The largest rank (1 at least) that costs ``ratio · dense``; dense at ratio 1.

    Without extra weights that is ``floor(ratio · break-even)``. Matrices so small that rank 1 is
    no smaller stay dense.
    """
    if ratio >= 1:
        return dict.fromkeys(curves, None)
    ranks: Ranks = {}
    for path, curve in curves.items():
        rank = max(1, int((ratio * curve.dense - curve.extra) / sum(curve.shape)))
        ranks[path] = rank if rank < curve.break_even else None
    return ranks


def _spent(curves: Curves, ranks: Ranks) -> int:
    """Weights of all kernels at their ranks."""
    return sum(curves[p].dense if r is None else curves[p].cost(r) for p, r in ranks.items())


def uniform(curves: Curves, keep: float, tile: int) -> tuple[Ranks, float | None]:
    """The same share of every kernel: ``rank = floor(keep · break-even)`` (SVD-LLM, ASVD).

    No tile rounding: it would make the published protocol's ranks smaller.
    """
    del tile
    return _by_ratio(curves, keep), None


# ROM's table (specs §4.3): share of blocks that is compressed, by the overall budget.
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
    total, within = (sum(c.dense for c in some.values()) for some in (curves, inside))
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
    for name, paths in types.items():
        errors = np.sum([curves[path].errors for path in paths], axis=0)
        merged[name] = (dataclasses.replace(curves[paths[0]], errors=errors), len(paths))
    options = {name: curve.options(tile) for name, (curve, _) in merged.items()}
    costs = [options[name][1] * count for name, (_, count) in merged.items()]
    errors = [options[name][2] for name in merged]
    choices = choose(costs, errors, keep * sum(c.dense for c in curves.values()))
    chosen = {name: options[name][0][i] for name, i in zip(merged, choices.index, strict=True)}
    return {path: chosen[layer_type(path)] for path in curves}, choices.gap


def energy(curves: Curves, keep: float, tile: int) -> tuple[Ranks, float | None]:
    """The smallest rank that keeps a share τ of every kernel's energy; τ by bisection."""
    budget = keep * sum(curve.dense for curve in curves.values())
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
    budget = keep * sum(curve.dense for curve in curves.values())
    choices = choose([o[1] for o in options], [o[2] for o in options], budget)
    ranks = {
        path: ranks[i]
        for path, (ranks, _, _), i in zip(curves, options, choices.index, strict=True)
    }
    return ranks, choices.gap


Policy = Callable[[Curves, float, int], tuple[Ranks, float | None]]

POLICIES: dict[str, Policy] = {
    "uniform": uniform,
    "per-type": per_type,
    "last-k": last_k,
    "energy": energy,
    "global": global_,
}


# Policies that look at shapes only.
CURVELESS = ("uniform", "last-k")


def allocate(
    curves: Curves, keep: float, policy: str, tile: int = TILE
) -> tuple[Ranks, float | None]:
    """Ranks for all kernels under ``keep · Σ dense weights``, and the optimality gap if known.

    Args:
      curves: kernel path -> what it offers.
      keep: share of the dense weights that may stay, in (0, 1].
      policy: a key of `POLICIES`.
      tile: ranks are multiples of this, in policies that optimise.

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
    ranks, gap = POLICIES[policy](curves, keep, tile)
    # Ranks of at least 1 (or the tile), and matrices too small to factor, can be too much.
    spent, dense = _spent(curves, ranks), sum(curve.dense for curve in curves.values())
    if spent > keep * dense * (1 + 1e-12):
        raise ValueError(
            f"keep {keep} cannot be met by policy {policy!r}: it needs at least "
            f"{spent / dense:.4g}; ask for a larger keep"
        )
    return ranks, gap
