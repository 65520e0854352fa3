"""The contract of every error weighting: degenerate statistics give finite errors and matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.calibration.statistics import MeanSquare, SecondMoment
from lordjax.compression.quantized_matrix import matrix_weights
from lordjax.kernels import normal_float
from lordjax.methods.quantized.lq import decompose
from lordjax.methods.quantized.predicted_loss import predict
from lordjax.methods.quantized.weightings import MOMENTS, WEIGHTINGS

SHAPE, TOKENS, RANK = (32, 24), 100, 3
FORM = normal_float.Format(3, 4, "bfloat16", 32, 256)
WAYS = [(name, feedback) for name in WEIGHTINGS for feedback in sorted({False, name in MOMENTS})]


def statistics(x, g):
    """Every statistic that a weighting needs, of inputs and gradients of one layer."""
    x, g = jnp.asarray(x, jnp.float32), jnp.asarray(g, jnp.float32)
    return {
        "fisher": jnp.square(x).T @ jnp.square(g),
        "inputs": SecondMoment.zeros(SHAPE[0]).update(x),
        "weighted_inputs": SecondMoment.zeros(SHAPE[0]).update(x, jnp.sum(g**2, axis=1)),
        "weighted_squares": MeanSquare.zeros(SHAPE[1]).update(g, jnp.sum(x**2, axis=1)),
    }


def cases():
    """What is wrong -> a kernel and the statistics."""
    rng = np.random.default_rng(2)
    kernel, x = rng.normal(size=SHAPE), rng.normal(size=(TOKENS, SHAPE[0])) + 0.5
    g = 1e-4 * rng.normal(size=(TOKENS, SHAPE[1]))
    dead_in, dead_out = np.arange(SHAPE[0]) % 3 == 0, np.arange(SHAPE[1]) % 3 == 0
    return {
        "nothing is wrong": (kernel, statistics(x, g)),
        "a kernel of zeros": (0 * kernel, statistics(x, g)),
        "no gradients": (kernel, statistics(x, 0 * g)),  # behind it is a matrix of zeros
        "inputs of zeros": (kernel, statistics(0 * x, g)),
        "nothing at all": (0 * kernel, statistics(0 * x, 0 * g)),
        "dead inputs and outputs": (
            kernel,
            statistics(np.where(dead_in, 0, x), np.where(dead_out, 0, g)),
        ),
        "a constant input": (kernel, statistics(np.where(dead_in, 3.0, x), g)),
        "one token": (kernel, statistics(np.repeat(x[:1], TOKENS, 0), np.repeat(g[:1], TOKENS, 0))),
        "equal rows": (np.repeat(kernel[:1], SHAPE[0], 0), statistics(x, g)),
    }


def weights_of(what, weighting, feedback):
    kernel, stats = cases()[what]
    kernel = jnp.asarray(kernel, jnp.float32)
    own = {name: stats[name] for name in WEIGHTINGS[weighting]}
    return kernel, matrix_weights(kernel, own, feedback=feedback)


@pytest.mark.quick("both-True-*")
@pytest.mark.parametrize("what", cases())
@pytest.mark.parametrize(("weighting", "feedback"), WAYS)
def test_predictions_and_decompositions_are_finite(what, weighting, feedback):
    kernel, weights = weights_of(what, weighting, feedback)
    errors = np.asarray(predict(kernel, weights, forms=(FORM, None), ranks=(0, RANK)))
    assert np.isfinite(errors).all() and (errors >= 0).all()
    found = decompose(kernel, jnp.asarray(RANK), weights, form=FORM, width=RANK, steps=2)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(found))
    assert found.error <= found.total * (1 + 1e-5)


@pytest.mark.quick("both-True")
@pytest.mark.parametrize(("weighting", "feedback"), WAYS)
def test_a_matrix_without_effect_costs_little_and_is_approximated(weighting, feedback):
    """Other matrices come first; its bits are still spent on its weights."""
    how = {"forms": (FORM,), "ranks": (0,)}
    alive, inert = (
        float(predict(*weights_of(what, weighting, feedback), **how)[0, 0])
        for what in ("nothing is wrong", "no gradients")
    )
    if weighting in ("fisher", "both"):
        assert 0 < inert < 1e-6 * alive
    kernel, weights = weights_of("no gradients", weighting, feedback)
    found = decompose(kernel, jnp.asarray(RANK), weights, form=FORM, width=RANK, steps=2)
    quantized = normal_float.dequantize(found.codes, FORM).reshape(SHAPE[::-1]).T
    lost = jnp.sum((kernel - quantized - found.left @ found.right) ** 2) / jnp.sum(kernel**2)
    assert lost < 0.05
