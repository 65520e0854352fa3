"""Objectives: masking is reproducible, and losses and gradients equal those of the whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax import InMemory
from lordjax.calibration.backward_pass import gradient_statistics
from lordjax.calibration.calibration_set import Calibration
from lordjax.compression.low_rank import prepare
from lordjax.compression.measured.variants import compare
from lordjax.compression.quantized import prepare_quantized
from lordjax.evaluate import perplexity
from lordjax.kernels import trees
from lordjax.methods import METHODS
from lordjax.models import ModelConfig, Transformer, init, objective
from lordjax.models.sites import LINEAR_SITES
from lordjax.runtime.progress import Clock

MASKED = ModelConfig(
    vocab_size=61,
    hidden_size=16,
    mlp_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_size=4,
    max_positions=400,
    block="post_norm",
    norm="layer",
    gated=False,
    causal=False,
    final_norm=False,
    embed_norm=True,
    token_types=2,
    rope=None,
    position_rows=400,
    head="masked",
    head_bias=True,
    tie_embeddings=True,
)
CLASSES = dataclasses.replace(MASKED, head="classes", num_classes=3, tie_embeddings=False)
TOKEN_CLASSES = dataclasses.replace(CLASSES, head="tokens")
SPAN = dataclasses.replace(CLASSES, head="span", num_classes=2)
DECODER = dataclasses.replace(CLASSES, causal=True, head_bias=False)
BARE = dataclasses.replace(MASKED, head="none")
MASK_TOKEN = 60
TOKENS = np.random.default_rng(0).integers(0, 60, (9, 40), np.int32)


def random_params(config):
    """Random parameters: embeddings so large that losses depend on the input; nonzero heads."""
    flat = trees.flatten(init(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(flat))
    noise = {
        path: leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for key, (path, leaf) in zip(keys, flat.items(), strict=True)
    }
    return trees.unflatten(noise)


@pytest.mark.parametrize("length", [2, 3, 40, 512])
def test_a_fixed_share_of_every_window_is_masked(length):
    tokens = np.random.default_rng(1).integers(0, 60, (50, length), np.int32)
    chosen = objective.masked_positions(tokens, None)
    np.testing.assert_array_equal(chosen.sum(1), max(1, round(0.15 * length)))
    assert (chosen.mean(0) < 0.8).all()  # every place is masked sometimes
    assert (chosen.sum(0) > 0).mean() > 0.8


def test_a_window_is_masked_alike_wherever_it_is():
    mask = np.arange(40) < np.random.default_rng(2).integers(5, 41, (9, 1))
    chosen = objective.masked_positions(TOKENS, mask)
    assert not chosen[~mask].any()
    for i, kept in enumerate(mask.sum(1)):
        alone = objective.masked_positions(TOKENS[i : i + 1, :kept], None)[0]
        np.testing.assert_array_equal(chosen[i, :kept], alone)
    order = np.random.default_rng(3).permutation(9)
    np.testing.assert_array_equal(
        objective.masked_positions(TOKENS[order], mask[order]), chosen[order]
    )


def test_inputs_and_targets_share_out_the_window():
    mask = np.arange(40) >= np.arange(0, 36, 4)[:, None]
    read = objective.inputs(MASKED, TOKENS, mask, MASK_TOKEN)
    goals = objective.targets(MASKED, TOKENS, mask)
    masked = read == MASK_TOKEN
    np.testing.assert_array_equal(goals[masked], TOKENS[masked])
    np.testing.assert_array_equal(read[~masked], TOKENS[~masked])
    assert (goals[~masked] == -1).all()
    assert masked.any(1).all()


def test_targets_of_a_decoder_are_the_next_tokens():
    config = dataclasses.replace(MASKED, head="causal")
    assert objective.inputs(config, TOKENS, None, None) is TOKENS
    mask = np.arange(40) < 30
    goals = objective.targets(config, TOKENS, np.broadcast_to(mask, TOKENS.shape))
    np.testing.assert_array_equal(goals[:, :29], TOKENS[:, 1:30])
    assert (goals[:, 29:] == -1).all()


def whole_loss(config, params, tokens, mask):
    """The summed loss, from the logits of the whole model."""
    if config.head == "tokens":
        logits = Transformer(config).apply({"params": params}, tokens, mask)
        own = jnp.max(jax.nn.log_softmax(logits), axis=-1)
        return -jnp.sum(own if mask is None else jnp.where(mask, own, 0))
    if config.head == "span":
        logits = Transformer(config).apply({"params": params}, tokens, mask)
        logits = logits if mask is None else logits[:, : int(mask.sum())]
        return -jnp.sum(jnp.max(jax.nn.log_softmax(logits, axis=1), axis=1))
    if config.head == "classes":
        logits = Transformer(config).apply({"params": params}, tokens, mask)
        return -jnp.sum(jnp.max(jax.nn.log_softmax(logits), axis=-1))
    chosen = objective.masked_positions(tokens, mask)
    read = jnp.where(chosen, MASK_TOKEN, tokens)
    logits = Transformer(config).apply({"params": params}, read, mask)
    at_tokens = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(chosen, at_tokens, 0))


@pytest.mark.full
@pytest.mark.parametrize(
    "config",
    [MASKED, CLASSES, TOKEN_CLASSES, SPAN, DECODER],
    ids=["masked", "classes", "tokens", "span", "decoder"],
)
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_the_whole_model(config, padded):
    params, tokens = random_params(config), TOKENS[:1]
    mask = np.arange(40)[None] < 33 if padded else None
    expected = jax.grad(whole_loss, argnums=1)(config, params, tokens, mask)
    method = dataclasses.replace(METHODS["svd"], needs=("row_fisher",))
    calibration = Calibration(tokens, mask, 1, MASK_TOKEN)
    stats = gradient_statistics(InMemory(config, params), calibration, method, Clock())
    for i in range(config.num_layers):
        flat = trees.flatten(expected[f"layer_{i}"])
        for site in LINEAR_SITES:
            if site.path not in flat:
                continue
            rows = np.sum(np.square(flat[site.path]), axis=1)
            assert rows.max() > 0
            np.testing.assert_allclose(
                stats[i][0]["row_fisher"][site.path], rows, rtol=1e-3, atol=1e-5 * rows.max()
            )


@pytest.mark.parametrize("config", [TOKEN_CLASSES, SPAN], ids=["tokens", "span"])
def test_decisions_are_the_targets_of_least_loss(config):
    params, x = random_params(config), jax.random.normal(jax.random.key(5), (3, 7, 16))
    chosen = objective.decisions(config, params, x)
    assert chosen.shape == ((3, 7) if config is TOKEN_CLASSES else (3, 2))
    own = objective.losses(config, params, x, jnp.full(chosen.shape, objective.NO_TARGET))
    np.testing.assert_array_equal(objective.losses(config, params, x, chosen), own)
    for other in range(2):
        given = jnp.full(chosen.shape, other)
        assert (objective.losses(config, params, x, given) >= own).all()


@pytest.mark.quick("17")
@pytest.mark.parametrize("length", [17, 300])  # 300: more than one chunk of logits
def test_pseudo_perplexity_is_that_of_a_plain_computation(length):
    params = random_params(MASKED)
    tokens = np.random.default_rng(4).integers(0, 60, (3, length), np.int32)
    result = perplexity(MASKED, params, tokens, mask_token=MASK_TOKEN)
    count = 3 * max(1, round(0.15 * length))
    assert result["tokens"] == count
    expected = whole_loss(MASKED, params, tokens, None) / count
    np.testing.assert_allclose(result["nll_per_token"], expected, rtol=1e-5)
    assert result["protocol"]["masked_share"] == 0.15
    assert result["protocol"]["mask_token"] == MASK_TOKEN
    small = perplexity(MASKED, params, tokens.astype(np.uint8), mask_token=MASK_TOKEN)
    assert small["nll_per_token"] == result["nll_per_token"]


@pytest.mark.full
@pytest.mark.parametrize("config", [MASKED, CLASSES], ids=["masked", "classes"])
def test_variants_are_judged_by_the_objective(config):
    """A classifier's variants are compared by the original model's class, not by confidence."""
    params, shares = random_params(config), (1.0, 0.5, -1.0)

    def scaled(block, i, j):
        return jax.tree.map(lambda a: a * (shares[j] if i == 1 else 1.0), block)

    source = InMemory(config, params)
    how = {"stage": "comparison", "mask_token": MASK_TOKEN}
    _, *found = compare(source, TOKENS, scaled, [0] * len(shares), Clock(), **how)
    for j, loss in enumerate(found):
        whole = params | {f"layer_{i}": scaled(params[f"layer_{i}"], i, j) for i in range(2)}
        if config is MASKED:
            expected = perplexity(config, whole, TOKENS, mask_token=MASK_TOKEN)["nll_per_token"]
        else:
            says, goal = (Transformer(config).apply({"params": p}, TOKENS) for p in (whole, params))
            chosen = jnp.take_along_axis(
                jax.nn.log_softmax(says), jnp.argmax(goal, axis=-1)[:, None], -1
            )
            expected = -jnp.mean(chosen)
        np.testing.assert_allclose(loss.mean(), expected, rtol=1e-5)


@pytest.mark.parametrize("token", [None, -1, 61])
def test_a_mask_token_is_needed(token):
    source = InMemory(MASKED, random_params(MASKED))
    for function in (
        lambda: prepare(source, TOKENS, method="svd-llm", mask_token=token),
        lambda: prepare_quantized(source, TOKENS, weighting="both", rank=4, mask_token=token),
        lambda: perplexity(MASKED, source.params, TOKENS, mask_token=token),
    ):
        with pytest.raises(ValueError, match=f"mask_token = {token}: .* needed, 0 to 60"):
            function()


@pytest.mark.parametrize("config", [CLASSES, BARE], ids=["classes", "none"])
def test_no_perplexity_without_tokens_to_predict(config):
    with pytest.raises(ValueError, match=f"head '{config.head}' predicts no tokens"):
        perplexity(config, random_params(config), TOKENS)


def test_a_model_that_predicts_nothing_has_no_gradients():
    source = InMemory(BARE, random_params(BARE))
    assert prepare(source, TOKENS, method="svd-llm").compress(0.5).report["plan"]["kept"] <= 0.5
    with pytest.raises(ValueError, match="head 'none' predicts nothing, so it has no loss"):
        prepare(source, TOKENS, method="lord")
    one = dataclasses.replace(CLASSES, num_classes=1)
    with pytest.raises(ValueError, match="one class has nothing to decide"):
        prepare(InMemory(one, random_params(one)), TOKENS, method="lord")
