"""Gemma 1, 2 and 3: norms have a 1 added to their scale."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lordjax.conversions.readers.gguf.architectures.row import (
    ATTENTION,
    GATED,
    HEAD_NORMS,
    OUTER,
    RMS,
    SIZES,
    TWO_NORMS,
    WINDOW,
    Architecture,
    Config,
    Key,
    attention_bias,
    in_layers,
)
from lordjax.conversions.readers.gguf.facts import Facts
from lordjax.conversions.readers.gguf.layouts import minus_one

_GEMMA1 = OUTER | in_layers("model.layers", ATTENTION | GATED | TWO_NORMS)
GEMMA = Architecture(
    model_type="gemma",
    hf_class="GemmaForCausalLM",
    tensors=_GEMMA1,
    keys=SIZES | RMS,
    layouts={name: minus_one for name in _GEMMA1 if name.endswith("norm")},
    derive=attention_bias,
)

_GEMMA = OUTER | in_layers(
    "model.layers",
    ATTENTION
    | GATED
    | {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
)


def _query_scalar(facts: Facts, config: Config, layers_of_27b: int) -> float:
    """Returns what queries are scaled by, as llama.cpp derives it where the file does not say it.

    The models of 27B parameters, known by their number of layers, scale by the width per head.
    """
    scale = facts.get("attention.scale", float)
    if scale:
        found = scale**-2
        return round(found) if math.isclose(found, round(found), rel_tol=1e-6) else found
    if config["num_hidden_layers"] == layers_of_27b:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _gemma2(facts: Facts, config: Config) -> Config:
    return attention_bias(facts, config) | {
        "query_pre_attn_scalar": _query_scalar(facts, config, 46)
    }


_SOFTCAP = {"final_logit_softcapping": Key("final_logit_softcapping", float, required=False)}
GEMMA2 = Architecture(
    model_type="gemma2",
    hf_class="Gemma2ForCausalLM",
    tensors=_GEMMA,
    keys=SIZES
    | RMS
    | WINDOW
    | _SOFTCAP
    | {"attn_logit_softcapping": Key("attn_logit_softcapping", float, required=False)},
    layouts={name: minus_one for name in _GEMMA if name.endswith("norm")},
    derive=_gemma2,
    derived=frozenset(("attention.scale",)),
)


def _gemma3(facts: Facts, config: Config) -> Config:
    """Every sixth layer has full attention and a rotary base of its own, unless the file says so.

    The pattern is a number, or for every layer whether it has the window.
    """
    local = facts.get("rope.local.freq_base", float, 10_000.0)
    found: dict[str, Any] = {
        **attention_bias(facts, config),
        "query_pre_attn_scalar": _query_scalar(facts, config, 62),
        "rope_local_base_freq": facts.get("rope.freq_base_swa", float, local),
    }
    key = f"{facts.architecture}.attention.sliding_window_pattern"
    pattern = facts.metadata.get(key, 6)
    if "sliding_window" not in config:  # llama.cpp's converter leaves it out where no layer has one
        full = ["full_attention"] * config["num_hidden_layers"]
        found |= {"sliding_window": 4096, "layer_types": full}
    elif isinstance(pattern, list):
        found["layer_types"] = [
            "sliding_attention" if slides else "full_attention" for slides in pattern
        ]
    elif type(pattern) is int and pattern > 0:
        found["sliding_window_pattern"] = pattern
    else:
        facts.problem(key, pattern, "a positive integer, or true or false for every layer")
    return found


_GEMMA3 = _GEMMA | in_layers("model.layers", HEAD_NORMS)
GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    tensors=_GEMMA3,
    keys=SIZES | RMS | WINDOW | _SOFTCAP,
    layouts={name: minus_one for name in _GEMMA3 if name.endswith("norm")},
    derive=_gemma3,
    derived=GEMMA2.derived
    | {"attention.sliding_window_pattern", "rope.freq_base_swa", "rope.local.freq_base"},
)
