"""Error compensation: the identity of LDLQ, equality with GPTQ, edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.calibration.statistics import SecondMoment
from lordjax.kernels import normal_float
from lordjax.methods.quantized import error_feedback, weightings
from lordjax.methods.quantized.error_feedback import (
    BLOCK,
    CLIP_RATIOS,
    DAMPING,
    best_clip_ratios,
    make_feedback,
    quantize,
)
from lordjax.methods.quantized.weightings import make_weights

FORM = normal_float.Format(3, 8, "float32", 16, 16)
SHAPES = [(48, 40), (BLOCK, 16), (2 * BLOCK + 7, 24)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
codes_of = jax.jit(quantize, static_argnames="form")


def matrix(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def moment(n, seed=1, tokens=200):
    """Returns the second moment of correlated inputs of different size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, n)) @ rng.normal(size=(n, n)) * np.exp(rng.normal(size=n))
    return jnp.asarray(x.T @ x / tokens, jnp.float32)


def damped(h):
    h = np.asarray(h, np.float64)
    return h + DAMPING * np.mean(np.diag(h)) * np.eye(len(h))


def missed(kernel, feedback, form=FORM):
    """Returns the residual of a quantized kernel, ``[in, out]``."""
    found = codes_of(kernel.T, form, feedback)
    values = normal_float.dequantize(found, form).reshape(kernel.shape[::-1]).T
    return np.asarray(kernel, np.float64) - np.asarray(values, np.float64)


def loss(error, h):
    return float(np.sum(error * (np.asarray(h, np.float64) @ error)))


@pytest.mark.full
@every_shape
def test_factors_of_the_second_moment(shape):
    h = moment(shape[0])
    found = make_feedback(h)
    order, upper = np.asarray(found.order), np.asarray(found.upper, np.float64)
    assert sorted(order) == list(range(shape[0]))
    assert (np.diff(np.diag(np.asarray(h))[order]) <= 0).all()
    np.testing.assert_allclose(np.diag(upper), 1, atol=1e-6)
    assert not np.tril(upper, -1).any()
    prices = np.asarray(found.error_weights, np.float64)
    rebuilt = upper * prices[order][None] @ upper.T
    wanted = damped(h)[order][:, order]
    np.testing.assert_allclose(rebuilt, wanted, atol=1e-5 * np.abs(wanted).max())
    # An error costs no more for being made up for.
    assert (prices <= np.diag(damped(h)) * (1 + 1e-4)).all()


@pytest.mark.full
@every_shape
def test_errors_are_rounding_errors_at_their_own_prices(shape):
    """tr(Eᵀ H E) = Σ D_k |z_k - Q_k|²; z_k - Q_k is row k of Uᵀ E."""
    kernel, h = matrix(shape), moment(shape[0])
    feedback = make_feedback(h)
    error = missed(kernel, feedback)
    order = np.asarray(feedback.order)
    rounding = np.asarray(feedback.upper, np.float64).T @ error[order]
    prices = np.asarray(feedback.error_weights, np.float64)[order]
    assert np.sum(prices[:, None] * rounding**2) == pytest.approx(loss(error, damped(h)), rel=1e-4)
    # And each is what rounding one number leaves: half a gap of the levels at most.
    gaps = np.diff(normal_float.levels(FORM.bits)).max() / 2
    scales = np.abs(np.asarray(kernel)).max()
    inside = np.abs(rounding) <= gaps * scales * (1 + 1e-3)
    assert inside.mean() > 0.95  # what is beyond the end of the levels saturates


def gptq(kernel, h, order, scales, form):
    """GPTQ's recursion in float64: Cholesky factor of the inverse, updates of later inputs."""
    rows = np.asarray(kernel, np.float64)[order].copy()
    scales = np.asarray(scales, np.float64)[order]
    inverse = np.linalg.inv(damped(h)[order][:, order])
    upper = np.linalg.cholesky(inverse).T
    table = normal_float.levels(form.bits).astype(np.float64)
    out = np.zeros_like(rows)
    for k in range(len(rows)):
        nearest = np.abs(rows[k][:, None] / scales[k][:, None] - table[None]).argmin(axis=1)
        out[k] = table[nearest] * scales[k]
        rows[k + 1 :] -= np.outer(upper[k, k + 1 :], (rows[k] - out[k]) / upper[k, k])
    back = np.empty_like(out)
    back[order] = out
    return back


@pytest.mark.full
@every_shape
def test_it_is_gptq(shape):
    kernel, h = matrix(shape), moment(shape[0])
    feedback = make_feedback(h)
    found = codes_of(kernel.T, FORM, feedback)
    scales = normal_float.dequantize_scales(found.scales, found.supers, found.offset, FORM)
    scales = np.repeat(np.asarray(scales), FORM.block)[: kernel.size].reshape(shape[::-1]).T
    wanted = gptq(kernel, h, np.asarray(feedback.order), scales, FORM)
    have = np.asarray(kernel, np.float64) - missed(kernel, feedback)
    # A number between two levels may fall to either side; the loss must not notice.
    assert np.isclose(have, wanted, atol=1e-5).mean() > 0.97
    errors = [np.asarray(kernel, np.float64) - values for values in (have, wanted)]
    assert loss(errors[0], damped(h)) == pytest.approx(loss(errors[1], damped(h)), rel=0.05)


