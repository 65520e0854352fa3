"""Phi-3 and Phi-4: fused layers, longrope scaling per rotary pair, partly rotary heads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np

from lordjax.conversions.families.family import BLOCK, TensorRow, Values, fused, linear
from lordjax.conversions.families.llama import LLAMA, MISTRAL
from lordjax.conversions.families.rope import partly_rotary, turned
from lordjax.models.config import ModelConfig, Rope

_LAYER = "model.layers.{i}"
_OLD_TYPES = ("su", "yarn")  # names of longrope in early versions
_LENGTH = "original_max_position_embeddings"


def _rope(hf_config: Values, values: Values, problems: list[str]) -> Rope:
    """Reads the rotary embedding of the first columns of a head."""
    plain = dict(hf_config)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(part := plain.get(key), Mapping):
            names = {name: part[name] for name in ("type", "rope_type") if name in part}
            old = {name: "longrope" for name, kind in names.items() if kind in _OLD_TYPES}
            plain[key] = {**part, **old}
    rope = partly_rotary({_LENGTH: 4096, **plain}, values, problems)
    size = rope.size or values["hidden_size"] // values["num_attention_heads"]
    for name in ("short_factor", "long_factor"):
        count = len(getattr(rope, name))
        if count not in (0, size // 2):
            problems.append(f"{name}: {count} numbers, expected one for each of {size // 2} pairs")
    return rope


def _qkv() -> Iterator[TensorRow]:
    """Yields the rows of the fused layer of queries, keys and values."""
    for row in fused(f"{BLOCK}/attention", "qkv", f"{_LAYER}.self_attn.qkv_proj", "am", "qkv_bias"):
        if "/v/" not in row.path:
            row = row._replace(columns=functools.partial(_turned, row))
        yield row


def _turned(row: TensorRow, config: ModelConfig) -> slice | np.ndarray:
    """Returns the outputs of queries or keys in the fused layer, for `rope.turned`."""
    assert row.columns is not None
    columns = row.columns(config)
    assert isinstance(columns, slice)
    return turned(columns, config)


PHI3 = dataclasses.replace(
    MISTRAL,
    model_type="phi3",
    architectures=(
        "Phi3ForCausalLM",
        "Phi3ForSequenceClassification",
        "Phi3ForTokenClassification",
        "Phi3Model",
    ),
    fields={f: key for f, key in MISTRAL.fields.items() if f != "head_size"},
    fixed={
        **MISTRAL.fixed,
        # Keys of Phi-4-mini; its own code gives other values a meaning.
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
        "lm_head_bias": (False,),
    },
    defaults={
        **{k: v for k, v in MISTRAL.defaults.items() if k != "head_dim"},
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
    },
    rope=_rope,
    tensors=(
        *(
            row
            for row in LLAMA.tensors
            if ".self_attn." not in row.name and ".mlp." not in row.name
        ),
        *_qkv(),
        *linear(f"{BLOCK}/attention/o", f"{_LAYER}.self_attn.o_proj", "mh", "out_bias"),
        *fused(f"{BLOCK}/mlp", ("gate", "up"), f"{_LAYER}.mlp.gate_up_proj", "gm", "mlp_bias"),
        *linear(f"{BLOCK}/mlp/down", f"{_LAYER}.mlp.down_proj", "mf", "mlp_bias"),
    ),
)
