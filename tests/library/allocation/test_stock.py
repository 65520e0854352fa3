"""The policy of stock shapes: one rank per type for all blocks, whole blocks removed."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from problems import spent

from lordjax.allocation.curves import Curve
from lordjax.allocation.plan import SiteSize
from lordjax.allocation.policies import allocate

BLOCKS, WIDTH, HEADS, TILE = 4, 20, 4, 4


def curves(seed, removal=True):
    """MLPs of width 20 and four heads in four blocks, with random falling errors."""
    rng, found = np.random.default_rng(seed), {}
    for i in range(BLOCKS):
        for name, count, unit, tiles in (("mlp", WIDTH, 30, 4), ("attention", HEADS, 50, 0)):
            fall = np.sort(rng.exponential(size=count))[::-1] * rng.uniform(0.2, 2)
            errors = np.append(np.cumsum(fall[::-1])[::-1], 0)
            size = SiteSize(count * unit, unit, tiles=tiles)
            gone = rng.uniform(2, 20) if removal else math.inf
            found[f"layer_{i}/{name}"] = Curve(size, errors, removal=gone)
    return found


def error(given, ranks):
    return sum(curve.error(ranks[path]) for path, curve in given.items())


def every_plan(given):
    """All plans: which blocks stay, the width and the number of heads of those."""
    widths, heads = [*range(TILE, WIDTH, TILE), None], [1, 2, 3, None]
    for left in itertools.product([True, False], repeat=BLOCKS):
        for width, count in itertools.product(widths, heads):
            rank = {"mlp": width, "attention": count}
            yield {p: rank[p.split("/")[1]] if left[int(p[6])] else 0 for p in given}


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5])
def test_no_plan_of_that_shape_is_much_better(keep):
    """With every number of removed blocks the best ranks; the order of removal is a heuristic."""
    for seed in range(4):
        given = curves(seed)
        budget = keep * sum(curve.size.dense for curve in given.values())
        ranks, gap = allocate(given, keep, "stock", TILE)
        assert spent(given, ranks) <= budget
        found = [plan for plan in every_plan(given) if spent(given, plan) <= budget]
        best = min(error(given, plan) for plan in found if any(r != 0 for r in plan.values()))
        assert error(given, ranks) <= 1.1 * best
        assert 0 <= gap <= 1


def test_ranks_are_the_same_in_all_blocks_and_heads_need_no_tile():
    ranks, _ = allocate(curves(0, removal=False), 0.6, "stock", TILE)
    for name in ("mlp", "attention"):
        assert len({rank for path, rank in ranks.items() if path.endswith(name)}) == 1
    assert ranks["layer_0/mlp"] is None or ranks["layer_0/mlp"] % TILE == 0
    assert all(rank != 0 for rank in ranks.values())


def test_a_block_goes_as_a_whole_where_that_costs_nothing():
    given = curves(0)
    free = {
        path: dataclasses.replace(curve, removal=0.0 if "layer_2" in path else 100.0)
        for path, curve in given.items()
    }
    ranks, _ = allocate(free, 0.75, "stock", TILE)
    assert ranks == {path: 0 if "layer_2" in path else None for path in given}


def test_a_width_finer_than_the_tiles_of_wide_sites():
    """One width holds for all blocks: coarse steps would leave a part of the budget unspent."""
    size = SiteSize(8192 * 10, 10, tiles=4)
    given = {"layer_0/mlp": Curve(size, np.linspace(1, 0, 8193))}
    ranks, _ = allocate(given, 0.71, "stock", 64)
    assert ranks == {"layer_0/mlp": 5760}  # 0.71 · 8192 = 5816


@pytest.mark.parametrize("keep", [0.05, 0.01])
def test_a_budget_below_the_smallest_model_is_an_error(keep):
    with pytest.raises(ValueError, match=f"keep {keep}: .*a larger keep or a smaller multiple"):
        allocate(curves(1, removal=False), keep, "stock", TILE)
    one = {path: curve for path, curve in curves(1).items() if "layer_0" in path}
    with pytest.raises(ValueError, match="smaller multiple"):
        allocate(one, keep, "stock", TILE)  # the last block cannot go


def test_blocks_of_different_sizes_have_no_stock_shape():
    given = curves(0)
    given["layer_1/mlp"] = Curve(SiteSize(300, 30), np.zeros(11))
    with pytest.raises(ValueError, match="sizes differ between blocks at mlp"):
        allocate(given, 0.8, "stock", TILE)
