"""The knapsack: optima of small problems, lower bounds, and both solvers."""

import itertools
import time

import numpy as np
import pytest
import scipy.optimize

from lordjax.allocation.knapsack import SOLVERS, choose, choose_exactly
from lordjax.kernels.normal_float import grid

FIXTURE = {  # name -> spectrum, cost per rank (theory/lord_rom §9)
    "A": ([100, 40, 10, 4, 1, 0.5], 2),
    "B": ([30, 20, 15, 12, 9, 6], 4),
    "C": ([50, 5, 1, 0.2, 0.1, 0.05], 3),
}


def fixture_tables():
    costs = [np.arange(7.0) * price for _, price in FIXTURE.values()]
    errors = [np.append(np.cumsum(s[::-1])[::-1], 0.0) for s, _ in FIXTURE.values()]
    return costs, errors


def brute_force(costs, errors, budget):
    best = np.inf
    for index in itertools.product(*(range(len(c)) for c in costs)):
        if sum(c[i] for c, i in zip(costs, index, strict=True)) <= budget:
            best = min(best, sum(e[i] for e, i in zip(errors, index, strict=True)))
    return best


def assert_certified(choices, costs, errors, budget, optimum):
    """The choice fits the budget, its error is the reported one, and the bound is a lower bound."""
    spent = sum(c[i] for c, i in zip(costs, choices.index, strict=True))
    error = sum(e[i] for e, i in zip(errors, choices.index, strict=True))
    slack = 1e-9 * (1 + abs(optimum))
    assert spent <= budget
    assert abs(choices.error - error) <= slack
    assert choices.bound <= optimum + slack
    assert optimum <= choices.error + slack
    assert 0 <= choices.gap <= 1
    assert choices.error * (1 - choices.gap) <= optimum + slack


def test_fixture_optimum_and_certificate():
    costs, errors = fixture_tables()
    optimum = brute_force(costs, errors, 24)
    assert optimum == pytest.approx(33.85)
    choices = choose(costs, errors, 24)
    assert_certified(choices, costs, errors, 24, optimum)
    # Better than stopping at the first misfit (38.85), no worse than skipping misfits (34.85).
    assert choices.error <= 34.85 + 1e-9


@pytest.mark.parametrize("budget", range(0, 55, 3))
def test_fixture_at_every_budget(budget):
    costs, errors = fixture_tables()
    optimum = brute_force(costs, errors, budget)
    assert_certified(choose(costs, errors, budget), costs, errors, budget, optimum)


