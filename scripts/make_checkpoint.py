"""Synthetic Hugging Face checkpoints, so that cost at scale is measured without downloads.

Run::

    python -m lordjax.scripts.make_checkpoint OUT --like llama-2-7b --layers 4

The config is that of the released model but for the number of layers (and the width, if given);
weights are random. A matrix is a product of falling singular values plus noise, with rows of
unequal lengths: ``W = D·(A·diag(k^-½)·B + G)·gain``, whose spectrum falls like that of trained
ones: a steep head, a long tail. Time and memory of a decomposition depend on shapes, and on
spectra hardly; what a method loses here says nothing of real models.

Shards are written one block at a time, so that memory does not grow with the number of layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

HEAD = 128  # falling singular values of a matrix, before the noise
# The published configs; keys that say nothing of shapes or mathematics are left out.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(width: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """The config of a Llama 2."""
    return LLAMA | {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": llama(4096, 11008, 32, 32, 32),
    "llama-2-13b": llama(5120, 13824, 40, 40, 40),
    "llama-2-70b": llama(8192, 28672, 80, 64, 8),
    "starcoder-16b": {
        "architectures": ["GPTBigCodeForCausalLM"],
        "model_type": "gpt_bigcode",
        "vocab_size": 49152,
        "n_positions": 8192,
        "n_embd": 6144,
        "n_inner": 24576,
        "n_layer": 40,
        "n_head": 48,
        "multi_query": True,
        "activation_function": "gelu_pytorch_tanh",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
# Key of the number of layers, of the vocabulary, and those that grow with the width.
LAYERS = {"llama": "num_hidden_layers", "gpt_bigcode": "n_layer"}
SCALED = {
    "llama": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "gpt_bigcode": ("n_embd", "n_inner", "n_head"),
}


def config_like(
    like: str, layers: int | None = None, shrink: int = 1, vocabulary: int | None = None
) -> dict[str, Any]:
    """A ``config.json``: of a released model, with fewer layers, and a ``shrink``-th as wide.

    Raises:
      KeyError: if no such model is known.
      ValueError: if a width cannot be divided.
    """
    if like not in CONFIGS:
        raise KeyError(f"no shapes of {like!r}; known: {', '.join(CONFIGS)}")
    config = dict(CONFIGS[like])
    family = config["model_type"]
    for key in SCALED[family]:
        width, rest = divmod(config[key], shrink)
        if rest and config[key] > 1:
            raise ValueError(f"--shrink {shrink}: {key} {config[key]} cannot be divided by it")
        config[key] = max(1, width)
    if layers is not None:
        config[LAYERS[family]] = layers
    if vocabulary is not None:
        config["vocab_size"] = vocabulary
    return config


def matrix(generator: Any, shape: tuple[int, ...], depth: int) -> Any:
    """A matrix ``[out, in]``, float32; outputs of about the length of inputs."""
    import numpy as np

    rows, columns = shape
    rank = min(HEAD, *shape)
    left = generator.standard_normal((rows, rank), np.float32)
    right = generator.standard_normal((rank, columns), np.float32)
    values = np.arange(1, rank + 1, dtype=np.float32) ** -0.5
    found = (left * (4 / np.sqrt(rank) * values)) @ right
    found += generator.standard_normal(shape, np.float32)
    found *= np.exp(0.3 * generator.standard_normal((rows, 1), np.float32))
    # Residual branches add up over the depth.
    found *= np.float32(0.5 / math.sqrt(columns * depth))
    return found


def tensors(config: dict[str, Any], seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and arrays of shard after shard: what is outside the blocks, then a block each."""
    import numpy as np

    from lordjax.conversions.families.registry import tensor_table
    from lordjax.names import is_block_linear

    shards: dict[str, dict[str, Any]] = {}
    for path, source in tensor_table(config).items():
        top = path.split("/", 1)[0]
        shards.setdefault(top if top.startswith("layer_") else "rest", {})[source.name] = (
            path,
            source.shape,
        )
    depth = config[LAYERS[config["model_type"]]]
    for number, (top, rows) in enumerate(shards.items()):
        generator, arrays = np.random.default_rng([seed, number]), {}
        for name, (path, shape) in rows.items():
            if is_block_linear(path):
                arrays[name] = matrix(generator, shape, depth)
            elif len(shape) == 2:
                scale = np.float32(1 / math.sqrt(shape[1]) if path.startswith("head") else 0.02)
                arrays[name] = scale * generator.standard_normal(shape, np.float32)
            else:
                arrays[name] = np.full(shape, "bias" not in path, np.float32)
        yield top, arrays


def make(
    out: Path,
    like: str,
    *,
    layers: int | None = None,
    shrink: int = 1,
    vocabulary: int | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> int:
    """Writes a checkpoint directory; returns its bytes.

    Raises:
      FileExistsError: if something is there.
      KeyError: if no such model is known.
      ValueError: if the shapes do not go together.
    """
    import jax.numpy as jnp
    import safetensors.numpy

    from lordjax.storage.atomic_directory import staged

    config, total, index = config_like(like, layers, shrink, vocabulary), 0, {}
    with staged(out) as stage:
        for top, arrays in tensors(config, seed):
            file = f"model-{top}.safetensors"
            stored = {name: array.astype(jnp.dtype(dtype)) for name, array in arrays.items()}
            safetensors.numpy.save_file(stored, stage / file, metadata={"format": "pt"})
            index |= dict.fromkeys(stored, file)
            total += sum(array.nbytes for array in stored.values())
        listing = {"metadata": {"total_size": total}, "weight_map": index}
        (stage / "model.safetensors.index.json").write_text(json.dumps(listing, indent=1) + "\n")
        (stage / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=1) + "\n")
    return total


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--like", type=click.Choice(list(CONFIGS)), required=True)
@click.option(
    "--layers", type=click.IntRange(min=1), help="As many as the model has, if not given."
)
@click.option(
    "--shrink", type=click.IntRange(min=1), default=1, show_default=True, help="Divides widths."
)
@click.option("--vocabulary", type=click.IntRange(min=2), help="Tokens, if not the model's own.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, like: str, **options: Any) -> None:
    """Writes a synthetic checkpoint of a released model's shapes into OUT."""
    try:
        total = make(out, like, **options)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
