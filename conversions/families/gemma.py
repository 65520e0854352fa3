"""Gemma 1 to 3: scaled embeddings, norms stored minus 1; later four norms and soft caps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lordjax.conversions.families.family import (
    BLOCK,
    Family,
    TensorRow,
    Values,
    head_norms,
)
from lordjax.conversions.families.llama import LLAMA
from lordjax.conversions.families.rope import read_rope
from lordjax.conversions.families.sliding_windows import alternating_windows
from lordjax.models.config import Rope

_LAYER = "model.layers.{i}"


def _norm(path: str, name: str) -> TensorRow:
    """Returns the row of a norm; the file stores the scale minus 1."""
    return TensorRow(f"{path}/scale", f"{name}.weight", "m", offset=1.0)


def _scales(hf_config: Values, values: Values, problems: list[str]) -> dict[str, Any]:
    """Returns the scales of the embeddings and of the attention logits."""
    del hf_config
    for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        value = values.get(key)
        if value is not None and not (type(value) in (int, float) and value > 0):
            problems.append(f"{key} = {value!r}: expected a number above 0")
            return {}
    return {
        "embedding_scale": values["hidden_size"] ** 0.5,
        "attention_scale": values["query_pre_attn_scalar"] ** -0.5,
    }


def _first_version(hf_config: Values, values: Values, problems: list[str]) -> dict[str, Any]:
    """Returns the scale of the embeddings, and the activation that was meant.

    The first configs name the exact GELU, but the authors' code has the approximate one.
    """
    del hf_config, problems
    fields: dict[str, Any] = {"embedding_scale": values["hidden_size"] ** 0.5}
    return fields | ({"activation": _GELU} if values["hidden_act"] == "gelu" else {})


_GELU = "gelu_pytorch_tanh"
_ROWS = tuple(row for row in LLAMA.tensors if "_norm/" not in row.path)
GEMMA = dataclasses.replace(
    LLAMA,
    model_type="gemma",
    architectures=(
        "GemmaForCausalLM",
        "GemmaForSequenceClassification",
        "GemmaForTokenClassification",
        "GemmaModel",
    ),
    fields={field: key for field, key in LLAMA.fields.items() if field != "mlp_bias"},
    defaults={
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "hidden_act": _GELU,
        "tie_word_embeddings": True,
        "attention_bias": False,
    },
    fixed={"use_bidirectional_attention": (False,), "hidden_activation": (_GELU,)},
    derive=_first_version,
    tensors=(
        *_ROWS,
        _norm(f"{BLOCK}/attention_norm", f"{_LAYER}.input_layernorm"),
        _norm(f"{BLOCK}/mlp_norm", f"{_LAYER}.post_attention_layernorm"),
        _norm("final_norm", "model.norm"),
    ),
)

GEMMA2 = dataclasses.replace(
    LLAMA,
    model_type="gemma2",
    architectures=(
        "Gemma2ForCausalLM",
        "Gemma2ForSequenceClassification",
        "Gemma2ForTokenClassification",
        "Gemma2Model",
    ),
    fields={
        **{field: key for field, key in LLAMA.fields.items() if field != "mlp_bias"},
        "activation": "hidden_activation",
        "attention_softcap": "attn_logit_softcapping",
        "final_softcap": "final_logit_softcapping",
    },
    constants={"block": "sandwich"},
    defaults={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "hidden_activation": _GELU,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "layer_types": None,
    },
    fixed={"use_bidirectional_attention": (False,)},
    # Old names of the activation and the window, repeated beside the new.
    ignored=frozenset(("hidden_act", "sliding_window_size")),
    windows=alternating_windows,
    derive=_scales,
    tensors=(
        *_ROWS,
        _norm(f"{BLOCK}/attention_norm", f"{_LAYER}.input_layernorm"),
        _norm(f"{BLOCK}/attention_post_norm", f"{_LAYER}.post_attention_layernorm"),
        _norm(f"{BLOCK}/mlp_norm", f"{_LAYER}.pre_feedforward_layernorm"),
        _norm(f"{BLOCK}/mlp_post_norm", f"{_LAYER}.post_feedforward_layernorm"),
        _norm("final_norm", "model.norm"),
    ),
)

# Kind of layer -> key of its rotary base in transformers 4, default of the base.
_BASES = {
    "full_attention": ("rope_theta", 1_000_000.0),
    "sliding_attention": ("rope_local_base_freq", 10_000.0),
}


def _rope_of(kind: str, hf_config: Values, values: Values, problems: list[str]) -> Rope:
    """Reads the rotary embedding of one kind of layer, a key of `_BASES`."""
    key, default = _BASES[kind]
    part = hf_config.get("rope_parameters") or {}
    if not isinstance(part, Mapping) or set(part) - set(_BASES):
        problems.append(f"rope_parameters = {part!r}: expected those of {' and '.join(_BASES)}")
        return Rope()
    part, base = part.get(kind) or {}, hf_config.get(key)
    plain = {"rope_parameters": part, "rope_theta": base}
    if base is None:
        plain["rope_theta"] = part.get("rope_theta", default)
    if kind == "full_attention":  # sliding layers have no scaling
        plain["rope_scaling"] = hf_config.get("rope_scaling")
    return read_rope(plain, values, problems)


def _global_rope(hf_config: Values, values: Values, problems: list[str]) -> Rope:
    """Reads the rotary embedding of the layers with full attention."""
    return _rope_of("full_attention", hf_config, values, problems)


def _scales_and_local_rope(
    hf_config: Values, values: Values, problems: list[str]
) -> dict[str, Any]:
    """Returns the scales, and the rotary embedding of the layers with a sliding window."""
    local = _rope_of("sliding_attention", hf_config, values, problems)
    return _scales(hf_config, values, problems) | {"local_rope": local}


GEMMA3: Family = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    architectures=("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification", "Gemma3TextModel"),
    fields={f: key for f, key in GEMMA2.fields.items() if f != "attention_softcap"},
    constants={"block": "sandwich", "qk_norm": True},
    defaults={
        **{k: v for k, v in GEMMA2.defaults.items() if k != "attn_logit_softcapping"},
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10_000.0,
    },
    # transformers ignores this key in Gemma 3.
    fixed={**GEMMA2.fixed, "attn_logit_softcapping": (None,)},
    # _sliding_window_pattern repeats layer_types.
    ignored=frozenset(("_sliding_window_pattern",)),
    rope=_global_rope,
    derive=_scales_and_local_rope,
    tensors=(
        *GEMMA2.tensors,
        *(row._replace(offset=1.0) for row in head_norms(f"{_LAYER}.self_attn")),
    ),
)
