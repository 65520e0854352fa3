"""Perplexity equals a plain computation, and skips nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.compression.measured.variants import compare
from lordjax.data.token_windows import fingerprint
from lordjax.evaluate import perplexity
from lordjax.evaluate.perplexity import _token_nll
from lordjax.kernels.low_rank import LowRank
from lordjax.models.config import ModelConfig
from lordjax.models.source import InMemory
from lordjax.models.transformer import Transformer, init
from lordjax.runtime.progress import Clock

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=16,
    mlp_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    max_positions=512,
)


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, jax.random.key(0))


def random_tokens(windows, length, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, CONFIG.vocab_size, (windows, length)).astype(np.int32)


def plain_nll(config, params, tokens):
    """Returns Σ nll in float64 from all logits at once."""
    logits = Transformer(config).apply({"params": params}, jnp.asarray(tokens))
    logits = np.asarray(logits, np.float64)[:, :-1]
    peak = logits.max(-1, keepdims=True)
    log_total = np.log(np.exp(logits - peak).sum(-1, keepdims=True)) + peak
    chosen = np.take_along_axis(logits - log_total, tokens[:, 1:, None].astype(np.int64), -1)
    return -chosen.sum()


# 300 positions are more than one chunk of logits and do not divide into chunks.
@pytest.mark.quick("True-17")
@pytest.mark.parametrize("length", [2, 17, 256, 300])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_plain_computation(length, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = init(config, jax.random.key(1))
    tokens = random_tokens(3, length)
    result = perplexity(config, params, tokens)
    targets = 3 * (length - 1)
    assert result["tokens"] == targets
    expected = plain_nll(config, params, tokens) / targets
    np.testing.assert_allclose(result["nll_per_token"], expected, rtol=1e-5)
    np.testing.assert_allclose(result["perplexity"], np.exp(expected), rtol=1e-4)


def test_uniform_logits_give_the_vocabulary_size(params):
    params = dict(params, head={"kernel": jnp.zeros_like(params["head"]["kernel"])})
    result = perplexity(CONFIG, params, random_tokens(2, 9))
    np.testing.assert_allclose(result["perplexity"], CONFIG.vocab_size, rtol=1e-6)


@pytest.mark.quick("True")
@pytest.mark.parametrize("tied", [False, True])
def test_variants_in_lockstep_have_the_losses_of_whole_models(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = init(config, jax.random.key(1))
    # 300 tokens: three windows a step, and a shorter last step.
    tokens, shares = random_tokens(7, 300), (1.0, 0.5, 0.0)

    def scaled(block, i, j):
        return jax.tree.map(lambda a: a * (shares[j] if i == 1 else 1.0), block)

    source, starts = InMemory(config, params), [0, 1, 1]
    dense, *losses = compare(source, tokens, scaled, starts, Clock(), stage="comparison")
    np.testing.assert_array_equal(losses[0], dense)  # the first variant does not differ
    for j, loss in enumerate(losses):
        whole = params | {f"layer_{i}": scaled(params[f"layer_{i}"], i, j) for i in range(2)}
        expected = perplexity(config, whole, tokens)["nll_per_token"]
        np.testing.assert_allclose(loss.mean(), expected, rtol=1e-6)


def test_a_broken_variant_is_an_error_and_not_the_best():
    params = init(CONFIG, jax.random.key(1))

    def broken(block, i, j):
        return jax.tree.map(lambda a: a * np.nan if j else a, block)

    source, clock = InMemory(CONFIG, params), Clock()
    with pytest.raises(ValueError, match="expected a finite number"):
        compare(source, random_tokens(2, 16), broken, [0, 0], clock, stage="comparison")
    with pytest.raises(ValueError, match="length ≥ 2"):
        compare(source, random_tokens(2, 1), broken, [0], clock, stage="comparison")


def test_windows_are_independent(params):
    tokens = random_tokens(4, 12)
    whole = perplexity(CONFIG, params, tokens)
    parts = [perplexity(CONFIG, params, tokens[i : i + 1]) for i in range(4)]
    mean = np.mean([part["nll_per_token"] for part in parts])
    np.testing.assert_allclose(whole["nll_per_token"], mean, rtol=1e-6)


@pytest.mark.quick("3")
@pytest.mark.parametrize("batch_size", [2, 3, 5, 8])
def test_batch_size_changes_nothing_and_compiles_once(params, batch_size):
    tokens = random_tokens(5, 20 + batch_size)
    one = perplexity(CONFIG, params, tokens)["nll_per_token"]
    before = _token_nll._cache_size()
    seen = []
    result = perplexity(
        CONFIG, params, tokens, batch_size=batch_size, progress=lambda *step: seen.append(step)
    )
    assert _token_nll._cache_size() == before + 1
    np.testing.assert_allclose(result["nll_per_token"], one, rtol=1e-6)
    assert seen[-1] == ("evaluate", 5, 5)
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})


def test_kernels_are_read_like_arrays(params):
    rng = np.random.default_rng(3)
    left = jnp.asarray(rng.normal(size=(16, 5)), jnp.float32)
    right = jnp.asarray(rng.normal(size=(5, 24)), jnp.float32)
    tokens = random_tokens(2, 15)

    def with_kernel(kernel):
        mlp = dict(params["layer_1"]["mlp"], up={"kernel": kernel})
        return dict(params, layer_1=dict(params["layer_1"], mlp=mlp))

    factored = perplexity(CONFIG, with_kernel(LowRank(left, right)), tokens)
    dense = perplexity(CONFIG, with_kernel(left @ right), tokens)
    np.testing.assert_allclose(factored["nll_per_token"], dense["nll_per_token"], rtol=1e-5)
    # Numpy leaves, as a checkpoint gives them.
    host = perplexity(CONFIG, jax.tree.map(np.asarray, with_kernel(left @ right)), tokens)
    assert host == dense


def test_protocol_is_complete(params):
    tokens = random_tokens(3, 11)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    protocol = perplexity(CONFIG, half, tokens, tokenizer_name="tiny", bos=True)["protocol"]
    assert (
        protocol.items()
        >= {
            "tokenizer": "tiny",
            "bos": True,
            "window": 11,
            "stride": 11,
            "windows": 3,
            "token_count": 33,
            "dtype": "bfloat16",
            "tokens_sha256": fingerprint(tokens),
        }.items()
    )


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_value_names_the_window(params, bad):
    tokens = random_tokens(5, 8)
    tokens[tokens == 7] = 8
    tokens[3, 4] = 7
    embedding = params["embed"]["embedding"].at[7].set(bad)
    broken = dict(params, embed={"embedding": embedding})
    with pytest.raises(ValueError, match=r"window 3, token \d+.*finite"):
        perplexity(CONFIG, broken, tokens, batch_size=2)


@pytest.mark.parametrize(("bad", "window"), [(61, 1), (-1, 0)])
def test_id_outside_the_vocabulary(params, bad, window):
    tokens = random_tokens(2, 8)
    tokens[window, 3] = bad
    with pytest.raises(ValueError, match=rf"{bad} at window {window}, position 3.*0 to 60"):
        perplexity(CONFIG, params, tokens)


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)])
def test_tokens_of_wrong_shape(params, shape):
    with pytest.raises(ValueError, match="expected"):
        perplexity(CONFIG, params, np.zeros(shape, np.int32))
