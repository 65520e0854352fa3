"""Errors by statistics of other tokens are those of truncated kernels on these tokens."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    gradients,
    heads,
    metric,
    mixed,
    mlp_problem,
    moments,
    project,
    qk_problem,
    vo_problem,
)

from lordjax.methods import METHODS, column_selection, lapack, linalg, truncate
from lordjax.methods.modular import mlp_on_host
from lordjax.methods.modular.mlp import RIDGE, mlp, mlp_errors, prune_mlp
from lordjax.methods.modular.query_key import prune_query_key, query_key, query_key_errors
from lordjax.methods.modular.value_output import (
    prune_value_output,
    value_output,
    value_output_errors,
)

pytestmark = pytest.mark.usefixtures("double")

# One method for each setting of `low_rank.errors`.
LINEAR = {str(method.errors.keywords): name for name, method in METHODS.items() if method.errors}


def envelope(errors):
    """Returns the errors at 0 … n, where a smaller width may not do better."""
    return np.maximum.accumulate(np.asarray(errors)[::-1])[::-1]


def tails(spectrum):
    return np.append(np.cumsum(np.asarray(spectrum)[::-1])[::-1], 0)


def quadratic(gap, m=None):
    """Returns the mean squared length of the rows of ``gap`` in a metric."""
    return np.einsum("ti,ij,tj->", gap, np.eye(gap.shape[1]) if m is None else m, gap) / len(gap)


def close(found, expected, rel=1e-7):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=rel, atol=rel * np.abs(expected).max())
    assert (np.diff(found) <= 0).all()


def as_arrays(kernels):
    return {name: jnp.asarray(a) for name, a in kernels.items()}


# --- sums of tails --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 9])
def test_tails_are_sums_over_both_indices(n):
    products = np.random.default_rng(n).normal(size=(n, n))
    exact = [products[k:, k:].sum() for k in range(n + 1)]
    assert exact[-1] == 0
    np.testing.assert_allclose(linalg.tail_errors(jnp.asarray(products)), envelope(exact))


# --- single layers --------------------------------------------------------------------------------

SHAPES = [("input", (9, 6)), ("input", (6, 11)), ("output", (9, 6))]  # 11: with a basis
CASES = [
    pytest.param(name, *case, id=f"{name}-{case[0]}-{case[1][1]}")
    for name, case in itertools.product(LINEAR.values(), SHAPES)
    # Methods with gradients read inputs.
    if case[0] == "input" or "gradients" not in METHODS[name].needs
]


def tokens_of(fan_in, seed):
    """Returns correlated inputs with a mean: other tokens for another seed."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(80, fan_in)) @ rng.normal(size=(fan_in, fan_in)) + rng.normal(
        size=fan_in
    )


def linear_stats(kernel, x, side, seed):
    stats = {side: moments(x if side == "input" else x @ kernel)}
    return stats | {"gradients": gradients(min(kernel.shape), seed)}


def linear_errors(name, kernel, factors, x, stats):
    """Returns the mean squared output error of every rank, in the method's own terms."""
    method = METHODS[name]
    basis = linalg.row_space(jnp.asarray(kernel))
    m = metric(stats["gradients"]) if "gradients" in method.needs else None
    found = []
    for rank in range(min(kernel.shape) + 1):
        new, bias = truncate(factors, rank)
        gap = x @ kernel - x @ np.asarray(new.materialize())
        gap = gap - (0 if bias is None else np.asarray(bias))
        if name == "rom":  # the variance: its bias is fitted elsewhere
            gap = gap - gap.mean(axis=0)
        found.append(quadratic(gap if basis is None else gap @ np.asarray(basis), m))
    return found


@pytest.mark.quick("*-input-11", "lord-affine-output-*")
@pytest.mark.parametrize(("name", "side", "shape"), CASES)
def test_a_layer_is_judged_by_its_output(name, side, shape):
    method, rng = METHODS[name], np.random.default_rng(3)
    kernel = rng.normal(size=shape)
    own, other = (tokens_of(shape[0], seed) for seed in (0, 1))
    stats = [linear_stats(kernel, x, side, seed) for x, seed in ((own, 9), (other, 8))]
    factors = jax.tree.map(np.asarray, method.factor(jnp.asarray(kernel), stats[0]))
    errors = functools.partial(method.errors, jnp.asarray(kernel), factors)
    close(errors(stats[0]), tails(factors.spectrum), 1e-6)
    exact = linear_errors(name, kernel, factors, other, stats[1])
    close(errors(stats[1]), envelope(exact))
    # Factors of these tokens would do better at every rank.
    best = tails(method.factor(jnp.asarray(kernel), stats[1]).spectrum)
    assert (best[1:-1] < np.asarray(errors(stats[1]))[1:-1]).all()


