"""Transformers' FlaxOPT and our own model with the same weights: the same plan, the same model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lordjax
from lordjax.conversions import open_checkpoint
from lordjax.kernels import trees
from lordjax.scripts.benchmarks.functions import models
from lordjax.scripts.benchmarks.functions.checks import difference
from lordjax.scripts.benchmarks.functions.flax_llama import losses

CONFIG = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": models.WORDS,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
SEQUENCES = 6  # too few for the check on held-out sequences, which needs our own blocks
NAMES = {"self_attn/q_proj": "attention/q", "self_attn/k_proj": "attention/k"}
NAMES |= {"self_attn/v_proj": "attention/v", "self_attn/out_proj": "attention/o"}
NAMES |= {"fc1": "mlp/up", "fc2": "mlp/down"}


def own_path(path):
    """Returns ``layer_0/mlp/up/kernel`` of ``model/decoder/layers/0/fc1/kernel``."""
    _, _, _, number, *rest = path.split("/")
    *name, last = rest or ["mlp"]
    return "/".join([f"layer_{number}", *([NAMES["/".join(name)]] if name else []), last])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The Flax model as a function with its parameters, and our own model from the same tensors."""
    from safetensors.numpy import save_file
    from transformers import FlaxOPTForCausalLM, OPTConfig

    with models.quiet(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = FlaxOPTForCausalLM(OPTConfig(**CONFIG), seed=0)
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(
        lambda a: jnp.asarray(draw(float(a.ndim == 1), 0.2, a.shape), jnp.float32), model.params
    )
    tensors = {}
    for path, leaf in trees.flatten(params).items():
        *module, last = path.split("/")
        kind = "weight" if last in ("kernel", "scale", "embedding") else last
        value = np.asarray(leaf.T if last == "kernel" else leaf)
        tensors[".".join([*module, kind])] = np.ascontiguousarray(value)
    directory = tmp_path_factory.mktemp("opt")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return (lambda p, ids: model(ids, params=p).logits), params, open_checkpoint(directory)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(4, models.WORDS, (SEQUENCES, 24), np.int32)


def logits_of(result, ids):
    return lordjax.Transformer(result.config).apply({"params": result.params}, ids)


def interleaved(ids):
    """Single sequences so that every other one is of our own first fold, the first half."""
    half = len(ids) // 2
    return [ids[i : i + 1] for j in range(half) for i in (j, half + j)]


@pytest.mark.parametrize("method", ["svd", "svd-llm", "lord", "modegpt"])
def test_plan_and_outputs_are_those_of_our_own_model(both, ids, method):
    apply, params, own = both
    np.testing.assert_allclose(
        apply(params, ids),
        lordjax.Transformer(own.config).apply({"params": own.params()}, ids),
        atol=1e-4,
    )
    result = lordjax.compress(own, ids, method=method, keep=0.7)
    stats = lordjax.collect(apply, params, interleaved(ids), loss=losses, method=method)
    small, plan = lordjax.compress_params(params, stats, method=method, keep=0.7, where="layers/")
    assert {own_path(path): rank for path, rank in plan.ranks.items()} == dict(result.plan.ranks)
    new = lordjax.compressed(apply)(small, ids)
    assert difference(new, logits_of(result, ids)) < 1e-3
