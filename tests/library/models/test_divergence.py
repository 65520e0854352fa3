"""The divergence from a teacher's most likely tokens, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.models import ModelConfig, init
from lordjax.models.divergence import divergences, losses_and_divergences, top_predictions
from lordjax.models.objective import logits_of, losses

CONFIG = ModelConfig(
    vocab_size=37,
    hidden_size=16,
    mlp_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_size=8,
    max_positions=16,
    tie_embeddings=True,
)
RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(4 * RNG.normal(size=(2, 7, 16)), jnp.float32) for _ in range(2))
TARGETS = jnp.asarray(RNG.integers(-1, 37, (2, 7)), jnp.int32)


@pytest.fixture(scope="module")
def params():
    found = init(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda a: 3 * a, found)  # so that some tokens are unlikely


def truncated(params, top):
    table = top_predictions(CONFIG, params, Y, top=top)
    return losses_and_divergences(CONFIG, params, X, TARGETS, *table)


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("top", [1, 5, 36, 37])
def test_the_gradient_is_that_of_the_distribution_with_a_rest(params, top):
    ours, theirs = (softmax(logits_of(CONFIG, params, z)) for z in (X, Y))
    ids, logs = top_predictions(CONFIG, params, Y, top=top)
    is_top = np.zeros(ours.shape, bool)
    np.put_along_axis(is_top, np.asarray(ids), True, -1)
    rests = [np.where(is_top, 0, p).sum(-1, keepdims=True) for p in (ours, theirs)]
    np.testing.assert_allclose(np.exp(logs[..., -1:]), rests[1], rtol=1e-4, atol=1e-12)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(is_top, theirs * np.log(theirs / ours), 0).sum(-1)
        terms += np.nan_to_num(rests[1] * np.log(rests[1] / rests[0]))[..., 0]
        by_logits = ours - np.where(is_top, theirs, np.nan_to_num(ours * rests[1] / rests[0]))
    has_target = np.asarray(TARGETS) >= 0
    _, found = truncated(params, top)
    np.testing.assert_allclose(found, np.where(has_target, terms, 0), rtol=1e-4, atol=1e-5)
    _, back = jax.vjp(lambda x: logits_of(CONFIG, params, x), X)
    (expected,) = back(jnp.asarray(by_logits * has_target[..., None], jnp.float32))
    given = (TARGETS, ids, logs)
    gradient = jax.grad(lambda x: losses_and_divergences(CONFIG, params, x, *given)[1].sum())(X)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)


def test_a_part_of_the_vocabulary_is_a_lower_bound(params):
    whole = divergences(CONFIG, params, params, X, Y, TARGETS)
    nll, every = truncated(params, CONFIG.vocab_size)
    np.testing.assert_allclose(every, whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(nll, losses(CONFIG, params, X, TARGETS), rtol=1e-5)
    bounds = [truncated(params, top)[1] for top in (1, 4, 16, 36)]
    for less, more in zip(bounds, [*bounds[1:], whole], strict=True):
        assert (less <= more + 1e-5).all()
    assert bounds[0].sum() < 0.9 * whole.sum()
