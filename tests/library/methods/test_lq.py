"""Quantized weights plus a low-rank term: closed forms, the best iterate, guarantees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lordjax import factorize
from lordjax.kernels import normal_float, trees
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized
from lordjax.methods import linalg
from lordjax.methods.linalg import orthonormal_rows
from lordjax.methods.quantized.best_product import (
    FIRST_POWERS,
    OVERSAMPLING,
    best_product,
    start_basis,
)
from lordjax.methods.quantized.error_feedback import make_feedback
from lordjax.methods.quantized.lq import _decompose, decompose, decompose_all
from lordjax.methods.quantized.predicted_loss import predict
from lordjax.methods.quantized.weightings import Weights, make_weights
from lordjax.models import ModelConfig, init

SHAPE = (48, 40)
WIDTH = 8
FORM = normal_float.Format(3, 8, "float32", 16, 16)
best = jax.jit(best_product, static_argnames=("width", "powers", "sort"))


def matrix(seed=0, shape=SHAPE):
    """Returns a matrix with slowly decreasing singular values, like a quantization residual."""
    return jax.random.normal(jax.random.key(seed), shape)


def moment(seed=1, n=SHAPE[0], tokens=200):
    """Returns the second moment of correlated inputs of different size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, n)) @ rng.normal(size=(n, n)) * np.exp(rng.normal(size=n))
    return jnp.asarray(x.T @ x / tokens, jnp.float32)


def positive(n, seed):
    return jnp.asarray(np.exp(np.random.default_rng(seed).normal(size=n)), jnp.float32)


def fisher_weights(fisher):
    return make_weights(None, {"fisher": fisher})


def product(target, rank, weights, width=WIDTH):
    """Returns the best low-rank term: as a matrix, and as its factors."""
    start = start_basis(target.shape, width)
    found = best(target, jnp.asarray(rank), weights, start, width=width, powers=FIRST_POWERS)
    return np.asarray(found.left @ found.right, np.float64), found


@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
def test_orthonormal_rows_span_the_rows_in_their_order(condition):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 12)))[0] for n in (12, 200))
    rows = (left * np.geomspace(1, 1 / condition, 12)) @ right.T
    found = np.asarray(orthonormal_rows(jnp.asarray(rows, jnp.float32)), np.float64)
    np.testing.assert_allclose(found @ found.T, np.eye(12), atol=1e-4)
    first = np.linalg.qr(rows.T)[0]
    for k in (1, 6, 12):  # rounding is as large as what the condition leaves of a direction
        outside = rows[:k] - rows[:k] @ found[:k].T @ found[:k]
        assert np.linalg.norm(outside) < 1e-5
    assert condition > 1 or np.linalg.norm(first @ first.T - found.T @ found) < 1e-5


def test_rows_that_depend_on_others_or_are_zero_stay_finite():
    rows = jax.random.normal(jax.random.key(0), (3, 50))
    rows = jnp.concatenate([rows, rows[:1] + rows[1:2], jnp.zeros((1, 50))])
    found = orthonormal_rows(rows)
    np.testing.assert_allclose(found[:3] @ found[:3].T, np.eye(3), atol=1e-5)
    assert np.isfinite(found).all()
    assert not found[4].any()