@every_shape
def test_independent_inputs_are_rounded_one_by_one(shape):
    kernel = matrix(shape)
    for diagonal in (jnp.ones(shape[0]), jnp.arange(1.0, shape[0] + 1)):
        found = codes_of(kernel.T, FORM, make_feedback(jnp.diag(diagonal)))
        nearest = normal_float.round_to(kernel.T.reshape(-1), found, FORM)
        np.testing.assert_array_equal(found.codes, nearest.codes)


@every_shape
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_less_is_lost(shape, bits):
    kernel, h = matrix(shape), moment(shape[0])
    form = normal_float.Format(bits, 8, "float32", 16, 16)
    fed_back = loss(missed(kernel, make_feedback(h), form), h)
    assert fed_back < 0.8 * loss(missed(kernel, None, form), h)


@every_shape
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_lose_least_at_the_prices(shape, bits):
    """No common clip ratio does better; 2 bits need smaller ratios than 4."""
    kernel, form = matrix(shape), normal_float.Format(bits, 8, "float32", 16, 16)
    feedback = make_feedback(moment(shape[0]))
    flat, prices = kernel.T.reshape(-1), np.tile(feedback.error_weights, shape[1])
    largest = normal_float.block_scales(flat, form.block)

    def at(shares):
        scales = np.repeat(np.asarray(largest * shares), form.block)[: flat.size]
        codes = normal_float.nearest(flat / scales, bits)
        return float(np.sum(prices * (flat - normal_float.lookup(codes, bits) * scales) ** 2))

    shares = np.asarray(best_clip_ratios(kernel.T, form, feedback))
    assert set(shares) <= set(np.float32(CLIP_RATIOS))
    assert at(shares) <= min(at(np.float32(share)) for share in CLIP_RATIOS) * (1 + 1e-5)
    assert at(shares) < 0.95 * at(np.float32(1))
    found = codes_of(kernel.T, form, feedback)
    decoded = normal_float.dequantize_scales(found.scales, found.supers, found.offset, form)
    np.testing.assert_allclose(decoded, largest * shares, rtol=0.05)
    assert found.codes.dtype == jnp.uint8 and found.codes.shape == (kernel.size,)


def test_inputs_that_never_fire_and_kernels_of_zeros():
    shape = SHAPES[0]
    h = moment(shape[0]).at[5].set(0).at[:, 5].set(0)
    assert np.isfinite(missed(matrix(shape), make_feedback(h))).all()
    assert not missed(jnp.zeros(shape), make_feedback(h)).any()


@pytest.mark.quick("48")
@pytest.mark.parametrize("block", [16, 48, 64, 1000])
def test_blocks_may_cross_outputs(block):
    """The block size need not divide the number of inputs."""
    shape, form = (40, 30), normal_float.Format(4, 8, "float32", block, 16)
    kernel, h = matrix(shape), moment(shape[0])
    assert loss(missed(kernel, make_feedback(h), form), h) < loss(missed(kernel, None, form), h)


# --- few tokens -----------------------------------------------------------------------------------


def shrunk_moment(tokens):
    """The second moment that weighs a kernel's errors, for inputs ``[tokens, in]``."""
    stats = {"inputs": SecondMoment.zeros(tokens.shape[1]).update(tokens)}
    return make_weights(None, stats).inputs


def test_correlations_shrink_with_inputs_per_token():
    """They are divided by 1 + λ, λ being proportional to inputs / tokens; energies stay."""
    x = jax.random.normal(jax.random.key(0), (60, 12))
    x = x @ jax.random.normal(jax.random.key(1), (12, 12))
    apart = ~np.eye(12, dtype=bool)
    for tokens in (x, jnp.tile(x, (10, 1))):  # the same moment, of ten times as many tokens
        found, exact = (
            np.asarray(a) for a in (shrunk_moment(tokens), tokens.T @ tokens / len(tokens))
        )
        energies = np.diag(exact) + weightings.DAMPING * np.diag(exact).mean()
        np.testing.assert_allclose(np.diag(found), energies, rtol=1e-4)
        expected = exact[apart] / (1 + weightings.SHRINKAGE * 12 / len(tokens))
        np.testing.assert_allclose(found[apart], expected, rtol=1e-3, atol=1e-4)


def test_shrinkage_of_few_tokens_loses_less_on_others():
    """A few of the tokens have most of the energy, as where gradients weigh them."""
    rng, n = np.random.default_rng(0), 48
    mix = rng.normal(size=(n, n)) * np.exp(0.5 * rng.normal(size=n))
    kernel, lost = matrix((n, 24)), []
    for _ in range(4):
        sizes = np.exp(1.5 * rng.normal(size=(8 * n, 1)))
        tokens = jnp.asarray(sizes * rng.normal(size=(8 * n, n)) @ mix, jnp.float32)
        moments = tokens.T @ tokens / len(tokens), shrunk_moment(tokens)
        lost.append([loss(missed(kernel, make_feedback(h)), mix.T @ mix) for h in moments])
    plain, shrunk = np.mean(lost, axis=0)
    assert shrunk < 0.98 * plain


def test_a_moment_that_float32_cannot_factor_gets_more_damping(monkeypatch):
    """One massive activation in thousands of inputs leaves a matrix that looks singular."""
    monkeypatch.setattr(error_feedback, "DAMPING", 1e-12)
    direction = np.random.default_rng(0).normal(size=(1, 96)).astype(np.float32)
    moment = jnp.asarray(direction.T @ direction)  # of rank 1
    assert not np.isfinite(jnp.linalg.cholesky(moment + 1e-12 * jnp.eye(96))).all()
    found = make_feedback(moment)
    assert all(np.isfinite(a).all() for a in found[:3])
    assert (np.asarray(found.error_weights) > 0).all()
