"""Valid models with matrices of zeros, as depth-expanded ones have (LLaMA-Pro), are compressed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import GPT2, source

from lordjax import InMemory
from lordjax.allocation.candidates import FORMATS, QUANTIZERS
from lordjax.compression.low_rank import prepare
from lordjax.compression.quantized import prepare_quantized
from lordjax.evaluate import perplexity
from lordjax.kernels import trees
from lordjax.methods import METHODS
from lordjax.methods.quantized.weightings import WEIGHTINGS

TOKENS = np.random.default_rng(0).integers(0, GPT2.vocab_size, (6, 16), np.int32)
# What is zero -> parts of the paths of its parameters.
ZEROS = {
    "o": ("layer_1/attention/o/kernel",),
    "down": ("layer_0/mlp/down/kernel",),
    "block": ("layer_1/attention/o", "layer_1/mlp/down"),
    "all-blocks": ("attention/o", "mlp/down"),
    "values": ("layer_0/attention/v",),
    "norms": ("layer_0/attention_norm", "layer_0/mlp_norm"),
}


@functools.cache
def model(what):
    """A model in which some parameters are zero."""
    original = source("starcoder2")
    flat = dict(trees.flatten(original.params))
    inert = [path for path in flat if any(part in path for part in ZEROS[what])]
    assert inert
    flat |= {path: jnp.zeros_like(flat[path]) for path in inert}
    return InMemory(original.config, trees.unflatten(flat))


def check(result):
    """The result and its predictions are finite."""
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(result.params))
    assert np.isfinite(perplexity(result.config, result.params, TOKENS)["perplexity"])


@pytest.mark.quick("block-modegpt")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", ZEROS)
def test_low_rank_methods(what, method):
    keep = 0.75 if method == "modegpt-per-layer" else 0.5  # attention is half of the weights
    check(prepare(model(what), TOKENS, method=method).compress(keep))


@pytest.mark.full
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("what", ZEROS)
def test_quantizing_methods(what, method, weighting):
    rank = None if QUANTIZERS[method].rank is None else 4
    how = {"weighting": weighting, "rank": rank, "steps": 2, "formats": FORMATS[4:9:4]}
    prepared = prepare_quantized(model(what), TOKENS, method=method, **how)
    check(prepared.compress(bits=5))
    if (what, weighting) == ("block", "both"):
        errors = {path: float(table.errors.max()) for path, table in prepared.tables.items()}
        first, second = (
            [error for path, error in errors.items() if path.startswith(name)]
            for name in ("layer_0", "layer_1")
        )
        assert max(second) < min(first)  # no budget is spent on what has no effect
