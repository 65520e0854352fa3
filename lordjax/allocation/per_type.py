"""Policies with one rank per layer type for all blocks; one of them also removes whole blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import numpy as np

from lordjax.allocation.curves import Curve, Curves, Ranks, dense_weights
from lordjax.allocation.knapsack import Choices, Solver, choose, choose_exactly
from lordjax.names import layer_index, layer_type

Candidates = tuple[list[int | None], np.ndarray, np.ndarray]


def per_type(curves: Curves, keep: float, tile: int) -> tuple[Ranks, float | None]:
    """Chooses one rank per layer type for all blocks (LoRD), from the types' summed errors.

    Raises:
      ValueError: if the sites of a type differ in size.
    """
    candidates = _of_types(curves, "per-type", lambda curve: curve.candidates(tile))
    ranks, choices = _chosen(curves, candidates, keep * dense_weights(curves), choose)
    return ranks, choices.gap


def stock(curves: Curves, keep: float, tile: int) -> tuple[Ranks, float | None]:
    """Chooses one rank per layer type for all blocks that stay, and removes whole blocks.

    The result has shapes that a config can say. Blocks are removed in the order of what their
    removal adds to the error; for every number of them, the best ranks of the others are found by
    integer programming. Rank 0 stands for a site of a removed block.

    Args:
      curves: site path -> curve; blocks whose sites have no finite `Curve.removal` stay.
      keep: fraction of the dense weights to keep, in (0, 1].
      tile: ranks are multiples of this, except those of sites with ``tiles`` 0.

    Returns:
      The ranks, and the optimality gap for the chosen number of removed blocks.

    Raises:
      ValueError: if the sites of a type differ in size, or the budget cannot be met.
    """
    budget = keep * dense_weights(curves)
    removal: dict[int, float] = {}
    for path, curve in curves.items():
        removal[layer_index(path)] = removal.get(layer_index(path), 0.0) + curve.removal
    order = sorted((i for i in removal if np.isfinite(removal[i])), key=lambda i: removal[i])
    best: tuple[float, Ranks, float] | None = None
    for count in range(min(len(order), len(removal) - 1) + 1):
        gone = order[:count]
        found = _without_blocks(curves, gone, budget, tile)
        if found is None:
            continue
        ranks, choices = found
        error = choices.error + sum(removal[i] for i in gone)
        if best is None or error < best[0]:
            best = error, ranks, choices.gap
    if best is None:
        raise ValueError(
            f"keep {keep}: the budget is below the smallest model with one width for all blocks "
            f"(a multiple of {tile}); ask for a larger keep or a smaller multiple"
        )
    return best[1], best[2]


def _without_blocks(
    curves: Curves, gone: Collection[int], budget: float, tile: int
) -> tuple[Ranks, Choices] | None:
    """Returns the best ranks without some blocks, or None if even the least ones cost too much."""

    def offered(curve: Curve) -> Candidates:
        # One rank holds for all blocks, so that coarse steps would leave much of a budget unspent.
        size = dataclasses.replace(curve.size, tiles=min(curve.size.tiles, 1))
        return dataclasses.replace(curve, size=size).candidates(tile)

    left = {path: curve for path, curve in curves.items() if layer_index(path) not in gone}
    candidates = _of_types(left, "stock", offered)
    if sum(costs[0] for _, costs, _ in candidates.values()) > budget:
        return None
    ranks, choices = _chosen(left, candidates, budget, choose_exactly)
    return {path: ranks.get(path, 0) if path in left else 0 for path in curves}, choices


def _of_types(
    curves: Curves, policy: str, offered: Callable[[Curve], Candidates]
) -> dict[str, Candidates]:
    """Returns what each layer type offers in all blocks together.

    Args:
      curves: site path -> curve.
      policy: name of the policy, for messages.
      offered: function of a curve that returns its ranks, costs and errors.

    Raises:
      ValueError: if the sites of a type differ in size.
    """
    types: dict[str, list[Curve]] = {}
    for path, curve in curves.items():
        types.setdefault(layer_type(path), []).append(curve)
    uneven = [name for name, own in types.items() if len({curve.size for curve in own}) > 1]
    if uneven:
        raise ValueError(
            f"policy {policy!r} gives one rank per type, but sizes differ between blocks at "
            f"{', '.join(uneven)} (compressed before?); use another policy"
        )
    candidates = {}
    for name, own in types.items():
        errors = np.sum([curve.errors for curve in own], axis=0)
        ranks, costs, summed = offered(dataclasses.replace(own[0], errors=errors))
        candidates[name] = ranks, costs * len(own), summed
    return candidates


def _chosen(
    curves: Curves, candidates: dict[str, Candidates], budget: float, solver: Solver
) -> tuple[Ranks, Choices]:
    """Returns the rank of every site, and the solution for the types."""
    columns = list(zip(*candidates.values(), strict=True))
    choices = solver(list(columns[1]), list(columns[2]), budget)
    found = zip(candidates, columns[0], choices.index, strict=True)
    chosen = {name: ranks[i] for name, ranks, i in found}
    return {path: chosen[layer_type(path)] for path in curves}, choices