# --- MLPs -----------------------------------------------------------------------------------------


def mlp_stats(z, seed=None):
    return {"moments": moments(z)} | ({} if seed is None else {"gradients": gradients(10, seed)})


def mlp_gaps(z, kernels, factors):
    """Yields the output errors of every width from 1 on."""
    order = np.asarray(factors.parts["order"])
    for width in range(1, len(order) + 1):
        new = prune_mlp(kernels, factors, width)
        yield z @ kernels["down"] - z[:, order[:width]] @ new["down"] - new.get("out_bias", 0)


@pytest.mark.quick("True-True-True-1.0", "False-False-False-0.0")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(("fit", "shrinkage"), [(True, 0.0), (True, 1.0), (False, 0.0)])
def test_an_mlp_is_judged_by_its_output(weighted, intercept, fit, shrinkage):
    z, kernels = mlp_problem()
    other = mlp_problem(seed=1, mean=-0.2)[0]
    options = {"fit": fit, "intercept": intercept}
    seeds = (9, 8) if weighted else (None, None)
    stats = [mlp_stats(x, seed) for x, seed in zip((z, other), seeds, strict=True)]
    factors = mlp(as_arrays(kernels), stats[0], score="elimination", shrinkage=shrinkage, **options)
    errors = functools.partial(mlp_errors, as_arrays(kernels), factors, **options)
    if shrinkage == 0 or not fit:
        close(errors(stats[0]), tails(factors.spectrum), 1e-4)
    m = metric(stats[1]["gradients"]) if weighted else None
    exact = [quadratic(gap, m) for gap in mlp_gaps(other, kernels, factors)]
    close(errors(stats[1])[1:], envelope(exact), 1e-6)


@pytest.mark.quick("False-True-elimination-float32")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("score", mlp_on_host.SCORES)
@pytest.mark.parametrize(("intercept", "weighted"), [(False, True), (True, False)])
def test_an_mlp_is_judged_alike_on_the_host(dtype, score, intercept, weighted, monkeypatch):
    monkeypatch.setattr(lapack, "PANEL", 10)
    z, kernels = mlp_problem()
    other = mlp_problem(seed=1, mean=-0.2)[0]
    own, others = (mlp_stats(x, 9 if weighted else None) for x in (z, other))
    options = {"score": score, "shrinkage": 1.0, "intercept": intercept}
    factors = mlp_on_host.mlp(kernels, dict(own), ridge=RIDGE, dtype=dtype, **options)
    expected = mlp(as_arrays(kernels), own, **options)
    np.testing.assert_array_equal(factors.parts["order"], expected.parts["order"])
    found = mlp_on_host.errors(kernels, factors, dict(others), intercept=intercept)
    wanted = mlp_errors(as_arrays(kernels), expected, others, intercept=intercept)
    close(found, wanted, 1e-4)
    assert others.keys() == mlp_stats(other, 9 if weighted else None).keys()


@pytest.mark.parametrize(("dtype", "rel"), [(np.float32, 1e-4), (np.float64, 1e-11)])
def test_prefixes_are_judged_alike_on_the_host(dtype, rel, monkeypatch):
    """Only the lower triangle of the second moment is read."""
    monkeypatch.setattr(lapack, "PANEL", 7)
    rng = np.random.default_rng(0)
    z, weighted = rng.normal(size=(60, 24)) + 0.3, rng.normal(size=(24, 5))
    gram, lower = z.T @ z / 60, np.linalg.cholesky(np.cov(rng.normal(size=(24, 99))))
    wanted = column_selection.prefix_errors(*map(jnp.asarray, (lower, gram, weighted)))
    given = np.tril(gram) + np.triu(np.full_like(gram, np.nan), 1)
    arrays = [np.ascontiguousarray(a, dtype) for a in (lower, given, weighted)]
    close(lapack.prefix_errors(*arrays), wanted, rel)


