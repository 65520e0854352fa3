"""Phi-1 and Phi-2, StableLM: layer norms, and heads whose first columns are rotary."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from lordjax.conversions.families.family import (
    BLOCK,
    Family,
    TensorRow,
    decoder_heads,
    linear,
    norm,
    sizes_of,
)
from lordjax.conversions.families.llama import LLAMA
from lordjax.conversions.families.rope import partly_rotary, turned
from lordjax.models.config import ModelConfig

_LAYER = "model.layers.{i}"


def _rotary(rows: tuple[TensorRow, ...]) -> Iterator[TensorRow]:
    """Yields the rows; those of queries and keys get rotary pairs half a head apart."""
    for row in rows:
        if "/attention/q/" in row.path or "/attention/k/" in row.path:
            row = row._replace(columns=functools.partial(_columns, row.dims[0]))
        yield row


def _columns(outputs: str, config: ModelConfig) -> slice | np.ndarray:
    """Returns all outputs of queries or keys, whose number is a letter of `sizes_of`."""
    return turned(slice(0, sizes_of(config)[outputs]), config)


def _without(names: tuple[str, ...]) -> dict[str, str]:
    """Returns Llama's fields except some."""
    return {field: key for field, key in LLAMA.fields.items() if field not in names}


_NORMS = {"norm_eps": "layer_norm_eps"}
_DEFAULTS = {
    key: value
    for key, value in LLAMA.defaults.items()
    if key not in ("head_dim", "rms_norm_eps", "attention_bias", "mlp_bias")
}
_EMBED = LLAMA.tensors[0]

PHI: Family = dataclasses.replace(
    LLAMA,
    model_type="phi",
    architectures=(
        "PhiForCausalLM",
        "PhiForSequenceClassification",
        "PhiForTokenClassification",
        "PhiModel",
    ),
    fields=_without(("head_size", "qkv_bias", "out_bias", "mlp_bias")) | _NORMS,
    constants={
        "block": "parallel",
        "norm": "layer",
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "head_bias": True,
    },
    defaults={
        **_DEFAULTS,
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
    fixed={"qk_layernorm": (False,)},
    rope=partly_rotary,
    tensors=(
        _EMBED,
        *norm(f"{BLOCK}/attention_norm", f"{_LAYER}.input_layernorm"),
        *_rotary(
            (
                *linear(f"{BLOCK}/attention/q", f"{_LAYER}.self_attn.q_proj", "hm", "qkv_bias"),
                *linear(f"{BLOCK}/attention/k", f"{_LAYER}.self_attn.k_proj", "km", "qkv_bias"),
                *linear(f"{BLOCK}/attention/v", f"{_LAYER}.self_attn.v_proj", "km", "qkv_bias"),
            )
        ),
        *linear(f"{BLOCK}/attention/o", f"{_LAYER}.self_attn.dense", "mh", "out_bias"),
        *linear(f"{BLOCK}/mlp/up", f"{_LAYER}.mlp.fc1", "fm", "mlp_bias"),
        *linear(f"{BLOCK}/mlp/down", f"{_LAYER}.mlp.fc2", "mf", "mlp_bias"),
        *norm("final_norm", "model.final_layernorm"),
    ),
    heads=decoder_heads(linear("head", "lm_head", "vm", "head_bias")),
)

STABLELM: Family = dataclasses.replace(
    LLAMA,
    model_type="stablelm",
    architectures=(
        "StableLmForCausalLM",
        "StableLmForSequenceClassification",
        "StableLmForTokenClassification",
        "StableLmModel",
    ),
    fields=_without(("head_size", "out_bias", "mlp_bias")) | _NORMS | {"qkv_bias": "use_qkv_bias"},
    constants={"norm": "layer"},
    defaults={
        **_DEFAULTS,
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "use_qkv_bias": False,
        "partial_rotary_factor": 0.25,
    },
    # The 12B model of version 2 has both.
    fixed={"qk_layernorm": (False,), "use_parallel_residual": (False,)},
    rope=partly_rotary,
    tensors=(
        *_rotary(tuple(row for row in LLAMA.tensors if "_norm/" not in row.path)),
        *norm(f"{BLOCK}/attention_norm", f"{_LAYER}.input_layernorm"),
        *norm(f"{BLOCK}/mlp_norm", f"{_LAYER}.post_attention_layernorm"),
        *norm("final_norm", "model.norm"),
    ),
)
