"""Statistics do not depend on how tokens are split into batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from references import (
    REFERENCES,
    ROWS,
    WIDTH,
    assert_close,
    data,
    products,
    reference,
)

from lordjax.calibration.statistics import (
    STATISTICS,
    HeadMoments,
    Influence,
    MeanSquare,
    Moments,
    SecondMoment,
    merged,
)

# float32 sums of a few dozen terms: errors relative to the whole matrix.
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}

VECTORS = {kind: STATISTICS[kind] for kind in REFERENCES}  # statistics of single vectors

every_kind = pytest.mark.parametrize("kind", REFERENCES)


def folded(kind, pieces, dtype=jnp.float32, weights=None):
    stat = STATISTICS[kind].zeros(pieces[0].shape[-1], dtype)
    weights = [None] * len(pieces) if weights is None else weights
    for x, w in zip(pieces, weights, strict=True):
        stat = stat.update(jnp.asarray(x, dtype), None if w is None else jnp.asarray(w))
    return stat


# --- the sums ------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 7, ROWS])
def test_any_batch_size_equals_numpy(kind, dtype, size):
    with jax.enable_x64(dtype == "float64"):
        x = data().astype(dtype)
        stat = folded(kind, [x[i : i + size] for i in range(0, ROWS, size)], dtype)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(stat))
        assert_close(stat, REFERENCES[kind](x), TOLERANCE[dtype])


@pytest.mark.full
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, ROWS - 1), max_size=6, unique=True))
def test_any_split_and_order_of_merging_is_the_same(cuts):
    with jax.enable_x64(True):
        x = data(1)
        parts = [folded("moments", [p], jnp.float64) for p in np.split(x, sorted(cuts))]
        expected = reference(x)
        assert_close(functools.reduce(Moments.merge, parts), expected, 1e-10)
        assert_close(functools.reduce(Moments.merge, parts[::-1]), expected, 1e-10)


def test_merging_nothing_changes_nothing():
    stat, nothing = folded("moments", [data()]), Moments.zeros(WIDTH)
    for both in (stat.merge(nothing), nothing.merge(stat)):
        assert_close(both, stat, 1e-7)
    both = nothing.merge(Moments.zeros(WIDTH))
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(both))


def test_moments_of_the_definition():
    x = data(2).astype(np.float32)
    stat = folded("moments", [x])
    np.testing.assert_allclose(stat.covariance(), np.cov(x.T, bias=True), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stat.second_moment(), x.T @ x / ROWS, rtol=1e-4, atol=1e-5)
    for matrix in (stat.covariance(), stat.second_moment()):
        np.testing.assert_array_equal(matrix, matrix.T)
    absolute = folded("abs_mean", [x]).mean()
    np.testing.assert_allclose(absolute, np.abs(x).mean(0), rtol=1e-5)


def test_leading_axes_are_tokens():
    x = data().reshape(3, 4, 5, WIDTH)
    for kind in REFERENCES:
        assert_close(folded(kind, [x]), REFERENCES[kind](x.reshape(-1, WIDTH)), 1e-6)


def test_a_large_mean_does_not_swallow_the_covariance():
    rng = np.random.default_rng(3)
    x = (1e4 + rng.normal(size=(1000, WIDTH))).astype(np.float32)
    expected = reference(x).scatter / len(x)
    stat = folded("moments", np.split(x, 20))
    mean = x.mean(0, dtype=np.float32)
    naive = x.T @ x / np.float32(len(x)) - np.outer(mean, mean)  # E[xxᵀ] - mmᵀ in the same float32
    ours = np.linalg.norm(stat.covariance() - expected)
    assert ours < 1e-2 * np.linalg.norm(expected)
    assert ours < 0.1 * np.linalg.norm(naive - expected)


# --- masks and weights ---------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("garbage", [1e30, np.inf, np.nan])
def test_masked_rows_change_nothing_whatever_they_hold(kind, garbage):
    x = data().astype(np.float32)
    mask = np.arange(ROWS) % 3 != 0
    dirty = np.where(mask[:, None], x, np.float32(garbage))
    stat = folded(kind, np.split(dirty, 4), weights=np.split(mask, 4))
    assert_close(stat, REFERENCES[kind](x[mask]), 1e-6)


@every_kind
def test_a_batch_that_is_all_padding_changes_nothing(kind):
    x = data()
    stat = folded(kind, [x, np.full((4, WIDTH), np.nan)], weights=[None, np.zeros(4, bool)])
    assert_close(stat, REFERENCES[kind](x), 1e-6)
    first = folded(kind, [np.full((4, WIDTH), np.nan), x], weights=[np.zeros(4, bool), None])
    assert_close(first, REFERENCES[kind](x), 1e-6)


@every_kind
def test_weights_are_repetitions(kind):
    x = data(4).astype(np.float32)
    times = np.random.default_rng(5).integers(0, 4, ROWS)
    stat = folded(kind, np.split(x, 3), weights=np.split(times.astype(np.float32), 3))
    assert_close(stat, REFERENCES[kind](np.repeat(x, times, axis=0)), 1e-6)
    share = np.random.default_rng(6).uniform(size=ROWS).astype(np.float32)
    assert_close(folded(kind, [x], weights=[share]), REFERENCES[kind](x, share), 1e-6)


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_products_ask_for_full_precision(weighted):
    # float32 products are TF32 on GPU and bfloat16 on TPU unless they ask for more.
    x, weights = jnp.ones((4, WIDTH)), jnp.ones(4) if weighted else None
    with jax.default_matmul_precision("default"):
        jaxpr = jax.make_jaxpr(lambda s: s.update(x, weights))(Moments.zeros(WIDTH))
    found = list(products(jaxpr.jaxpr))
    assert found
    for equation in found:
        precision = equation.params["precision"]
        assert precision == (jax.lax.Precision.HIGHEST,) * 2, equation


def test_gram_of_many_tokens_in_float32():
    x = data(7, 8192, 32).astype(np.float32)
    stat = folded("moments", np.split(x, 8))
    gram = x.T.astype(np.float64) @ x.astype(np.float64) / len(x)
    error = np.linalg.norm(np.asarray(stat.second_moment(), np.float64) - gram)
    assert error < 1e-6 * np.linalg.norm(gram)


def test_bfloat16_activations_are_widened_before_they_are_multiplied():
    x = jnp.asarray(data(), jnp.bfloat16)
    for kind, statistic in VECTORS.items():
        stat = statistic.zeros(WIDTH).update(x)
        assert_close(stat, REFERENCES[kind](np.asarray(x, np.float64)), 1e-6)


# --- devices -------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("devices", [2, 4])
def test_sharded_tokens_give_the_same(kind, devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(data().reshape(devices, -1, WIDTH), jnp.float32)
    mask = jnp.asarray(np.arange(ROWS).reshape(devices, -1) % 4 != 0)
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    @jax.jit
    def step(stat, x, mask):
        return stat.update(x, mask)

    stat = step(
        STATISTICS[kind].zeros(WIDTH), jax.device_put(x, sharding), jax.device_put(mask, sharding)
    )
    rows, kept = np.asarray(x).reshape(-1, WIDTH), np.asarray(mask).reshape(-1)
    assert_close(stat, REFERENCES[kind](rows[kept]), 1e-6)


def test_moments_of_devices_add_up_by_psum():
    """Counts add up, and so do scatters about the common mean."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x = data().astype(np.float32)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec()
    )
    def everywhere(x):
        local = Moments.zeros(WIDTH).update(x)
        count = jax.lax.psum(local.count, "data")
        mean = jax.lax.psum(local.count * local.mean, "data") / count
        about = local.mean - mean
        scatter = local.scatter + local.count * jnp.outer(about, about)
        return Moments(count, mean, jax.lax.psum(scatter, "data"))

    assert_close(jax.jit(everywhere)(x), reference(x), 1e-6)


