"""Sizes from shapes alone: equal to those of the real thing, and to those that papers print."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax import InMemory, compress
from lordjax.allocation import policies
from lordjax.allocation.plan import Plan
from lordjax.compression.low_rank import prepare
from lordjax.compression.site_factors import site_sizes
from lordjax.conversions.families.registry import model_config
from lordjax.forecast import shapes
from lordjax.kernels import trees
from lordjax.kernels.kinds import weights
from lordjax.methods import METHODS
from lordjax.models import ModelConfig, Transformer, init

LLAMA = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    mlp_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    max_positions=48,
)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True)
GPT = dataclasses.replace(
    LLAMA,
    norm="layer",
    gated=False,
    rope=None,
    position_rows=48,
    qkv_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
)
BERT = dataclasses.replace(
    GPT, block="post_norm", causal=False, embed_norm=True, final_norm=False, token_types=2
)
CONFIGS = {
    "llama": LLAMA,
    "gpt": GPT,
    "opt-350m": dataclasses.replace(GPT, block="post_norm", final_norm=False, embed_size=20),
    "masked": dataclasses.replace(BERT, head="masked", head_bias=True),
    "classes": dataclasses.replace(BERT, head="classes", num_classes=3, tie_embeddings=False),
    "bare": dataclasses.replace(BERT, head="none"),
}
TOKENS = np.random.default_rng(0).integers(0, 61, (6, 24), np.int32)
STARCODER = {
    "model_type": "gpt_bigcode",
    "n_positions": 8192,
    "n_embd": 6144,
    "n_layer": 40,
    "n_head": 48,
    "n_inner": 24576,
    "vocab_size": 49152,
    "multi_query": True,
}
LLAMA_7B = {"model_type": "llama", "vocab_size": 32000}  # all else is the family's default


def shapes_of(tree):
    return jax.tree.map(lambda a: (a.shape, jnp.issubdtype(a.dtype, jnp.floating)), tree)


@pytest.mark.quick("svd-llama", "modegpt-published-qwen3")
@pytest.mark.parametrize("config", [LLAMA, QWEN3, GPT], ids=["llama", "qwen3", "gpt"])
@pytest.mark.parametrize("method", METHODS)
def test_outline_is_the_shape_of_the_compressed_model(method, config):
    source = InMemory(config, init(config, jax.random.key(0)))
    result = prepare(source, TOKENS, method=method).compress(0.6)
    assert shapes_of(shapes.outline(config, result.plan)) == shapes_of(result.params)


LORDCODER = {4480: 14.983, 4096: 14.511, 3584: 13.882, 3072: 13.253, 2560: 12.623, 2304: 12.309}


@pytest.mark.parametrize(("rank", "billions"), LORDCODER.items())
def test_lordcoder_sizes(rank, billions):
    """The released LoRD models (theory/lord_rom §2.3): one MLP matrix of every StarCoder block."""
    config = model_config(STARCODER)
    sizes = site_sizes(shapes.dense_shapes(config), "lord-linear")
    plan = Plan("lord-linear", policies.ranks_by_pattern(sizes, {"mlp/down": rank}), None, "given")
    leaves = trees.flatten(shapes.outline(config, plan)).values()
    assert round(sum(map(weights, leaves)) / 1e9, 3) == billions


@pytest.mark.parametrize(
    ("keep", "ranks", "billions", "gmacs"),
    [
        (0.9, (1228, 1791), 6.091, None),
        (0.8, (942, 1373), 5.427, 339.99),
        (0.5, (675, 985), 3.483, 215.61),
    ],
)
def test_rom_sizes(keep, ranks, billions, gmacs):
    """ROM's LLaMA-7B (theory/lord_rom §4.3): ranks, parameters, multiplications of 64 tokens."""
    config = model_config(LLAMA_7B)
    plan = shapes.plan_by_shapes(config, "rom", keep, "last-k")
    chosen = plan.ranks["layer_31/attention/q/kernel"], plan.ranks["layer_31/mlp/up/kernel"]
    tree = shapes.outline(config, plan)
    assert chosen == ranks
    assert round(sum(map(weights, trees.flatten(tree).values())) / 1e9, 3) == billions
    if gmacs is not None:
        assert round(shapes.multiplications(config, tree, 64) / 1e9, 2) == gmacs


def dot_multiplications(jaxpr):
    """Multiplications of all matrix products of a traced function."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (left, _), (batch, _) = equation.params["dimension_numbers"]
            a, b = (variable.aval for variable in equation.invars)
            total += a.size * b.size // int(np.prod([a.shape[i] for i in (*left, *batch)]))
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += equation.params.get("length", 1) * dot_multiplications(inner)
    return total


@pytest.mark.quick("llama-*", "gpt-svd")
@pytest.mark.parametrize("method", ["svd", "modegpt-published"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_multiplications_are_those_of_the_program(method, config):
    """On windows that attention takes in one piece, where it computes its whole square."""
    patterns = {".*": 4} if method == "svd" else {"attention/.*": 4, "mlp": 12}
    sizes = site_sizes(shapes.dense_shapes(config), method)
    plan = Plan(method, policies.ranks_by_pattern(sizes, patterns), None, "given")
    tree = shapes.outline(config, plan)

    def logits(params):
        return Transformer(config).apply({"params": params}, TOKENS[:1])

    counted = dot_multiplications(jax.make_jaxpr(logits)(tree).jaxpr)
    assert shapes.multiplications(config, tree, TOKENS.shape[1]) == counted


def test_first_pattern_decides_and_others_stay_dense():
    sizes = site_sizes(shapes.dense_shapes(LLAMA), "svd")
    ranks = policies.ranks_by_pattern(sizes, {"layer_0/mlp/up": 3, "mlp/.*": 5})
    assert ranks["layer_0/mlp/up/kernel"] == 3
    assert ranks["layer_1/mlp/up/kernel"] == ranks["layer_0/mlp/down/kernel"] == 5
    assert ranks["layer_1/attention/q/kernel"] is None


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        ({"mlp/dwn": 3}, KeyError, "did you mean mlp/down"),
        ({"mlp/.*": 3, "mlp/up": 5}, KeyError, "no layer is left for 'mlp/up'"),
        ({"mlp/up": 20}, ValueError, "from 1 to 19, or leave"),
    ],
)
def test_bad_ranks(patterns, error, message):
    with pytest.raises(error, match=message):
        policies.ranks_by_pattern(site_sizes(shapes.dense_shapes(LLAMA), "svd"), patterns)


def test_compress_by_ranks():
    source = InMemory(LLAMA, init(LLAMA, jax.random.key(0)))
    result = compress(source, TOKENS, method="lord-linear", ranks={"mlp/down": 4})
    flat = trees.flatten(result.params)
    assert flat["layer_1/mlp/down/kernel"].rank == 4
    assert flat["layer_1/mlp/up/kernel"].shape == (32, 48)
    assert Transformer(result.config).apply({"params": result.params}, TOKENS).shape == (6, 24, 61)
