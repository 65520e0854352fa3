"""Solvers of the multiple-choice knapsack: one candidate per item, least total error, one budget.

`choose` solves the Lagrangian dual by bisection. At a multiplier μ every item takes the candidate
of least ``error + μ·cost`` on its own. The dual value is a lower bound on the error of *any*
choice, so the gap to the optimum is known (theory/lord_rom §6, item 10). `choose_exactly` solves an
integer program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.optimize
import scipy.sparse


@dataclasses.dataclass(frozen=True)
class Choices:
    """A solution of the knapsack.

    Attributes:
      index: ``[items]`` index of the chosen candidate of every item.
      error: total error of the choice.
      bound: lower bound on the total error of any choice within the budget.
    """

    index: np.ndarray
    error: float
    bound: float

    @property
    def gap(self) -> float:
        """Relative optimality gap ``(error - bound) / error``; 0 for an optimum."""
        return 0.0 if self.error <= 0 else max(0.0, (self.error - self.bound) / self.error)


class UnmetBudgetError(ValueError):
    """A budget that cannot be met.

    Attributes:
      least: least cost that is possible, in the unit of the budget.
    """

    def __init__(self, message: str, least: float):
        super().__init__(message)
        self.least = least


def choose(costs: list[np.ndarray], errors: list[np.ndarray], budget: float) -> Choices:
    """Picks one candidate per item: least Σ error with Σ cost ≤ budget, up to the returned gap.

    Args:
      costs: per item ``[n_i]`` costs of its candidates, rising.
      errors: per item ``[n_i]`` errors of its candidates.
      budget: largest total cost.

    Returns:
      The choice, its error and a lower bound.

    Raises:
      ValueError: if even the cheapest candidates exceed the budget.
    """
    least = sum(c[0] for c in costs)
    if least > budget:
        raise UnmetBudgetError(
            f"budget {budget:.0f} is below the least possible size {least:.0f}; "
            "ask for a larger keep",
            float(least),
        )

    def at(multiplier: float) -> np.ndarray:
        # Ties go to the cheaper candidate: argmin takes the first.
        values = [e + multiplier * c for c, e in zip(costs, errors, strict=True)]
        return np.array([int(np.argmin(value)) for value in values])

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
        multiplier = (low + high) / 2
        index = at(multiplier)
        spent = total(costs, index)
        bound = max(bound, total(errors, index) + multiplier * (spent - budget))
        low, high = (multiplier, high) if spent > budget else (low, multiplier)
    index = fill(costs, errors, budget, at(high))
    return Choices(index, total(errors, index), bound)


def choose_exactly(
    costs: list[np.ndarray], errors: list[np.ndarray], budget: float, gap: float = 1e-4
) -> Choices:
    """Picks one candidate per item by integer programming (HiGHS); slower than `choose`.

    Candidates that another one of the same item beats in cost and error are removed beforehand.

    Args:
      costs: see `choose`.
      errors: see `choose`.
      budget: see `choose`.
      gap: relative optimality gap at which the solver stops.

    Returns:
      The choice, its error and a lower bound.

    Raises:
      ValueError: if even the cheapest candidates exceed the budget, or the solver fails.
    """
    start = choose(costs, errors, budget)  # its error scales the problem; its choice is a fallback
    if start.gap == 0:  # an optimum; its error may be 0, which cannot scale anything
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
        raise ValueError(
            f"the integer program was not solved: {found.message}; use solver 'bisection'"
        )
    # Solutions are integral only up to a tolerance: take the largest entry of each item.
    index = np.array([k[np.argmax(found.x[items == i])] for i, k in enumerate(kept)])
    total, spent = (
        float(sum(v[i] for v, i in zip(values, index, strict=True))) for values in (errors, costs)
    )
    bound = max(start.bound, float(found.mip_dual_bound) * unit)
    if spent > budget or total > start.error:
        index, total = start.index, start.error
    return Choices(index, total, min(bound, total))  # HiGHS's bound is exact only up to a tolerance


def _undominated(costs: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Returns the indices, by rising cost, of candidates that no other one beats in both."""
    order = np.lexsort((errors, costs))
    least = np.minimum.accumulate(errors[order])
    return order[np.concatenate([[True], errors[order][1:] < least[:-1]])]


def fill(
    costs: list[np.ndarray], errors: list[np.ndarray], budget: float, index: np.ndarray
) -> np.ndarray:
    """Spends the rest of the budget on the upgrades that save the most error per cost.

    Args:
      costs: see `choose`.
      errors: see `choose`.
      budget: see `choose`.
      index: ``[items]`` choice to start from; it fits the budget.

    Returns:
      ``[items]`` index of the chosen candidate of every item.
    """
    index = index.copy()
    left = budget - sum(c[i] for c, i in zip(costs, index, strict=True))
    while True:
        best = (0.0, -1, -1)
        for item, (c, e) in enumerate(zip(costs, errors, strict=True)):
            gain, extra = e[index[item]] - e, c - c[index[item]]
            rate = np.where((extra > 0) & (extra <= left) & (gain > 0), gain, 0.0)
            rate = rate / np.maximum(extra, 1.0)
            upgrade = int(np.argmax(rate))
            if rate[upgrade] > best[0]:
                best = (float(rate[upgrade]), item, upgrade)
        rate, item, upgrade = best
        if item < 0:
            return index
        left -= costs[item][upgrade] - costs[item][index[item]]
        index[item] = upgrade


Solver = Callable[[list[np.ndarray], list[np.ndarray], float], Choices]

# How one candidate per item is chosen: by bisection of a multiplier, or by integer programming.
SOLVERS: dict[str, Solver] = {"bisection": choose, "milp": choose_exactly}
