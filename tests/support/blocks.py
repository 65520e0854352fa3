"""Random models of every shape of block that a family has."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lordjax import InMemory
from lordjax.kernels import trees
from lordjax.models import ModelConfig, Rope, init
from lordjax.models.config import UNLIMITED

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
    "granite": dataclasses.replace(
        GPT2,
        num_kv_heads=2,
        norm="rms",
        activation="silu",
        gated=True,
        rope=Rope(),
        position_rows=None,
        embedding_scale=3.0,
        attention_scale=0.3,
        residual_scale=0.4,
        logit_scale=0.2,
    ),
    "opt-350m": dataclasses.replace(
        GPT2, block="post_norm", activation="relu", final_norm=False, embed_size=20
    ),
    "roberta": dataclasses.replace(ENCODER, position_rows=50, position_offset=2),
    "bert-classifier": dataclasses.replace(
        ENCODER, head="classes", num_classes=3, tie_embeddings=False
    ),
}
BLOCKS["decoder-classifier"] = dataclasses.replace(
    BLOCKS["qwen3"], head="classes", num_classes=3, tie_embeddings=False
)
BLOCKS["token-classifier"] = dataclasses.replace(BLOCKS["bert-classifier"], head="tokens")
BLOCKS["olmo2"] = dataclasses.replace(
    BLOCKS["qwen3"], block="output_norm", wide_qk_norm=True, qkv_bias=True
)
BLOCKS["smollm3"] = dataclasses.replace(
    BLOCKS["qwen3"], qk_norm=False, windows=(None, UNLIMITED), local_rope=Rope(kind="none")
)
BLOCKS["gemma3"] = dataclasses.replace(
    BLOCKS["gemma2"], qk_norm=True, attention_softcap=None, final_softcap=None
)

# What most tests of whole models take: three blocks, three query heads for each key head.
SMALL = ModelConfig(97, 48, 80, 3, 6, 2, 8, 256, tie_embeddings=True)


@functools.cache
def shifted(config):
    """Parameters off their initial values, so that forgetting a norm or a bias shows."""
    tree = init(config, jax.random.key(0))
    return jax.tree.map(lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), tree)


def source(name):
    """`random_model` of a row of `BLOCKS`."""
    return random_model(BLOCKS[name])


def random_model(config):
    """A random model whose norms and biases are not at their initial 1 and 0."""
    flat = trees.flatten(init(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(flat))
    noise = {
        path: leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for key, (path, leaf) in zip(keys, flat.items(), strict=True)
    }
    return InMemory(config, trees.unflatten(noise))