def milp_optimum(costs, errors, budget):
    """The same problem as an integer program with one 0/1 variable per candidate."""
    groups = np.repeat(np.arange(len(costs)), [len(c) for c in costs])
    one_each = (groups[None] == np.arange(len(costs))[:, None]).astype(float)
    solution = scipy.optimize.milp(
        np.concatenate(errors),
        integrality=1,
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(np.concatenate(costs)[None], -np.inf, budget),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert solution.success, solution.message
    return solution.fun


@pytest.mark.parametrize("seed", range(12))
def test_choose_against_highs(seed):
    rng = np.random.default_rng(seed)
    costs, errors = [], []
    for _ in range(rng.integers(2, 8)):
        n = rng.integers(1, 9)
        costs.append(np.cumsum(rng.integers(1, 20, n)).astype(float))
        # Curves may be convex, but the dense candidate, whose error is zero, is off the curve.
        error = np.sort(rng.exponential(10.0 ** rng.integers(-2, 3), n))[::-1].copy()
        if rng.random() < 0.5:
            error[-1] = 0.0
        errors.append(error)
    least, most = sum(c[0] for c in costs), sum(c[-1] for c in costs)
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        budget = float(np.floor(least + share * (most - least)))
        optimum = milp_optimum(costs, errors, budget)
        assert_certified(choose(costs, errors, budget), costs, errors, budget, optimum)


def test_budget_below_the_cheapest_options():
    costs, errors = [np.array([3.0, 5.0])] * 2, [np.array([1.0, 0.0])] * 2
    assert choose(costs, errors, 6).error == 2.0
    with pytest.raises(ValueError, match=r"budget 5 .* least possible size 6"):
        choose(costs, errors, 5)


every_solver = pytest.mark.parametrize("solver", SOLVERS)


def tables(seed, matrices=4, options=6):
    """Rising sizes and mostly falling errors, like those of formats; some are beaten in both."""
    rng = np.random.default_rng(seed)
    sizes = [
        np.sort(rng.uniform(2, 8.6, options)) * 100 * rng.integers(1, 4) for _ in range(matrices)
    ]
    errors = [
        np.exp(-s / 100) * rng.lognormal(0, 0.7, options) * 10 ** rng.uniform(-3, 3) for s in sizes
    ]
    return sizes, errors


def between(costs, share):
    least, most = (sum(f(c) for c in costs) for f in (min, max))
    return least + share * (most - least)


@every_solver
@pytest.mark.parametrize("seed", range(5))
def test_solvers_against_brute_force(solver, seed):
    costs, errors = tables(seed)
    for share in (0.0, 0.1, 0.35, 0.6, 0.9, 1.0):
        budget = between(costs, share)
        optimum = brute_force(costs, errors, budget)
        choices = SOLVERS[solver](costs, errors, budget)
        assert_certified(choices, costs, errors, budget, optimum)
        if solver == "milp":
            assert choices.error <= optimum * (1 + 2e-4)


@every_solver
def test_a_larger_budget_is_never_worse(solver):
    costs, errors = tables(7, matrices=12)
    found = [
        SOLVERS[solver](costs, errors, between(costs, share)) for share in np.linspace(0, 1, 15)
    ]
    # Up to the gap: HiGHS stops within 1e-4, and the multiplier picks from the convex hull.
    for small, large in itertools.pairwise(found):
        assert large.bound <= small.error * (1 + 1e-9)
        assert large.error <= small.error * (1 + 2e-4)


@every_solver
def test_ample_budget_takes_the_least_errors(solver):
    costs, errors = tables(8)
    for factor in (1, 3):
        choices = SOLVERS[solver](costs, errors, factor * sum(c.max() for c in costs))
        assert list(choices.index) == [int(np.argmin(e)) for e in errors]
        assert choices.gap == 0
    # Dense has no error, so nothing scales the problem.
    dense = [np.append(e[:-1], 0.0) for e in errors]
    choices = SOLVERS[solver](costs, dense, sum(c.max() for c in costs))
    assert choices.error == 0 and set(choices.index) == {5}


@every_solver
def test_solvers_refuse_a_budget_below_the_least(solver):
    costs, errors = [np.array([3.0, 5.0])] * 2, [np.array([1.0, 0.0])] * 2
    assert SOLVERS[solver](costs, errors, 6).error == 2.0
    with pytest.raises(ValueError, match=r"budget 5 .* least possible size 6"):
        SOLVERS[solver](costs, errors, 5)


@every_solver
def test_the_uniform_choice_is_not_better(solver):
    """Equal matrices, and a budget that one candidate for all meets exactly."""
    costs, errors = tables(9, matrices=1)
    costs, errors = costs * 10, [np.sort(errors[0])[::-1]] * 10
    for k in range(6):
        choices = SOLVERS[solver](costs, errors, 10 * costs[0][k])
        assert choices.error <= 10 * errors[0][k] * (1 + 1e-4)


@every_solver
def test_options_that_others_beat_do_not_matter(solver):
    costs, errors = tables(10)
    for share in (0.2, 0.5):
        budget = between(costs, share)
        expected = SOLVERS[solver](costs, errors, budget)
        worse_costs, worse_errors = [], []
        for c, e in zip(costs, errors, strict=True):
            # One is as large as the second with more error; one is the largest and the worst.
            worse_costs.append(np.concatenate([c[:2], c[1:2], c[2:], c[-1:] + 1]))
            worse_errors.append(np.concatenate([e[:2], e[1:2] * 2, e[2:], [e.max()]]))
        found = SOLVERS[solver](worse_costs, worse_errors, budget)
        assert found.error == pytest.approx(expected.error, rel=2e-4)
        for c, e, i in zip(worse_costs, worse_errors, found.index, strict=True):
            assert not np.any((c < c[i]) & (e < e[i]))


@every_solver
@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_the_unit_of_errors_does_not_matter(solver, scale):
    costs, errors = tables(11)
    budget = between(costs, 0.4)
    expected = SOLVERS[solver](costs, errors, budget)
    found = SOLVERS[solver](costs, [scale * e for e in errors], budget)
    np.testing.assert_array_equal(found.index, expected.index)
    assert found.error == pytest.approx(scale * expected.error)
    assert found.bound == pytest.approx(scale * expected.bound)


@every_solver
def test_a_matrix_that_matters_more_gets_more(solver):
    costs, errors = tables(12, matrices=8)
    errors = [np.sort(e)[::-1] for e in errors]
    budget, spent = between(costs, 0.3), []
    for weight in (1, 30, 1000):
        weighed = [errors[0] * weight, *errors[1:]]
        spent.append(costs[0][SOLVERS[solver](costs, weighed, budget).index[0]])
    assert spent == sorted(spent)
    assert spent[0] < spent[-1]


def test_published_grid_is_solved_fast():
    """30 blocks of 7 matrices, 432 formats each: certified to 0.2 % by bisection and by HiGHS."""
    rng, width, hidden = np.random.default_rng(0), 576, 1536
    counts = [width**2, width**2 // 3, width**2 // 3, width**2] + [width * hidden] * 3
    forms = grid()
    # Relative errors of Gaussian data by bits (theory/lq_lora §1.7), and a share for the scales.
    gaussian = {2: 0.3168, 3: 0.0406, 4: 0.00846, 8: 2.9e-5}
    relative = np.array(
        [gaussian[f.bits] * (f.block / 64) ** 0.25 * (1 + 0.3 / 4**f.scale_bits) for f in forms]
    )
    costs, errors = [], []
    for count in counts * 30:
        costs.append(np.array([f.nbytes(count) for f in forms], float))
        noise = rng.lognormal(0, 0.02, len(forms))
        errors.append(count * rng.lognormal(0, 1.0) * relative * noise)
    budget = 2.75 * sum(counts) * 30 / 8
    start = time.perf_counter()
    choices = choose(costs, errors, budget)
    assert time.perf_counter() - start < 10
    assert choices.gap <= 2e-3
    assert sum(c[i] for c, i in zip(costs, choices.index, strict=True)) <= budget
    exact = choose_exactly(costs, errors, budget, gap=1e-3)
    assert exact.gap <= 1e-3 + 1e-9
    assert exact.error <= choices.error
