"""A multiple-choice knapsack: one option per item, least total error, one budget.

`choose` solves its Lagrangian dual by bisection: at a price μ every item takes the option of least
``error + μ·cost`` on its own, and the dual value is a lower bound on the error of *any* choice, so
the gap to the optimum is known (theory/lord_rom §6, item 10). `choose_exactly` is an integer
programme.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.optimize
import scipy.sparse


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
    index = fill(costs, errors, budget, at(high))
    return Choices(index, total(errors, index), bound)


def choose_exactly(
    costs: list[np.ndarray], errors: list[np.ndarray], budget: float, gap: float = 1e-4
) -> Choices:
    """`choose` by integer programming (HiGHS): an optimum up to a relative ``gap``, and slower.

    Options that another of the same item beats in cost and error are left out beforehand.
    Arguments and errors as for `choose`.
    """
    start = choose(costs, errors, budget)  # its error scales the problem, its plan is a fallback
    if start.gap == 0:  # an optimum, perhaps of error 0, which is no scale
        return start
    unit = start.error
    kept = [_undominated(c, e) for c, e in zip(costs, errors, strict=True)]
    items = np.repeat(np.arange(len(kept)), [len(k) for k in kept])
    cost = np.concatenate([c[k] for c, k in zip(costs, kept, strict=True)]) / budget
    error = np.concatenate([e[k] for e, k in zip(errors, kept, strict=True)]) / unit
    one_each = scipy.sparse.csr_array((np.ones(len(items)), (items, np.arange(len(items)))))
    found = scipy.optimize.milp(
        error,
        integrality=np.ones(len(items)),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),  # pyright: ignore[reportArgumentType]
            scipy.optimize.LinearConstraint(cost[None], -np.inf, 1),
        ],
        options={"mip_rel_gap": gap},
    )
    if found.x is None:
        raise ValueError(f"the integer programme was not solved: {found.message}")
    # Solutions are integral up to a tolerance only: the largest of each item is the one.
    index = np.array([k[np.argmax(found.x[items == i])] for i, k in enumerate(kept)])
    total, spent = (
        float(sum(v[i] for v, i in zip(values, index, strict=True))) for values in (errors, costs)
    )
    bound = max(start.bound, float(found.mip_dual_bound) * unit)
    if spent > budget or total > start.error:
        index, total = start.index, start.error
    return Choices(index, total, min(bound, total))  # HiGHS' bound is exact up to a tolerance only


def _undominated(costs: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Indices, by rising cost, of options that no other beats in both."""
    order = np.lexsort((errors, costs))
    least = np.minimum.accumulate(errors[order])
    return order[np.concatenate([[True], errors[order][1:] < least[:-1]])]


def fill(
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


Solver = Callable[[list[np.ndarray], list[np.ndarray], float], Choices]

# How one option per item is chosen: by bisection of a price, or by integer programming.
SOLVERS: dict[str, Solver] = {"bisection": choose, "milp": choose_exactly}
