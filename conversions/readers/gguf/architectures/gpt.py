"""GPT-2, StarCoder, GPT-NeoX, Phi-2 and StableLM: layer norms."""

from __future__ import annotations

import dataclasses

from lordjax.conversions.readers.gguf.architectures.row import (
    ATTENTION,
    GATED,
    LAYER_NORM,
    OUTER,
    SIZES,
    TWO_NORMS,
    Architecture,
    Config,
    Key,
    RopeKeys,
    in_layers,
)
from lordjax.conversions.readers.gguf.facts import Facts
from lordjax.conversions.readers.gguf.layouts import by_head, transposed

_GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


def _inner(facts: Facts, config: Config) -> Config:
    """Reads the MLP's width from a tensor: converters write 4 times the hidden size."""
    del config
    return {"n_inner": (facts.shape("blk.0.ffn_up.weight") or (None,))[0]}


GPT2 = Architecture(
    model_type="gpt2",
    hf_class="GPT2LMHeadModel",
    tensors={
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
        **in_layers("transformer.h", _GPT2_LAYER),
    },
    keys={
        "block_count": Key("n_layer"),
        "context_length": Key("n_positions"),
        "embedding_length": Key("n_embd"),
        "attention.head_count": Key("n_head"),
        LAYER_NORM: Key("layer_norm_epsilon", float),
    },
    layouts=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), transposed),
    rope=None,
    head_dim=False,
    derive=_inner,
    pre_tokenizer="gpt-2",
)


def _starcoder(facts: Facts, config: Config) -> Config:
    """All query heads share one head of keys and values; converters write no other kind."""
    heads = facts.get("attention.head_count_kv", int, 1)
    if heads != 1:
        facts.problem(f"{facts.architecture}.attention.head_count_kv", heads, "1")
    return _inner(facts, config) | {"multi_query": True}


STARCODER = dataclasses.replace(
    GPT2,
    model_type="gpt_bigcode",
    hf_class="GPTBigCodeForCausalLM",
    layouts={},
    derive=_starcoder,
    pre_tokenizer="starcoder",
)


def _gptneox(facts: Facts, config: Config) -> Config:
    del config
    return {
        "attention_bias": facts.has("attn_qkv.bias"),
        "use_parallel_residual": facts.get("use_parallel_residual", bool, True),
    }


GPT_NEOX = Architecture(
    model_type="gpt_neox",
    hf_class="GPTNeoXForCausalLM",
    tensors={
        "token_embd": "gpt_neox.embed_in",
        "output_norm": "gpt_neox.final_layer_norm",
        "output": "embed_out",
        **in_layers(
            "gpt_neox.layers",
            {
                **TWO_NORMS,
                "attn_qkv": "attention.query_key_value",
                "attn_output": "attention.dense",
                "ffn_up": "mlp.dense_h_to_4h",
                "ffn_down": "mlp.dense_4h_to_h",
            },
        ),
    },
    keys={key: SIZES[key] for key in SIZES if key != "attention.head_count_kv"}
    | {LAYER_NORM: Key("layer_norm_eps", float)},
    layouts={"attn_qkv": by_head},
    rope=RopeKeys(theta="rotary_emb_base", share="rotary_pct"),
    head_dim=False,
    derive=_gptneox,
    derived=frozenset(("use_parallel_residual",)),
    pre_tokenizer="olmo",
)

PHI2 = Architecture(
    model_type="phi",
    hf_class="PhiForCausalLM",
    tensors={
        "token_embd": "model.embed_tokens",
        "output_norm": "model.final_layernorm",
        "output": "lm_head",
        **in_layers(
            "model.layers",
            {
                **ATTENTION,
                "attn_norm": "input_layernorm",
                "attn_output": "self_attn.dense",
                "ffn_up": "mlp.fc1",
                "ffn_down": "mlp.fc2",
            },
        ),
    },
    keys=SIZES | {LAYER_NORM: Key("layer_norm_eps", float)},
    rope=RopeKeys(share="partial_rotary_factor"),
    head_dim=False,
    pre_tokenizer="phi-2",
)


def _stablelm(facts: Facts, config: Config) -> Config:
    del config
    return {
        "use_qkv_bias": facts.has("attn_q.bias"),
        "use_parallel_residual": facts.get("use_parallel_residual", bool, False),
        "qk_layernorm": facts.has("attn_q_norm.weight"),
    }


STABLELM = Architecture(
    model_type="stablelm",
    hf_class="StableLmForCausalLM",
    tensors=OUTER | in_layers("model.layers", ATTENTION | GATED | TWO_NORMS),
    keys=SIZES | {LAYER_NORM: Key("layer_norm_eps", float)},
    rope=RopeKeys(share="partial_rotary_factor"),
    head_dim=False,
    derive=_stablelm,
    derived=frozenset(("use_parallel_residual",)),
)
