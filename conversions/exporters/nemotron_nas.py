"""Exports a Llama-like model whose blocks have MLPs of their own widths, as Nemotron-NAS.

``config.json`` has ``block_configs``: for every block how many query heads share a key/value head,
and a multiplier that engines turn into the width of the MLP. The weights have Llama's names.

What the engines' loaders compute, which decides what this format can say:

* width: ``int(2 * ffn_mult * hidden_size / 3)``, rounded up to a multiple of 256;
* key/value heads: ``num_attention_heads // n_heads_in_group``; so all blocks have equally many
  query heads;
* MLPs have a gate and SiLU, and no layer has a bias;
* TensorRT-LLM derives the width of a head, ``hidden_size // num_attention_heads``.

Sources: vLLM ``vllm/model_executor/models/nemotron_nas.py`` (00bd149), TensorRT-LLM
``tensorrt_llm/models/nemotron_nas/convert.py`` (2a9abd9) and
``tensorrt_llm/_torch/models/modeling_nemotron_nas.py``, SGLang
``python/sglang/srt/models/nemotron_nas.py``, llama.cpp ``conversion/deci.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lordjax.conversions.exporters.hf_files import (
    ExportSpec,
    Opened,
    check_plain,
    flat_block,
    mlp_widths,
    of_block,
    outside,
    outside_blocks,
    own_table,
    stored,
    write_config,
    write_shards,
)
from lordjax.conversions.families.family import TensorSource
from lordjax.conversions.families.registry import family_of
from lordjax.models.config import UNLIMITED, ModelConfig

CODE = "modeling_decilm"
MULTIPLE = 256  # widths are multiples of this
FAMILIES = ("llama", "mistral")  # their blocks are those of Nemotron-NAS
# Keys of the original config that Nemotron-NAS does not have, or that are written anew.
_REPLACED = ("sliding_window", "rope_parameters", "layer_types")
# What the published models' configs say where a block has nothing special.
_ATTENTION = {
    "no_op": False,
    "num_sink_tokens": None,
    "replace_with_linear": False,
    "sparsify": None,
    "unshifted_sink": False,
    "use_prefill_window_in_sink_attention": False,
    "window_length": None,
}
_FFN = {"no_op": False, "replace_with_linear": False, "sparsify": None}


def nemotron_nas(job: ExportSpec, stage: Path) -> None:
    """Writes weights, config and the code of its class into the directory ``stage``.

    Raises:
      ValueError: if the format cannot say the model, or engines would compute another function.
    """
    source, table = job.source, own_table(job.source)
    check_plain(source, "nemotron-nas", table)
    widths = mlp_widths(source)
    _check(source, widths)
    write_shards(stage, _tensors(job, table), job.shard_bytes)
    hf_config = {k: v for k, v in source.hf_config.items() if k not in _REPLACED}
    write_config(stage, hf_config, job.dtype, **_keys(source, widths))
    code = Path(__file__).with_name(f"{CODE}.py").read_text("utf-8")
    (stage / f"{CODE}.py").write_text(code, "utf-8")


def _tensors(
    job: ExportSpec, table: Mapping[str, TensorSource]
) -> Iterator[tuple[str, np.ndarray]]:
    rest = outside_blocks(job.source)
    yield from stored(outside(table), rest, job.dtype)
    for i in range(job.source.config.num_layers):
        yield from stored(of_block(table, i), flat_block(job.source, i), job.dtype)


def _check(source: Opened, widths: Sequence[int]) -> None:
    """Raises ValueError unless engines compute this model from what the config can say."""
    family, config = family_of(source.hf_config).model_type, source.config
    if family not in FAMILIES or config.head != "causal":
        raise ValueError(
            f"nemotron-nas exports are those of language models of {' and '.join(FAMILIES)}, not "
            f"{family} with head {config.head!r}; export with --to dense"
        )
    if problem := _not_nemotron(config):
        raise ValueError(f"nemotron-nas models have {problem}; export with --to dense")
    odd = [i for i, width in enumerate(widths) if width % MULTIPLE]
    if odd:
        raise ValueError(
            f"nemotron-nas widths are multiples of {MULTIPLE}, but the MLP of block {odd[0]} has "
            f"width {widths[odd[0]]}; compress with --shape per-layer --multiple {MULTIPLE}, or "
            "export with --to gguf"
        )


def _not_nemotron(config: ModelConfig) -> str | None:
    """Returns what the format does not have otherwise, or None."""
    if config.activation != "silu":
        return f"activation silu, this model has {config.activation}"
    if config.qkv_bias or config.out_bias or config.mlp_bias:
        return "no biases, which this model has"
    if config.head_size * config.num_heads != config.hidden_size:
        width = config.hidden_size / config.num_heads
        return f"heads of width {width:g}, this model has {config.head_size}"
    narrow = [w for w in config.windows or () if w not in (None, UNLIMITED)]
    if any(w < config.max_positions for w in narrow):
        return "no sliding window, which this model has"
    return None


def _keys(source: Opened, widths: Sequence[int]) -> dict[str, Any]:
    """Returns the config keys in which the export differs from the original model."""
    config, hf_config = source.config, source.hf_config
    attention = _ATTENTION | {"n_heads_in_group": config.num_heads // config.num_kv_heads}
    blocks = [
        {
            "attention": attention,
            "ffn": _FFN | {"ffn_mult": multiplier(width, config.hidden_size)},
        }
        for width in widths
    ]
    keys: dict[str, Any] = {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE}.DeciLMConfig",
            "AutoModelForCausalLM": f"{CODE}.DeciLMForCausalLM",
        },
        "model_type": "nemotron-nas",
        "block_configs": blocks,
        "head_dim": config.head_size,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": max(widths),
    }
    if config.rope is not None:
        # As transformers 4 writes it; version 5 and the engines read that, too.
        given = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
        scaling = {key: value for key, value in given.items() if key != "rope_theta"}
        keys["rope_theta"] = config.rope.theta
        keys["rope_scaling"] = None if config.rope.kind == "default" else scaling
    return keys


def multiplier(width: int, hidden_size: int) -> float:
    """Returns the ``ffn_mult`` of a width, with 6 decimals, as some loaders round it."""
    return round(3 * width / (2 * hidden_size), 6)