# --- values and outputs ---------------------------------------------------------------------------


@pytest.mark.quick("True-True-2")
@pytest.mark.parametrize("per_group", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_are_judged_by_the_output(per_group, weighted, bias):
    kernels, x, attention = vo_problem(per_group=per_group, length=80, bias=bias)
    _, y, other = vo_problem(per_group=per_group, length=90, seed=4)
    z = [mixed(kernels, *tokens) for tokens in ((x, attention), (y, other))]
    stats = [{"moments": moments(a.reshape(len(a), -1))} for a in z]
    if weighted:
        for own, seed in zip(stats, (9, 8), strict=True):
            own["gradients"] = gradients(16, seed)
    arrays = as_arrays(kernels)
    factors = value_output(arrays, stats[0], fit=True)
    errors = functools.partial(value_output_errors, arrays, factors)
    close(errors(stats[0]), tails(factors.spectrum), 1e-4)
    m = metric(stats[1]["gradients"]) if weighted else None
    whole, exact = np.einsum("shd,hdm->sm", z[1], kernels["o"]), []
    for width in range(1, 7):
        new = prune_value_output(kernels, factors, width)
        narrow = np.einsum("shd,hdm->sm", mixed(new, y, other), new["o"])
        exact.append(quadratic(whole - narrow - new.get("out_bias", 0), m))
    close(errors(stats[1])[1:], envelope(exact), 1e-6)


# --- queries and keys -----------------------------------------------------------------------------


def qk_stats(x, kernels, effects):
    return {
        "queries": heads(project(x, kernels, "q")),
        "keys": heads(project(x, kernels, "k")),
        "gates": heads(effects),
    }


def effects_of(seed):
    return np.random.default_rng(seed).normal(size=(90, 2, 4)) * [1, 5, 2, 3]


@pytest.mark.quick("True-True", "True-False")
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_queries_judged_by_the_tokens_of_their_factors_have_the_errors_of_the_spectrum(
    rotary, bias
):
    x, kernels = qk_problem(rotary=rotary, bias=bias)
    stats = qk_stats(x, kernels, effects_of(0))
    factors = query_key(as_arrays(kernels), stats)
    found = np.asarray(query_key_errors(as_arrays(kernels), factors, stats))
    step = 2 if rotary else 1
    close(found[::step], tails(factors.spectrum)[::step])


def test_rotary_pairs_are_judged_by_their_effects_on_the_loss():
    x, kernels = qk_problem()
    own, other = effects_of(0), effects_of(1) + 0.5
    factors = query_key(as_arrays(kernels), qk_stats(x, kernels, own))
    errors = query_key_errors(as_arrays(kernels), factors, qk_stats(x[::-1], kernels, other))
    order, exact = np.asarray(factors.parts["order"]), 0.0
    for group in range(2):
        dropped = [other[:, group, order[group, kept:]].sum(axis=1) for kept in range(5)]
        exact = exact + envelope([np.mean(effect**2) / 2 for effect in dropped])
    close(errors[::2], exact)


@pytest.mark.quick("2")
@pytest.mark.parametrize("per_group", [1, 2])
def test_directions_of_queries_are_judged_by_the_logits(per_group):
    """Their share of the loss is that of the energy of the logits, over all pairs of tokens."""
    x, kernels = qk_problem(rotary=False, per_group=per_group)
    y = np.random.default_rng(5).normal(size=x.shape) + 0.3
    factors = query_key(as_arrays(kernels), qk_stats(x, kernels, effects_of(0)))
    effects = effects_of(1)
    errors = query_key_errors(as_arrays(kernels), factors, qk_stats(y, kernels, effects))

    def logits(kernels, group):
        q, k = (project(y, kernels, name) for name in "qk")
        q = q[:, group * per_group : (group + 1) * per_group]
        return np.einsum("shd,td->hst", q, k[:, group])

    news, exact = [prune_query_key(kernels, factors, width) for width in range(1, 9)], 0.0
    for group in range(2):
        whole = logits(kernels, group)
        lost = [np.sum(whole**2), *(np.sum((whole - logits(n, group)) ** 2) for n in news)]
        worth = np.mean(effects[:, group].sum(axis=1) ** 2) / 2
        exact = exact + envelope(lost) / envelope(lost)[0] * worth
    close(errors, exact, 1e-6)
