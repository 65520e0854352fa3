"""Llama and architectures with its names: Qwen, Granite, SmolLM3, OLMo 2, Phi-3, StarCoder 2."""

from __future__ import annotations

import dataclasses

from lordjax.conversions.readers.gguf.architectures.row import (
    ATTENTION,
    GATED,
    HEAD_NORMS,
    LAYER_NORM,
    OUTER,
    RMS,
    SIZES,
    TWO_NORMS,
    WINDOW,
    Architecture,
    Config,
    Key,
    RopeKeys,
    attention_bias,
    in_layers,
)
from lordjax.conversions.readers.gguf.facts import Facts
from lordjax.conversions.readers.gguf.layouts import key_halves, query_halves


def _biases(facts: Facts, config: Config) -> Config:
    del config
    return {"attention_bias": facts.has("attn_q.bias"), "mlp_bias": facts.has("ffn_up.bias")}


def _llama(facts: Facts, config: Config) -> Config:
    """Mistral's files have this architecture, too; a sliding window tells them apart."""
    if config.get("sliding_window"):
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    return _biases(facts, config)


LLAMA = Architecture(
    model_type="llama",
    hf_class="LlamaForCausalLM",
    tensors=OUTER | in_layers("model.layers", ATTENTION | GATED | TWO_NORMS),
    keys=SIZES | RMS | WINDOW,
    layouts={"attn_q": query_halves, "attn_k": key_halves},
    derive=_llama,
)

QWEN2 = dataclasses.replace(
    LLAMA,
    model_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    layouts={},
    derive=None,
    pre_tokenizer="qwen2",
)


QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    tensors=QWEN2.tensors | in_layers("model.layers", HEAD_NORMS),
    derive=attention_bias,
)


def _granite(facts: Facts, config: Config) -> Config:
    """Without a scale, llama.cpp divides by the root of the head size."""
    scale = facts.get("attention.scale", float) or config["head_dim"] ** -0.5
    return _biases(facts, config) | {"attention_multiplier": scale}


GRANITE = dataclasses.replace(
    LLAMA,
    model_type="granite",
    hf_class="GraniteForCausalLM",
    keys=SIZES
    | RMS
    | {
        "embedding_scale": Key("embedding_multiplier", float, required=False),
        "residual_scale": Key("residual_multiplier", float, required=False),
        "logit_scale": Key("logits_scaling", float, required=False),
    },
    derive=_granite,
    derived=frozenset(("attention.scale",)),
    pre_tokenizer="refact",
)

# Which layers have no rotary positions is not in the file: every fourth, as by default.
SMOLLM3 = dataclasses.replace(
    LLAMA, model_type="smollm3", hf_class="SmolLM3ForCausalLM", keys=SIZES | RMS, derive=_biases
)

OLMO2 = dataclasses.replace(
    LLAMA,
    model_type="olmo2",
    hf_class="Olmo2ForCausalLM",
    tensors=OUTER
    | in_layers(
        "model.layers",
        {
            **ATTENTION,
            **GATED,
            **HEAD_NORMS,
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    keys=SIZES | RMS,
    layouts={},
    derive=attention_bias,
    pre_tokenizer="dbrx",
)

PHI3 = Architecture(
    model_type="phi3",
    hf_class="Phi3ForCausalLM",
    tensors=OUTER
    | in_layers(
        "model.layers",
        {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
            **TWO_NORMS,
        },
    ),
    keys=SIZES | RMS | WINDOW,
    rope=RopeKeys(share="partial_rotary_factor"),
    head_dim=False,
)


def _starcoder2(facts: Facts, config: Config) -> Config:
    del config
    return {"use_bias": facts.has("attn_q.bias")}


STARCODER2 = Architecture(
    model_type="starcoder2",
    hf_class="Starcoder2ForCausalLM",
    tensors=OUTER
    | in_layers(
        "model.layers",
        {**ATTENTION, **TWO_NORMS, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
    keys=SIZES | WINDOW | {LAYER_NORM: Key("norm_epsilon", float)},
    head_dim=False,
    derive=_starcoder2,
    pre_tokenizer="starcoder",
)