@pytest.mark.full
def test_hundreds_of_almost_parallel_rows_stay_finite():
    """As products with a matrix of one massive direction are: their Gram matrix is near ones."""
    random, count, size = np.random.default_rng(0), 512, 600
    left = np.linalg.qr(random.normal(size=(count, count)))[0]
    left[:, 0] = 1 / np.sqrt(count)
    right = np.linalg.qr(random.normal(size=(size, count)))[0].T
    values = np.concatenate([[np.sqrt(count)], np.geomspace(0.1, 1e-6, count - 1)])
    rows = jnp.asarray((np.linalg.qr(left)[0] * values) @ right, jnp.float32)
    unit = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    shifted = unit @ unit.T + linalg.ROWS_SHIFT * jnp.eye(count)
    assert not jnp.isfinite(jnp.linalg.cholesky(shifted)).all()  # float32 cannot factor it
    found = np.asarray(orthonormal_rows(rows), np.float64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    # Directions that float32 tells apart are all there.
    kept = right[: 1 + count // 2]
    np.testing.assert_allclose(np.linalg.norm(kept @ found.T, axis=1), 1, atol=0.05)


def tail(a, rank):
    return float(np.sum(np.linalg.svd(np.asarray(a, np.float64), compute_uv=False)[rank:] ** 2))


def run(kernel, rank, weights=None, *, form=FORM, steps=5):
    weights = Weights() if weights is None else weights
    return decompose(kernel, jnp.asarray(rank), weights, form=form, width=WIDTH, steps=steps)


def decoded(codes, shape=SHAPE, form=FORM):
    return normal_float.dequantize(codes, form).reshape(shape[::-1]).T


def quantized(kernel, form=FORM):
    return decoded(normal_float.quantize(kernel.T.reshape(-1), form), kernel.shape, form)


def measured(kernel, found, weights, form=FORM):
    """Returns the weighted error of codes and factors, in float64."""
    error = np.asarray(kernel - decoded(found.codes, kernel.shape, form), np.float64)
    error = error - np.asarray(found.left, np.float64) @ np.asarray(found.right, np.float64)
    if weights.elements is not None:
        return float(np.sum(np.asarray(weights.elements, np.float64) * error**2))
    scaled = error * np.asarray(weights.root_outputs(), np.float64).T
    inputs = np.eye(len(error)) if weights.inputs is None else np.asarray(weights.inputs)
    inputs = inputs if inputs.ndim == 2 else np.diag(inputs)
    return float(np.sum(scaled * (inputs.astype(np.float64) @ scaled)))


WEIGHTINGS = {
    "none": Weights,
    "fisher": lambda: fisher_weights(positive(SHAPE, 3)),
    "both": lambda: Weights(moment(), positive(SHAPE[1], 2)),
    "feedback": lambda: Weights(moment(), positive(SHAPE[1], 2), None, make_feedback(moment())),
}
every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS)


# --- the best product (theory/lq_lora §8.2) ------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(("shape", "width"), [(SHAPE, 40), (SHAPE[::-1], 45)])
def test_full_rank_is_the_matrix(shape, width):
    a = matrix(shape=shape)
    same, found = product(a, width, Weights(), width)
    np.testing.assert_allclose(same, a, atol=2e-5)
    # Balanced: both factors have the square roots of the singular values.
    sigma = np.linalg.svd(np.asarray(a), compute_uv=False)
    for gram in (found.left.T @ found.left, found.right @ found.right.T):
        np.testing.assert_allclose(gram[:40, :40], np.diag(sigma), atol=2e-4)
        assert not np.any(gram[40:])


def test_columns_from_the_rank_on_are_zero():
    for rank in (0, 3):
        _, found = product(matrix(), rank, Weights())
        assert found.left.shape == (SHAPE[0], WIDTH)
        assert found.right.shape == (WIDTH, SHAPE[1])
        assert not np.any(found.left[:, rank:]) and not np.any(found.right[rank:])


def test_search_finds_nearly_the_exact_tail():
    a = matrix(shape=(160, 128))  # the subspace is much narrower than the matrix
    assert min(a.shape) / 5 > WIDTH + OVERSAMPLING
    approximation, _ = product(a, WIDTH, Weights())
    left = np.sum((np.asarray(a) - approximation) ** 2)
    assert tail(a, WIDTH) <= left * (1 + 1e-6) <= tail(a, WIDTH) * 1.02
    again, _ = product(a, WIDTH, Weights())
    np.testing.assert_array_equal(again, approximation)


@pytest.mark.full
def test_constant_fisher_is_plain_and_its_scale_does_not_matter():
    a, fisher = matrix(), positive(SHAPE, 5)
    plain, _ = product(a, 5, Weights())
    constant, _ = product(a, 5, fisher_weights(jnp.full(SHAPE, 7.0)))
    np.testing.assert_allclose(constant, plain, atol=1e-4)
    small, _ = product(a, 5, fisher_weights(fisher))
    large, _ = product(a, 5, fisher_weights(fisher * 1024))
    np.testing.assert_allclose(large, small, atol=1e-5)
    assert np.abs(small - plain).max() > 0.1


@pytest.mark.full
def test_rank_one_fisher_attains_the_tail():
    a = matrix()
    fisher = positive(SHAPE[0], 6)[:, None] * positive(SHAPE[1], 7)[None]
    weights, optimum = fisher_weights(fisher), tail(jnp.sqrt(fisher) * a, 5)
    errors = {}
    ones = Weights(elements=fisher)
    rows, columns = ones._replace(inputs=weights.inputs), ones._replace(outputs=weights.outputs)
    for name, own in {"two": weights, "rows": rows, "columns": columns, "none": ones}.items():
        approximation, _ = product(a, 5, own)
        errors[name] = float(np.sum(np.asarray(fisher) * (np.asarray(a) - approximation) ** 2))
    assert np.sqrt(errors["two"]) == pytest.approx(np.sqrt(optimum), rel=5e-3)
    assert errors["two"] < min(errors["rows"], errors["columns"]) < errors["none"]


@pytest.mark.full
def test_weights_of_zero_are_no_trouble():
    fisher = positive(SHAPE, 8).at[3].set(0).at[:, 5].set(0)
    for own in (fisher, jnp.zeros(SHAPE)):
        weights = fisher_weights(own)
        approximation, found = product(matrix(), 5, weights)
        assert np.isfinite(approximation).all()
        found = run(matrix(), 5, weights)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("full", [True, False])
def test_error_under_second_moments_is_the_tail(full):
    """No rank-r matrix does better than the tail of H^½ E √c, singular H included."""
    h = moment() if full else moment(tokens=20)
    a, c, rank = matrix(), positive(SHAPE[1], 9), 4
    approximation, found = product(a, rank, Weights(h, c))
    values, vectors = np.linalg.eigh(np.asarray(h, np.float64))
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    optimum = tail(root @ np.asarray(a) * np.sqrt(np.asarray(c)), rank)
    error = np.asarray(a) - approximation
    left = np.sum(error * np.sqrt(np.asarray(c)) * (np.asarray(h) @ error) * np.sqrt(np.asarray(c)))
    assert left == pytest.approx(optimum, rel=1e-3)
    predicted = found.total - jnp.sum(found.energies[:rank])
    assert float(predicted) == pytest.approx(optimum, rel=2e-3)
    # The error is orthogonal to the product in the metric.
    weighted = approximation.T @ np.asarray(h, np.float64) @ error
    assert np.abs(weighted).max() < 1e-3 * np.abs(approximation.T @ h @ approximation).max()


@pytest.mark.full
def test_special_second_moments():
    # Singular values apart: else directions at the cut swap by a rounding.
    a, d = (
        matrix() * jnp.exp(-0.2 * jnp.arange(SHAPE[1], dtype=jnp.float32))[None],
        positive(SHAPE[0], 10),
    )
    plain, _ = product(a, 4, Weights())
    identity, _ = product(a, 4, Weights(jnp.eye(SHAPE[0])))
    np.testing.assert_allclose(identity, plain, atol=1e-5)
    diagonal, _ = product(a, 4, Weights(jnp.diag(d)))
    vector, _ = product(a, 4, Weights(d))
    np.testing.assert_allclose(diagonal, vector, atol=1e-4)


# --- the alternation (theory/lq_lora §8.3) -------------------------------------------------------


@pytest.mark.quick("fisher")
@every_weighting
def test_the_best_iterate_is_returned(weighting):
    kernel, weights = matrix(), WEIGHTINGS[weighting]()
    found = run(kernel, WIDTH, weights)
    start, _ = product(kernel - quantized(kernel), WIDTH, weights)
    leftover = kernel - quantized(kernel) - jnp.asarray(start, jnp.float32)
    candidates = [*np.asarray(found.history), float(weights.weighted_error(leftover))]
    assert found.history.shape == (5,)
    if weights.feedback is None:
        assert float(found.error) == pytest.approx(min(candidates), rel=1e-3)
    else:  # codes of the best iterate are refined
        assert 0.5 * min(candidates) < float(found.error) < min(candidates)
    assert float(found.error) == pytest.approx(measured(kernel, found, weights), rel=1e-3)
    assert float(found.total) == pytest.approx(float(weights.weighted_error(kernel)), rel=1e-5)


@pytest.mark.quick("none")
@every_weighting
def test_never_worse_than_the_codes_alone(weighting):
    weights = WEIGHTINGS[weighting]()
    for rank in (0, 1, 3, WIDTH):
        for seed in (0, 1):
            kernel = matrix(seed)
            alone = float(weights.weighted_error(kernel - quantized(kernel)))
            assert float(run(kernel, rank, weights).error) <= alone * (1 + 1e-5)


def test_rank_zero_is_plain_quantisation():
    kernel = matrix()
    found = run(kernel, 0)
    np.testing.assert_array_equal(decoded(found.codes), quantized(kernel))
    assert not np.any(found.left) and not np.any(found.right)
    np.testing.assert_allclose(found.history, found.error, rtol=1e-6)


@pytest.mark.full
def test_two_bits_diverge_and_the_best_is_kept():
    """The error of the iterates rises again, so that the last one is not the best."""
    form, kernel = normal_float.Format(2, 8, "float32", 64, 256), matrix(shape=(64, 64))
    found = run(kernel, WIDTH, form=form, steps=20)
    history = np.asarray(found.history)
    assert history.argmin() < len(history) - 1
    assert history[-1] > history.min() * 1.01
    assert float(found.error) <= history.min() < history[0]


def test_planted_product_is_found():
    """A low-rank term of high rank reduces the error far below that of the codes alone."""
    planted = 10 * matrix(1, (SHAPE[0], 4)) @ matrix(2, (4, SHAPE[1]))
    kernel = quantized(matrix()) + planted
    alone = float(jnp.linalg.norm(kernel - quantized(kernel)))
    found = run(kernel, 4)
    assert np.sqrt(measured(kernel, found, Weights())) < 0.05 * alone


@pytest.mark.full
def test_a_search_from_a_sorted_basis_stays_sorted():
    """Orthogonal iteration: the low-rank term of a nearby matrix needs no rotation."""
    target, weights = moment(3) @ matrix(), Weights(moment(), positive(SHAPE[1], 2))
    start = product(target, WIDTH, weights)[1].basis
    fixed = {"width": WIDTH, "powers": 3}
    near = target + 1e-3 * jnp.linalg.norm(target) / 40 * matrix(5)
    lefts = []
    for sort in (True, False):
        found = best(near, jnp.asarray(4), weights, start, sort=sort, **fixed)
        lefts.append(float(weights.weighted_error(near - found.left @ found.right)))
        rest = float(found.total - found.energies[:4].sum())
        assert lefts[-1] == pytest.approx(rest, rel=1e-3)
    assert lefts[1] == pytest.approx(lefts[0], rel=1e-2)


@pytest.mark.full
def test_rank_is_traced():
    kernel = matrix()
    _decompose.clear_cache()
    errors = [float(run(kernel, rank).error) for rank in (2, 5, WIDTH)]
    assert _decompose._cache_size() == 1
    assert errors == sorted(errors, reverse=True)


def test_zero_matrix():
    found = run(jnp.zeros(SHAPE), 3)
    assert not np.any(decoded(found.codes))
    assert not np.any(found.left @ found.right)
    assert float(found.error) == float(found.total) == 0


@pytest.mark.full
@pytest.mark.parametrize("batched", [False, True])
def test_a_stack_is_decomposed_like_its_members(batched, monkeypatch):
    """Kernels run one by one on a CPU, and as a batch elsewhere."""
    kernels = jnp.stack([matrix(0), matrix(1)])
    ranks, c = jnp.array([2, 6]), positive(SHAPE[1], 2)
    weights = [Weights(moment(1), c), Weights(moment(2), c[::-1])]
    if batched:
        monkeypatch.setattr(jax, "default_backend", lambda: "other")
    together = decompose_all(list(kernels), ranks, weights, form=FORM, width=WIDTH, steps=5)
    for kernel, rank, own, each in zip(kernels, ranks, weights, together, strict=True):
        alone = run(kernel, rank, own)
        assert float(each.error) == pytest.approx(float(alone.error), rel=1e-3)
        assert not np.any(each.left[:, rank:])
        if not batched:
            for have, want in zip(jax.tree.leaves(each), jax.tree.leaves(alone), strict=True):
                np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


# --- predictions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["fisher", "both"])
def test_predictions_bound_what_is_reached(weighting):
    kernel, weights = matrix(), WEIGHTINGS[weighting]()
    predicted = np.asarray(predict(kernel, weights, forms=(FORM,), ranks=tuple(range(WIDTH + 1))))[
        0
    ]
    assert predicted.shape == (WIDTH + 1,)
    codes = float(weights.weighted_error(kernel - quantized(kernel)))
    assert predicted[0] == pytest.approx(codes, rel=1e-5)
    assert (np.diff(predicted) < 0).all()
    slack = 1.05 if weighting == "fisher" else 1 + 1e-4  # its shares are approximate
    for rank in (0, 2, WIDTH):
        assert float(run(kernel, rank, weights).error) <= predicted[rank] * slack


def test_predictions_without_codes_are_tails():
    kernel = matrix()
    ranks = tuple(range(min(SHAPE) + 4))  # more than there are
    predicted = np.asarray(predict(kernel, Weights(), forms=(None,), ranks=ranks))[0]
    tails = [tail(kernel, min(rank, min(SHAPE))) for rank in ranks]
    np.testing.assert_allclose(predicted, tails, atol=1e-4 * tails[0])
    nothing = functools.partial(predict, jnp.zeros(SHAPE), Weights(), ranks=ranks)
    for form in (None, FORM):
        np.testing.assert_array_equal(nothing(forms=(form,)), np.zeros((1, len(ranks))))


@pytest.mark.full
def test_predictions_with_feedback_are_near_what_is_reached():
    kernel, ranks = matrix(shape=(192, 160)), (0, 4, 8)
    # Each input close to the one before: the price of most errors is a fifth of their own.
    h = jnp.asarray(0.9 ** np.abs(np.subtract.outer(np.arange(192), np.arange(192))), jnp.float32)
    weights = Weights(h, positive(160, 2), None, make_feedback(h))
    forms = (normal_float.Format(2, 8, "float32", 16, 16), FORM, None)
    coarse, predicted, alone = np.asarray(predict(kernel, weights, forms=forms, ranks=ranks))
    assert (coarse > predicted).all()
    np.testing.assert_allclose(
        alone, np.asarray(predict(kernel, weights, forms=(None,), ranks=ranks))[0], rtol=1e-5
    )
    reached = [float(run(kernel, rank, weights).error) for rank in ranks]
    # More is lost where what codes take over is beyond the end of the levels; descent gains.
    assert 0.85 * predicted[0] < reached[0] < 1.2 * predicted[0]
    assert (reached <= 1.2 * predicted).all()  # alternation is not foreseen, and gains


def as_kernel(kernel, rank):
    """Returns quantized weights and a low-rank term as they are stored in a model."""
    found = run(kernel, rank)
    base = NFQuantized.of(normal_float.pack_codes(found.codes, FORM), kernel.shape, FORM)
    return LowRankPlusQuantized(base, LowRank(found.left[:, :rank], found.right[:rank]))


# --- fine-tuning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_a_product_is_a_lora_adapter_of_any_scale(scale):
    """``x Q + s·x A B`` with ``A B = L R / s`` is what the kernel computes (spec's test 22)."""
    kernel = as_kernel(matrix(), rank=4)
    x = jax.random.normal(jax.random.key(3), (5, SHAPE[0]))
    a, b = (factor / np.sqrt(scale) for factor in (kernel.low_rank.left, kernel.low_rank.right))
    adapted = x @ kernel.base.materialize() + scale * (x @ a) @ b
    np.testing.assert_allclose(kernel.matmul(x), adapted, atol=1e-4)


def test_training_moves_the_product_and_no_code():
    kernel = as_kernel(matrix(), rank=4)
    x = jax.random.normal(jax.random.key(3), (64, SHAPE[0]))
    target = x @ matrix()
    before = jax.device_get(kernel.base)
    optimiser = optax.adam(1e-2)
    state = optimiser.init(kernel.low_rank)

    @jax.jit
    def step(low_rank, state):
        def loss(low_rank):
            return jnp.mean((kernel.replace(low_rank=low_rank).matmul(x) - target) ** 2)

        value, gradient = jax.value_and_grad(loss)(low_rank)
        update, state = optimiser.update(gradient, state)
        return optax.apply_updates(low_rank, update), state, value

    low_rank, losses = kernel.low_rank, []
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic
        for _ in range(30):
            low_rank, state, value = step(low_rank, state)
            losses.append(float(value))
    assert losses[-1] < 0.95 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, kernel.replace(low_rank=low_rank).base, before)


@pytest.mark.full
@pytest.mark.parametrize(
    ("sizes", "layers", "count"),
    [
        (
            {"hidden_size": 4096, "mlp_size": 11008, "num_heads": 32, "num_kv_heads": 32},
            32,
            159907840,
        ),
        (
            {"hidden_size": 8192, "mlp_size": 28672, "num_heads": 64, "num_kv_heads": 8},
            80,
            828375040,
        ),
    ],
)
def test_trainable_weights_of_llama_2(sizes, layers, count):
    """7B and 70B at rank 64, from shapes alone (spec's test 23)."""
    config = ModelConfig(**sizes, vocab_size=32000, num_layers=1, head_size=128, max_positions=4096)

    def products():
        params = init(config, jax.random.key(0))
        return factorize(params["layer_0"], rank=64, where="kernel$")

    flat = trees.flatten(jax.eval_shape(products))
    found = [leaf for leaf in flat.values() if isinstance(leaf, LowRank)]
    assert layers * sum(a.size for a in jax.tree.leaves(found)) == count
