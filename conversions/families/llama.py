"""Families derived from Llama: Llama, Mistral, Qwen2, Qwen3, StarCoder2 and Granite."""

from __future__ import annotations

import dataclasses
from typing import Any

from lordjax.conversions.families.family import (
    BIAS_FIELDS,
    BLOCK,
    Family,
    TensorRow,
    Values,
    head_norms,
    linear,
    norm,
)
from lordjax.conversions.families.rope import ROPE_KEYS, is_factor
from lordjax.conversions.families.sliding_windows import mixed_windows, no_windows, one_window

_LAYER = "model.layers.{i}"
LLAMA = Family(
    model_type="llama",
    architectures=(
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "LlamaModel",
    ),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "mlp_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "max_positions": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "activation": "hidden_act",
        "tie_embeddings": "tie_word_embeddings",
        "qkv_bias": "attention_bias",
        "out_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
    },
    constants={},
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    windows=no_windows,
    rope_keys=ROPE_KEYS,
    tensors=(
        TensorRow("embed/embedding", "model.embed_tokens.weight", "vm"),
        TensorRow(f"{BLOCK}/attention_norm/scale", f"{_LAYER}.input_layernorm.weight", "m"),
        *linear(f"{BLOCK}/attention/q", f"{_LAYER}.self_attn.q_proj", "hm", "qkv_bias"),
        *linear(f"{BLOCK}/attention/k", f"{_LAYER}.self_attn.k_proj", "km", "qkv_bias"),
        *linear(f"{BLOCK}/attention/v", f"{_LAYER}.self_attn.v_proj", "km", "qkv_bias"),
        *linear(f"{BLOCK}/attention/o", f"{_LAYER}.self_attn.o_proj", "mh", "out_bias"),
        TensorRow(f"{BLOCK}/mlp_norm/scale", f"{_LAYER}.post_attention_layernorm.weight", "m"),
        *linear(f"{BLOCK}/mlp/gate", f"{_LAYER}.mlp.gate_proj", "fm", "mlp_bias"),
        *linear(f"{BLOCK}/mlp/up", f"{_LAYER}.mlp.up_proj", "fm", "mlp_bias"),
        *linear(f"{BLOCK}/mlp/down", f"{_LAYER}.mlp.down_proj", "mf", "mlp_bias"),
        TensorRow("final_norm/scale", "model.norm.weight", "m"),
    ),
    # Old versions of transformers saved the rotary frequencies, which follow from the config.
    ignored_tensors=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)

_NO_BIASES = {"attention_bias": (False,), "mlp_bias": (False,)}
_UNBIASED: dict[str, Any] = {
    "fields": {f: key for f, key in LLAMA.fields.items() if f not in BIAS_FIELDS},
    "fixed": _NO_BIASES,
}
_READ = {k: v for k, v in LLAMA.defaults.items() if k not in _NO_BIASES}

MISTRAL = dataclasses.replace(
    LLAMA,
    **_UNBIASED,
    model_type="mistral",
    architectures=(
        "MistralForCausalLM",
        "MistralForSequenceClassification",
        "MistralForTokenClassification",
        "MistralModel",
    ),
    defaults={
        **_READ,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    windows=one_window,
)

QWEN2 = dataclasses.replace(
    LLAMA,
    fields=_UNBIASED["fields"],
    # Text-only checkpoints may turn Qwen2-VL's rotary embedding off explicitly.
    fixed={**_UNBIASED["fixed"], "use_mrope": (False,)},
    model_type="qwen2",
    architectures=(
        "Qwen2ForCausalLM",
        "Qwen2ForSequenceClassification",
        "Qwen2ForTokenClassification",
        "Qwen2Model",
    ),
    constants={"qkv_bias": True},
    defaults={
        **_READ,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    windows=mixed_windows,
)

QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    architectures=(
        "Qwen3ForCausalLM",
        "Qwen3ForSequenceClassification",
        "Qwen3ForTokenClassification",
        "Qwen3Model",
    ),
    constants={"qk_norm": True},
    fields={**QWEN2.fields, "qkv_bias": "attention_bias", "out_bias": "attention_bias"},
    fixed={key: values for key, values in QWEN2.fixed.items() if key != "attention_bias"},
    defaults={**QWEN2.defaults, "head_dim": 128, "attention_bias": False},
    tensors=(*LLAMA.tensors, *head_norms(f"{_LAYER}.self_attn")),
)

_FACTORS = {
    "embedding_scale": "embedding_multiplier",
    "attention_scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
}


def _granite_scales(hf_config: Values, values: Values, problems: list[str]) -> dict[str, Any]:
    """Returns Granite's factors; logits are divided by the last one."""
    del hf_config
    for key in (*_FACTORS.values(), "logits_scaling"):
        if not is_factor(values[key]):
            problems.append(f"{key} = {values[key]!r}: expected a number above 0")
            return {}
    scales = {field: float(values[key]) for field, key in _FACTORS.items()}
    return {**scales, "logit_scale": 1 / values["logits_scaling"]}


GRANITE = dataclasses.replace(
    LLAMA,
    model_type="granite",
    architectures=(
        "GraniteForCausalLM",
        "GraniteModel",
    ),
    defaults={**LLAMA.defaults, **dict.fromkeys((*_FACTORS.values(), "logits_scaling"), 1.0)},
    derive=_granite_scales,
)

STARCODER2 = dataclasses.replace(
    LLAMA,
    model_type="starcoder2",
    architectures=(
        "Starcoder2ForCausalLM",
        "Starcoder2ForSequenceClassification",
        "Starcoder2ForTokenClassification",
        "Starcoder2Model",
    ),
    fields={
        **{f: key for f, key in LLAMA.fields.items() if f != "head_size"},
        "norm_eps": "norm_epsilon",
        **dict.fromkeys(BIAS_FIELDS, "use_bias"),
    },
    constants={"norm": "layer", "gated": False},
    defaults={
        **{k: v for k, v in _READ.items() if k not in ("head_dim", "rms_norm_eps")},
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    fixed={"norm_type": ("layer_norm",), "mlp_type": ("default",)},
    windows=one_window,
    tensors=(
        *(row for row in LLAMA.tensors if "_norm/" not in row.path and "/mlp/" not in row.path),
        *norm(f"{BLOCK}/attention_norm", f"{_LAYER}.input_layernorm"),
        *norm(f"{BLOCK}/mlp_norm", f"{_LAYER}.post_attention_layernorm"),
        *linear(f"{BLOCK}/mlp/up", f"{_LAYER}.mlp.c_fc", "fm", "mlp_bias"),
        *linear(f"{BLOCK}/mlp/down", f"{_LAYER}.mlp.c_proj", "mf", "mlp_bias"),
        *norm("final_norm", "model.norm"),
    ),
)
