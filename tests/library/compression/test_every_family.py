"""Every method compresses every family's kind of block; the result is saved, loaded, evaluated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BLOCKS, GPT2, source

from lordjax import load, nbytes, save
from lordjax.allocation.candidates import FORMATS, QUANTIZERS
from lordjax.compression.low_rank import prepare
from lordjax.compression.quantized import prepare_quantized
from lordjax.evaluate import perplexity
from lordjax.kernels import trees
from lordjax.kernels.kinds import weights
from lordjax.methods import METHODS
from lordjax.models import Transformer

TOKENS = np.random.default_rng(0).integers(0, GPT2.vocab_size, (10, 24), np.int32)
MASK_TOKEN = 60
HF_CONFIG = {"model_type": "gpt2"}


def linear_weights(params):
    """The number of weights that `keep` is a fraction of."""
    flat = trees.flatten(params)
    return sum(
        weights(leaf)
        for path, leaf in flat.items()
        if path.startswith("layer_") and path.endswith("kernel")
    )


def measure(config, params):
    """The perplexity of a language model, or the confidence of a classifier."""
    if config.num_classes is not None:
        logits = Transformer(config).apply({"params": params}, TOKENS)
        assert logits.shape == (
            (len(TOKENS), config.num_classes)
            if config.head == "classes"
            else (*TOKENS.shape, config.num_classes)
        )
        return float(jnp.max(jax.nn.softmax(logits), axis=-1).sum())
    return perplexity(config, params, TOKENS, mask_token=MASK_TOKEN)["perplexity"]


def check(result, original, directory):
    """The result is smaller, finite, of the reported size, and the same when loaded."""
    assert nbytes(result.params) < nbytes(original.params)
    assert result.report["bytes"] == nbytes(result.params)
    measured = measure(result.config, result.params)
    assert np.isfinite(measured)
    save(directory, result.config, result.params, hf_config=HF_CONFIG, plan=result.plan)
    config, params = load(directory)
    assert config == result.config
    assert measure(config, params) == measured


def pairs(methods, often):
    """Every method with one kind of block, every kind with ``often``; all other pairs are slow."""
    for method, block in itertools.product(methods, BLOCKS):
        quick = method in often or block == "gpt2"
        yield pytest.param(method, block, marks=[] if quick else pytest.mark.slow)


@pytest.mark.quick("modegpt-gpt2", "modegpt-gemma2", "modegpt-opt-350m")
@pytest.mark.parametrize(("method", "block"), list(pairs(METHODS, ["modegpt"])))
def test_compression(method, block, tmp_path):
    original = source(block)
    prepared = prepare(original, TOKENS, method=method, mask_token=MASK_TOKEN)
    whole = prepared.compress(1.0)
    jax.tree.map(np.testing.assert_array_equal, whole.params, original.params)
    keep = 0.75 if METHODS[method].kinds == {"mlp"} else 0.5  # attention is half of the weights
    small = prepared.compress(keep)
    assert small.report["plan"]["kept"] <= keep
    kept = linear_weights(small.params) / linear_weights(original.params)
    assert small.report["plan"]["kept"] == pytest.approx(kept)
    check(small, original, tmp_path / "out")


@pytest.mark.full
@pytest.mark.parametrize(("method", "block"), list(pairs(QUANTIZERS, ["nf"])))
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


@pytest.mark.quick("modegpt-slice")
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


@pytest.mark.full
@pytest.mark.parametrize("block", ["opt", "roberta"])
def test_padding_does_not_count(block):
    """Learned positions count tokens, not array positions; statistics ignore padding."""
    original = source(block)
    padded = np.concatenate([np.zeros_like(TOKENS[:, :7]), TOKENS], axis=1)
    mask = np.concatenate([np.zeros((10, 7), bool), np.ones_like(TOKENS, bool)], axis=1)
    options = {"method": "svd-llm", "mask_token": MASK_TOKEN}
    plain = prepare(original, TOKENS, **options).compress(0.5)
    other = prepare(original, padded, mask=mask, **options).compress(0.5)
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(jnp.abs(a), jnp.abs(b), atol=2e-3)