# --- heads and blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_head_moments_are_the_diagonal_blocks(masked):
    x = data(width=12)
    w = np.arange(len(x)) % 3 > 0 if masked else np.ones(len(x), bool)
    stat = HeadMoments.zeros((3, 4))
    for part, weights in zip(np.split(x, 4), np.split(w, 4), strict=True):
        stat = stat.update(jnp.asarray(part, jnp.float32), jnp.asarray(weights))
    whole = (x[w].T @ x[w] / w.sum()).reshape(3, 4, 3, 4)
    for head in range(3):
        np.testing.assert_allclose(stat.second_moment()[head], whole[head, :, head], rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_mean_square_is_the_diagonal_of_the_second_moment(weighted):
    x = data()
    w = np.random.default_rng(1).exponential(size=len(x)) * (np.arange(len(x)) % 3 > 0)
    x[w == 0] = np.nan if weighted else x[w == 0]  # padding may hold anything
    square, moment = MeanSquare.zeros(WIDTH), SecondMoment.zeros(WIDTH)
    for part, weights in zip(np.split(x, 4), np.split(w, 4), strict=True):
        weights = jnp.asarray(weights, jnp.float32) if weighted else None
        square, moment = (
            s.update(jnp.asarray(part, jnp.float32), weights) for s in (square, moment)
        )
    np.testing.assert_allclose(square.mean(), jnp.diagonal(moment.second_moment()), rtol=1e-5)
    np.testing.assert_allclose(square.count, w.sum() if weighted else len(x), rtol=1e-6)


def test_influence_is_one_minus_the_mean_cosine():
    x = jnp.asarray(data(), jnp.float32)
    zeros = Influence.zeros()
    assert float(zeros.update((x, x)).mean()) == pytest.approx(0, abs=1e-6)
    assert float(zeros.update((x, -2 * x)).mean()) == pytest.approx(2, abs=1e-6)
    half = jnp.arange(len(x)) % 2 == 0
    mixed = jnp.where(half[:, None], x, -x)
    assert float(zeros.update((x, mixed)).mean()) == pytest.approx(1, abs=1e-6)
    assert float(zeros.update((x, mixed), half).mean()) == pytest.approx(0, abs=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("size", [1, 7, ROWS])
def test_heads_and_influence_do_not_depend_on_batches_or_order(size):
    with jax.enable_x64(True):
        x, y = (jnp.asarray(data(seed, width=12)) for seed in (0, 1))

        def fold(order, size):
            heads = HeadMoments.zeros((3, 4), jnp.float64)
            influence = Influence.zeros(dtype=jnp.float64)
            for start in range(0, ROWS, size):
                rows = order[start : start + size]
                heads, influence = heads.update(x[rows]), influence.update((x[rows], y[rows]))
            return heads, influence

        expected = fold(np.arange(ROWS), ROWS)
        for order in (np.arange(ROWS), np.random.default_rng(1).permutation(ROWS)):
            assert_close(fold(order, size), expected, 1e-10)


@pytest.mark.parametrize("devices", [2, 4])
def test_sharded_heads_and_influence(devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    shape = (devices, -1, 12)
    pair = [jnp.asarray(data(s, width=12).reshape(shape), jnp.float32) for s in (0, 1)]

    def fold(x, y):
        return HeadMoments.zeros((3, 4)).update(x), Influence.zeros().update((x, y))

    there = jax.jit(fold)(*(jax.device_put(a, sharding) for a in pair))
    assert_close(there, fold(*pair), 1e-6)


# --- folds ----------------------------------------------------------------------------------------


def every_statistic(x, y, mask):
    """Returns a tree of every kind of statistic, and of plain sums."""
    found = {kind: folded(kind, [x], jnp.float64, [mask]) for kind in REFERENCES}
    found["heads"] = HeadMoments.zeros((1, WIDTH), jnp.float64).update(x, mask)
    found["squares"] = {"mean": MeanSquare.zeros(WIDTH, jnp.float64).update(x, mask)}
    found["influence"] = Influence.zeros(dtype=jnp.float64).update((x, y), mask)
    return found | {"sum": jnp.sum(x * mask[:, None].astype(x.dtype), axis=0), "nothing": {}}


@pytest.mark.parametrize("cuts", [(), (1,), (20, 41), (0,)])
def test_folds_together_are_the_whole(cuts):
    """Also if the means of the folds differ, and if a fold has no token."""
    with jax.enable_x64(True):
        x, y = (jnp.asarray(data(seed)) for seed in (0, 1))
        x, mask = x.at[30:].add(5.0), jnp.arange(ROWS) % 4 > 0
        folds = [
            every_statistic(*part)
            for part in zip(*(np.split(a, cuts) for a in (x, y, mask)), strict=True)
        ]
        assert_close(merged(folds), every_statistic(x, y, mask), 1e-10)
        assert jax.tree.structure(merged(folds)) == jax.tree.structure(folds[0])
