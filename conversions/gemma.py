"""Gemma 2: norms on both sides of attention and MLP, capped logits, scaled embeddings."""

from __future__ import annotations

import dataclasses
from typing import Any

from lordjax.conversions.family import (
    BLOCK,
    TensorRow,
    Values,
    alternating_windows,
)
from lordjax.conversions.llama import LLAMA

_LAYER = "model.layers.{i}"


def _norm(path: str, name: str) -> TensorRow:
    """A norm, of which the file holds the scale less 1."""
    return TensorRow(f"{path}/scale", f"{name}.weight", "m", offset=1.0)


def _scales(hf_config: Values, values: Values, problems: list[str]) -> dict[str, Any]:
    """Factors on the embeddings and on the products of queries and keys."""
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


GEMMA2 = dataclasses.replace(
    LLAMA,
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM",),
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
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "layer_types": None,
    },
    fixed={**LLAMA.fixed, "use_bidirectional_attention": (False, None)},
    # Generation; an older name of the activation and of the window, which are there besides.
    ignored=frozenset(("cache_implementation", "hidden_act", "sliding_window_size")),
    windows=alternating_windows,
    derived=_scales,
    tensors=(
        *(row for row in LLAMA.tensors if "_norm/" not in row.path),
        _norm(f"{BLOCK}/attention_norm", f"{_LAYER}.input_layernorm"),
        _norm(f"{BLOCK}/attention_post_norm", f"{_LAYER}.post_attention_layernorm"),
        _norm(f"{BLOCK}/mlp_norm", f"{_LAYER}.pre_feedforward_layernorm"),
        _norm(f"{BLOCK}/mlp_post_norm", f"{_LAYER}.post_feedforward_layernorm"),
        _norm("final_norm", "model.norm"),
    ),
)
