"""Every method on every shape of block that a family has: compress, save, load, evaluate."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax import InMemory, load, nbytes, save, trees
from lordjax.compression import prepare
from lordjax.evaluate import perplexity
from lordjax.kernels import weights
from lordjax.methods import METHODS
from lordjax.models import ModelConfig, Rope, Transformer, init
from lordjax.quantization import prepare_quantized
from lordjax.quantizer import FORMATS, QUANTIZERS

GPT2 = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    mlp_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_size=8,
    max_positions=48,
    norm="layer",
    activation="gelu_new",
    gated=False,
    rope=None,
    position_rows=48,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
)
ENCODER = dataclasses.replace(
    GPT2,
    block="post_norm",
    activation="gelu",
    causal=False,
    embed_norm=True,
    final_norm=False,
    token_types=2,
    head="masked",
    head_bias=True,
)
# One of each shape of block: the families beside a name are built like it.
BLOCKS = {
    "gpt2": GPT2,
    "gpt_bigcode": dataclasses.replace(GPT2, num_kv_heads=1),
    "opt": dataclasses.replace(
        GPT2, activation="relu", position_rows=50, position_offset=2, mlp_bias=False
    ),
    "codegen": dataclasses.replace(
        GPT2,
        block="parallel",
        rope=Rope(size=4),
        position_rows=None,
        qkv_bias=False,
        out_bias=False,
        tie_embeddings=False,
        head_bias=True,
    ),
    "starcoder2": dataclasses.replace(
        GPT2, num_kv_heads=2, rope=Rope(), position_rows=None, windows=(None, 9)
    ),
    "gpt_neox": dataclasses.replace(
        GPT2,
        block="parallel_norms",
        activation="gelu",
        rope=Rope(size=4),
        position_rows=None,
        tie_embeddings=False,
    ),
    "gemma2": dataclasses.replace(
        GPT2,
        block="sandwich",
        num_kv_heads=2,
        norm="rms",
        gated=True,
        rope=Rope(),
        local_rope=Rope(50.0),
        position_rows=None,
        windows=(9, None),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        embedding_scale=5.5,
        attention_scale=0.2,
        attention_softcap=3.0,
        final_softcap=4.0,
    ),
    "qwen3": dataclasses.replace(
        GPT2,
        num_kv_heads=2,
        norm="rms",
        activation="silu",
        gated=True,
        rope=Rope(),
        position_rows=None,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=True,
    ),
    "opt-350m": dataclasses.replace(
        GPT2, block="post_norm", activation="relu", final_norm=False, embed_size=20
    ),
    "roberta": dataclasses.replace(ENCODER, position_rows=50, position_offset=2),
    "bert-classifier": dataclasses.replace(
        ENCODER, head="classes", num_classes=3, tie_embeddings=False
    ),
}
BLOCKS["gemma3"] = dataclasses.replace(
    BLOCKS["gemma2"], qk_norm=True, attention_softcap=None, final_softcap=None
)
TOKENS = np.random.default_rng(0).integers(0, GPT2.vocab_size, (10, 24), np.int32)
MASK_TOKEN = 60
HF_CONFIG = {"model_type": "gpt2"}


def source(name):
    """A random model whose norms and biases are not at their initial 1 and 0."""
    flat = trees.flatten(init(BLOCKS[name], jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(flat))
    noise = {
        path: leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for key, (path, leaf) in zip(keys, flat.items(), strict=True)
    }
    return InMemory(BLOCKS[name], trees.unflatten(noise))


def linear_weights(params):
    """What `keep` is a share of."""
    flat = trees.flatten(params)
    return sum(
        weights(leaf)
        for path, leaf in flat.items()
        if path.startswith("layer_") and path.endswith("kernel")
    )


def measure(config, params):
    """Of a language model its perplexity, of a classifier how sure it is."""
    if config.head == "classes":
        logits = Transformer(config).apply({"params": params}, TOKENS)
        assert logits.shape == (len(TOKENS), config.num_classes)
        return float(jnp.max(jax.nn.softmax(logits), axis=-1).sum())
    return perplexity(config, params, TOKENS, mask_token=MASK_TOKEN)["perplexity"]


def check(result, original, directory):
    """A result that is smaller, finite, of the size reported, and the same when loaded."""
    assert nbytes(result.params) < nbytes(original.params)
    assert result.report["bytes"] == nbytes(result.params)
    measured = measure(result.config, result.params)
    assert np.isfinite(measured)
    save(directory, result.config, result.params, hf_config=HF_CONFIG, plan=result.plan)
    config, params = load(directory)
    assert config == result.config
    assert measure(config, params) == measured


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("method", METHODS)
def test_compression(method, block, tmp_path):
    original = source(block)
    prepared = prepare(original, TOKENS, method=method, mask_token=MASK_TOKEN)
    whole = prepared.compress(1.0)
    jax.tree.map(np.testing.assert_array_equal, whole.params, original.params)
    half = prepared.compress(0.5)
    assert half.report["plan"]["kept"] <= 0.5
    kept = linear_weights(half.params) / linear_weights(original.params)
    assert half.report["plan"]["kept"] == pytest.approx(kept)
    check(half, original, tmp_path / "out")


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("method", QUANTIZERS)
def test_quantisation(method, block, tmp_path):
    original = source(block)
    rank = None if QUANTIZERS[method].rank is None else 4
    options = {"rank": rank, "steps": 2, "formats": FORMATS[4:9:2], "mask_token": MASK_TOKEN}
    prepared = prepare_quantized(original, TOKENS, method=method, **options)
    result = prepared.compress(bits=5)
    assert set(result.plan.ranks) == {
        path
        for path in trees.flatten(original.params)
        if path.startswith("layer_") and path.endswith("kernel")
    }
    check(result, original, tmp_path / "out")


@pytest.mark.parametrize("method", [m for m in METHODS if "qk" in METHODS[m].modules])
def test_heads_that_are_normalised_keep_their_width(method):
    original = source("qwen3")
    prepared = prepare(original, TOKENS[:4, :8], method=method)
    new = prepared.compress(0.5).params
    for layer, name in itertools.product(("layer_0", "layer_1"), "qk"):
        before, after = (tree[layer]["attention"][name] for tree in (original.params, new))
        np.testing.assert_array_equal(after["kernel"], before["kernel"])
    with pytest.raises(ValueError, match="layers that this method leaves as they are"):
        prepared.compress(0.1)


@pytest.mark.parametrize("block", ["opt", "roberta"])
def test_padding_does_not_count(block):
    """Learned positions count tokens, not places; statistics see no padding."""
    original = source(block)
    padded = np.concatenate([np.zeros_like(TOKENS[:, :7]), TOKENS], axis=1)
    mask = np.concatenate([np.zeros((10, 7), bool), np.ones_like(TOKENS, bool)], axis=1)
    options = {"method": "svd-llm", "mask_token": MASK_TOKEN}
    plain = prepare(original, TOKENS, **options).compress(0.5)
    other = prepare(original, padded, mask=mask, **options).compress(0.5)
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(jnp.abs(a), jnp.abs(b), atol=2e-3)
