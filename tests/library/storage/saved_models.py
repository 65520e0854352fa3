"""A tiny model with kernels of every kind, and how tests save it."""

import functools
import json

import jax
import jax.numpy as jnp

from lordjax import LowRank, factorize, save
from lordjax.kernels import trees
from lordjax.kernels.normal_float import Format
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized
from lordjax.models import ModelConfig, Rope, init

CONFIG = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    mlp_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    max_positions=32,
    rope=Rope(kind="linear", factor=2.0),
    windows=(None, 7),
)

HF_CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16}

SHARD = 3000  # bytes: several shards


@functools.cache
def dense():
    return init(CONFIG, jax.random.key(0))


@functools.cache
def model():
    """Returns params with low-rank kernels, one factored twice, one with a bias, one dense."""
    params = factorize(dense(), keep=0.7, where=r"(attention/[qo]|mlp/\w+)/kernel")
    flat = trees.flatten(params)
    down = flat["layer_1/mlp/down/kernel"]
    inner = factorize({"kernel": down.left}, rank=2)["kernel"]
    flat["layer_1/mlp/down/kernel"] = LowRank(inner, down.right)
    flat["layer_0/attention/q/bias"] = jnp.arange(16.0)
    return trees.unflatten(flat)


encode = jax.jit(NFQuantized.encode, static_argnums=1)


@functools.cache
def quantized():
    """Returns params with nested and plain quantized kernels, whose sizes no block divides."""
    two, three = Format(2, 2, "float16", 16, 4), Format(3, 4, "bfloat16", 16, 16)
    flat = trees.flatten(dense())
    factored = trees.flatten(factorize(dense(), rank=3))

    def of_quantized(path):
        kernel = factored[path]
        return LowRank(encode(kernel.left, three), encode(kernel.right, Format(8)))

    for path, kernel in factored.items():
        match path.split("/"):
            case ["layer_0", _, "q" | "up", _]:
                flat[path] = encode(flat[path], two)
            case ["layer_0", _, "k" | "down", _]:
                flat[path] = encode(flat[path], three)
            case [_, _, "v", _]:
                flat[path] = of_quantized(path)
            case ["layer_0", _, "o" | "gate", _]:
                flat[path] = LowRankPlusQuantized(encode(flat[path], Format()), kernel)
            case ["layer_1", _, "q", _]:
                narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), kernel)
                flat[path] = LowRankPlusQuantized(encode(flat[path], three), narrow)
            case ["layer_1", _, "up", _]:
                flat[path] = LowRankPlusQuantized(encode(flat[path], two), of_quantized(path))
    return trees.unflatten(flat)


def write(directory, params=None, **options):
    options = {"hf_config": HF_CONFIG, "shard_bytes": SHARD, **options}
    return save(directory, CONFIG, model() if params is None else params, **options)


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
