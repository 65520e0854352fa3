"""Column selection on the host: same results as `column_selection`, in the memory of one matrix."""

import dataclasses
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import source

from lordjax.calibration.statistics import Moments, SecondMoment
from lordjax.compression import site_factors
from lordjax.compression.low_rank import prepare
from lordjax.methods import METHODS, column_selection, lapack
from lordjax.methods.linalg import mean_unit, own_unit
from lordjax.methods.modular import mlp_on_host
from lordjax.methods.modular.mlp import RIDGE, mlp


@pytest.fixture
def double():
    """Enables float64, for comparisons with JAX."""
    with jax.enable_x64(True):
        yield


def problem(n, m=12, seed=0):
    """Returns hidden states with a zero column and two interchangeable ones, and a kernel."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(2 * n, n)) @ (np.eye(n) + rng.normal(size=(n, n)) / np.sqrt(n)) + 0.3
    z[:, 2], z[:, 5] = 0, z[:, 3]
    return z, rng.normal(size=(n, m))


@pytest.mark.quick("7-float32")
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [7, 64, 150])
def test_the_same_columns_are_eliminated_in_the_same_order(n, dtype, monkeypatch):
    """Also when the remaining columns are compacted."""
    monkeypatch.setattr(lapack, "PENDING", 32)
    monkeypatch.setattr(lapack, "PANEL", 48)
    z, kernel = problem(n)
    gram = z.T @ z / len(z)
    expected = column_selection.elimination_order(jnp.asarray(gram), jnp.asarray(kernel))
    found = lapack.elimination_order(gram, kernel.astype(dtype))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("double")
def test_leverage_and_refits_are_the_same(monkeypatch):
    monkeypatch.setattr(lapack, "PANEL", 48)
    z, kernel = problem(150)
    gram = z.T @ z / len(z)
    expected = column_selection.leverage_complement(jnp.asarray(gram), RIDGE)
    np.testing.assert_allclose(lapack.leverage_complement(gram.copy(), RIDGE), expected, rtol=1e-8)
    expected = column_selection.nested_refit(jnp.asarray(gram), jnp.asarray(kernel))
    found = lapack.nested_refit(gram, np.asfortranarray(kernel))
    for have, want in zip(found, expected, strict=True):
        assert have.dtype == np.float32
        np.testing.assert_allclose(have, want, atol=1e-6 * np.abs(want).max())


def test_a_factor_tries_harder_until_it_works_and_gives_up_on_what_is_broken(monkeypatch):
    """`cholesky` equals `linalg.jittered`, and reads only the lower triangle."""
    monkeypatch.setattr(lapack, "PANEL", 5)
    rng = np.random.default_rng(0)
    pairs = ((0.5, 1e-6), (-3e-4, 1e-3))
    cases = [(unit, *pair) for unit in (mean_unit, own_unit) for pair in pairs]
    for unit, lowest, share in cases:
        q = np.linalg.qr(rng.normal(size=(12, 12)))[0]
        a = (q * np.r_[np.ones(11), lowest]) @ q.T
        shifted = a + share * np.diag(unit(np.diag(a)) * np.ones(12))
        found = np.tril(a) + np.triu(np.full((12, 12), np.nan), 1)
        lapack.cholesky(found, 1e-6, unit(np.diag(a)))
        lower = np.tril(found)
        np.testing.assert_allclose(lower @ lower.T, shifted, atol=1e-12)
    for at in ((3, 3), (7, 2)):
        broken = np.eye(12)
        broken[at] = np.nan
        lapack.cholesky(broken, 1e-6, 1.0)
        assert np.isnan(broken).all()


@pytest.mark.quick("True-0.5-True-*", "False-0.0-False-*")
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("score", mlp_on_host.SCORES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("intercept", "shrinkage"), [(False, 0.0), (True, 0.0), (True, 0.5)])
def test_an_mlp_is_factored_alike_on_the_host(score, weighted, intercept, shrinkage):
    z, kernel = problem(70)
    if score == "leverage":  # rounding decides which of two equal columns comes first
        kernel[5] = kernel[3]
    stats = {"moments": Moments.zeros(70).update(jnp.asarray(z, jnp.float32))}
    if weighted:
        g = np.random.default_rng(1).normal(size=(9, 12)) * np.arange(12)  # fewer than outputs
        stats["gradients"] = SecondMoment.zeros(12).update(jnp.asarray(g, jnp.float32))
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), stats)
    options = {"score": score, "intercept": intercept, "shrinkage": shrinkage}
    expected = mlp({"down": jnp.asarray(kernel)}, wide, **options)
    given = dict(stats)
    found = mlp_on_host.mlp({"down": kernel}, given, ridge=RIDGE, **options)
    assert not given
    orders = [np.asarray(parts["order"]) for parts in (found.parts, expected.parts)]
    if score == "leverage":
        orders = [np.where(order == 5, 3, order) for order in orders]
    np.testing.assert_array_equal(*orders)
    np.testing.assert_allclose(found.spectrum, expected.spectrum, rtol=1e-4)
    assert found.parts.keys() == expected.parts.keys()
    for name in ("lower", "right", *(["mean"] if intercept else [])):
        want = np.asarray(expected.parts[name])
        np.testing.assert_allclose(found.parts[name], want, atol=1e-5 * np.abs(want).max())


def test_broken_statistics_give_factors_that_are_not_finite():
    z, kernel = problem(40)
    z[3, 4] = np.nan
    for score in mlp_on_host.SCORES:
        stats = {"moments": Moments.zeros(40).update(jnp.asarray(z, jnp.float32))}
        found = mlp_on_host.mlp({"down": kernel}, stats, score=score, ridge=RIDGE)
        assert not np.isfinite(found.parts["lower"]).all()


def test_no_tokens_are_not_finite():
    stats = {"moments": Moments.zeros(8)}
    kernel = np.ones((8, 3), np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = mlp_on_host.mlp({"down": kernel}, stats, score="elimination", ridge=RIDGE)
    assert not np.isfinite(found.parts["lower"]).all()


@pytest.mark.parametrize("score", mlp_on_host.SCORES)
def test_an_mlp_is_factored_in_the_memory_of_one_gram(score):
    """Peak memory is the float64 Gram matrix and, while it is rounded, the result."""
    n, m = 1200, 100
    rng = np.random.default_rng(0)
    moments = Moments.zeros(n).update(jnp.asarray(rng.normal(size=(2 * n, n)), jnp.float32))
    kernel = rng.normal(size=(n, m)).astype(np.float32)
    tracemalloc.start()
    found = mlp_on_host.mlp({"down": kernel}, {"moments": moments}, score=score, ridge=RIDGE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    gram, kept = 8 * n**2, sum(a.nbytes for a in found.parts.values())
    panels = 8 * n * (lapack.PANEL + 2 * lapack.PENDING)
    assert peak < gram + kept + 2 * 8 * n * m + panels


def test_an_mlp_is_judged_in_the_memory_of_one_gram(monkeypatch):
    """The errors take one float32 matrix, because a solve with a triangle overwrites it."""
    monkeypatch.setattr(lapack, "PANEL", 64)
    n, m = 1200, 100
    rng = np.random.default_rng(0)
    moments = Moments.zeros(n).update(jnp.asarray(rng.normal(size=(2 * n, n)), jnp.float32))
    kernel = rng.normal(size=(n, m)).astype(np.float32)
    options = {"score": "leverage", "ridge": RIDGE, "dtype": np.float32}
    factors = mlp_on_host.mlp({"down": kernel}, {"moments": moments}, **options)
    tracemalloc.start()
    mlp_on_host.errors({"down": kernel}, factors, {"moments": moments})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * n**2 + 2 * 4 * n * m + 4 * 8 * n * lapack.PANEL


@pytest.mark.full
def test_sums_are_gone_before_a_factor_is_taken(monkeypatch):
    """The widest statistics of a block, of both folds, are freed before its MLP is refit."""
    name = "modegpt-published"
    module, sums, alive = METHODS[name].modules["mlp"], [], []

    def host(kernels, stats, **options):
        sums.append(weakref.ref(stats["moments"].scatter))
        return module.host(kernels, stats, **options)

    refit = lapack.nested_refit

    def watched(*args):
        alive.append(sum(array() is not None for array in sums))
        return refit(*args)

    modules = {**METHODS[name].modules, "mlp": dataclasses.replace(module, host=host)}
    monkeypatch.setitem(
        site_factors.METHODS, name, dataclasses.replace(METHODS[name], modules=modules)
    )
    monkeypatch.setattr(lapack, "nested_refit", watched)
    model = source("gpt2")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (4, 16))
    prepare(model, tokens, method=name)
    # With two folds each is factored, too, and judges the other one.
    assert alive[2::3] == [0] * model.config.num_layers
    assert len(alive) == 3 * model.config.num_layers
