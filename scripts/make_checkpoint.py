"""Synthetic Hugging Face checkpoints, to measure cost at scale without downloads.

Run::

    python -m lordjax.scripts.make_checkpoint OUT --like llama-2-7b --layers 4

The config is that of the released model; options change the number of layers, the width and the
vocabulary. Weights are random. A matrix is a low-rank product with decaying singular values plus
noise, and its rows have unequal norms: ``W = D·(A·diag(k^-½)·B + G)·gain``. Its spectrum resembles
that of a trained matrix: a steep head and a long tail. Time and memory of a decomposition depend
on shapes and hardly on spectra. The loss of a method on these weights says nothing about real
models.

One shard is written per block, so that memory does not grow with the number of layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

HEAD = 128  # rank of the product with decaying singular values
# The published configs, without the keys that affect neither shapes nor computation.
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
    """Config of a Llama 2 model.

    Args:
      width: hidden size.
      inner: hidden size of the MLP.
      layers: number of blocks.
      heads: number of query heads.
      kv_heads: number of key-value heads.
    """
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
# Config keys by model type: the number of layers, and the sizes that --shrink divides.
LAYERS = {"llama": "num_hidden_layers", "gpt_bigcode": "n_layer"}
SCALED = {
    "llama": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "gpt_bigcode": ("n_embd", "n_inner", "n_head"),
}


def config_like(
    like: str, layers: int | None = None, shrink: int = 1, vocabulary: int | None = None
) -> dict[str, Any]:
    """Contents of a ``config.json`` for a smaller version of a released model.

    Args:
      like: name of a released model, a key of `CONFIGS`.
      layers: number of blocks; None keeps the model's number.
      shrink: divisor of the widths and of the numbers of heads.
      vocabulary: number of tokens; None keeps the model's number.

    Raises:
      KeyError: if ``like`` is unknown.
      ValueError: if a width is not divisible by ``shrink``.
    """
    if like not in CONFIGS:
        raise KeyError(f"--like {like!r}: unknown model; expected one of {', '.join(CONFIGS)}")
    config = dict(CONFIGS[like])
    family = config["model_type"]
    for key in SCALED[family]:
        width, rest = divmod(config[key], shrink)
        if rest and config[key] > 1:
            raise ValueError(
                f"--shrink {shrink}: {key} {config[key]} cannot be divided by {shrink}; "
                "give a divisor of it"
            )
        config[key] = max(1, width)
    if layers is not None:
        config[LAYERS[family]] = layers
    if vocabulary is not None:
        config["vocab_size"] = vocabulary
    return config


def matrix(generator: Any, shape: tuple[int, ...], depth: int) -> Any:
    """Draws a float32 matrix ``[out, in]`` whose outputs have about the norm of its inputs.

    Args:
      generator: NumPy random generator.
      shape: numbers of outputs and inputs.
      depth: number of blocks of the model; entries scale with its inverse square root.
    """
    import numpy as np

    rows, columns = shape
    rank = min(HEAD, *shape)
    left = generator.standard_normal((rows, rank), np.float32)
    right = generator.standard_normal((rank, columns), np.float32)
    values = np.arange(1, rank + 1, dtype=np.float32) ** -0.5
    found = (left * (4 / np.sqrt(rank) * values)) @ right
    found += generator.standard_normal(shape, np.float32)
    found *= np.exp(0.3 * generator.standard_normal((rows, 1), np.float32))
    # The residual branches of all blocks add up, so each is scaled down by the depth.
    found *= np.float32(0.5 / math.sqrt(columns * depth))
    return found


def tensors(config: dict[str, Any], seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the arrays of each shard: the non-block parameters, or one block."""
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
    """Writes a checkpoint directory and returns the bytes of its tensors.

    Args:
      out: new or empty directory.
      like: name of a released model, a key of `CONFIGS`.
      layers: number of blocks; None keeps the model's number.
      shrink: divisor of the widths and of the numbers of heads.
      vocabulary: number of tokens; None keeps the model's number.
      dtype: dtype of the stored tensors.
      seed: seed of the random weights.

    Raises:
      FileExistsError: if ``out`` exists and is not empty.
      KeyError: if ``like`` is unknown.
      ValueError: if a width is not divisible by ``shrink``.
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
        (stage / "model.safetensors.index.json").write_text(
            json.dumps(listing, indent=1) + "\n", "utf-8"
        )
        (stage / "config.json").write_text(
            json.dumps({**config, "dtype": dtype}, indent=1) + "\n", "utf-8"
        )
    return total


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--like",
    type=click.Choice(list(CONFIGS)),
    required=True,
    help="Released model whose config is used.",
)
@click.option(
    "--layers",
    type=click.IntRange(min=1),
    help="Number of blocks.  [default: as in the released model]",
)
@click.option(
    "--shrink",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Divisor of the widths and of the numbers of heads.",
)
@click.option(
    "--vocabulary",
    type=click.IntRange(min=2),
    help="Number of tokens in the vocabulary.  [default: as in the released model]",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Dtype of the stored tensors.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the random weights.")
def main(out: Path, like: str, **options: Any) -> None:
    """Writes a synthetic checkpoint with the shapes of a released model into directory OUT."""
    try:
        total = make(out, like, **options)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
