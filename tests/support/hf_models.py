"""Tiny random models of transformers, of every family and with every option of its config."""

import functools

import jax
import numpy as np
import pytest

from lordjax.models.transformer import Transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


LENGTH = 40

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def stretches(pairs):
    """Factors of longrope, one per rotary pair."""
    return {f"{name}_factor": [a + 0.3 * i for i in range(pairs)] for name, a in LONG.items()}


LONG = {"short": 1.0, "long": 1.5}

LONGROPE = {"rope_scaling": {"rope_type": "longrope", **stretches(4)}}

CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    ),
    "llama-dynamic-short": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-llama3": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3}, "rope_theta": 500.0},
    ),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-yarn-options": (
        "llama",
        {
            "rope_scaling": {**YARN, "attention_factor": 1.3, "beta_fast": 8, "beta_slow": 2}
            | {"truncate": False},
            "rope_theta": 50.0,
        },
    ),
    "llama-yarn-mscale": (
        "llama",
        {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}, "rope_theta": 50.0},
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 12}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama-all-heads": ("llama", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    "mistral-window": ("mistral", {"sliding_window": 7, "head_dim": 16}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "phi3-window": ("phi3", {"pad_token_id": 0, "sliding_window": 6, "tie_word_embeddings": True}),
    "phi3-long": ("phi3", {"pad_token_id": 0, **LONGROPE, "original_max_position_embeddings": 16}),
    "phi3-short": ("phi3", {"pad_token_id": 0, **LONGROPE, "original_max_position_embeddings": 48}),
    "phi4-mini": (
        "phi3",
        {"pad_token_id": 0, "hidden_size": 64, "partial_rotary_factor": 0.75}
        | {"original_max_position_embeddings": 16, "tie_word_embeddings": True}
        | {"rope_scaling": {"type": "longrope", **stretches(6), "attention_factor": 1.2}},
    ),
    "starcoder2": ("starcoder2", {}),
    "starcoder2-options": (
        "starcoder2",
        {"use_bias": False, "sliding_window": 9, "tie_word_embeddings": False},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2-options": (
        "gpt2",
        {"n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False},
    ),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_bigcode-heads": ("gpt_bigcode", {"multi_query": False, "activation_function": "gelu_new"}),
    "opt": ("opt", {}),
    "codegen": ("codegen", {"rotary_dim": 4}),
    "codegen-whole-heads": ("codegen", {"rotary_dim": 8, "n_inner": 40}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-options": (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5}
        | {"max_window_layers": 1},
    ),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25, "hidden_size": 64}),
    "gpt_neox-options": (
        "gpt_neox",
        {"rotary_pct": 1.0, "rotary_emb_base": 500, "attention_bias": False}
        | {"use_parallel_residual": False, "hidden_act": "gelu_fast"},
    ),
    "gpt_neox-linear": (
        "gpt_neox",
        {"rotary_pct": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "gpt_neox-yarn": ("gpt_neox", {"rotary_pct": 0.5, "rope_scaling": YARN}),
    "granite": (
        "granite",
        {"embedding_multiplier": 12, "attention_multiplier": 0.3, "residual_multiplier": 0.22}
        | {"logits_scaling": 8.0, "tie_word_embeddings": True},
    ),
    "granite-biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "olmo2": ("olmo2", {}),
    "olmo2-options": (
        "olmo2",
        {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3-window": (
        "smollm3",
        {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 7}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "smollm3-rotary": ("smollm3", {"rope_theta": 50.0}),
    "phi": ("phi", {"hidden_size": 64, "num_key_value_heads": 4}),
    "phi-options": (
        "phi",
        {"num_key_value_heads": 2, "partial_rotary_factor": 1.0, "rope_theta": 50.0},
    ),
    "stablelm": ("stablelm", {"hidden_size": 64}),
    "stablelm-options": (
        "stablelm",
        {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    ),
    "gemma": ("gemma", {}),
    "gemma-options": (
        "gemma",
        {"hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": False}
        | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "gemma2": (
        "gemma2",
        {"sliding_window": 7, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}
        | {"final_logit_softcapping": 1.5},
    ),
    "gemma2-options": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 8}
        | {"attention_bias": True, "tie_word_embeddings": False, "sliding_window": 5}
        | {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    "gemma3": (
        "gemma3_text",
        {"num_hidden_layers": 3, "sliding_window": 7, "query_pre_attn_scalar": 24}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "gemma3-options": (
        "gemma3_text",
        {"attention_bias": True, "sliding_window": 9, "final_logit_softcapping": 1.5}
        | {"layer_types": ["full_attention", "sliding_attention"]}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 700.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            }
        },
    ),
    "opt-unbiased": ("opt", {"enable_bias": False, "activation_function": "gelu"}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-350m-untied": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 20, "tie_word_embeddings": False},
    ),
    "opt-no-final-norm": ("opt", {"_remove_final_layer_norm": True}),
    "roberta": ("roberta", {}, "MaskedLM"),
    "roberta-options": (
        "roberta",
        {"type_vocab_size": 1, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}
        | {"tie_word_embeddings": False, "pad_token_id": 0},
        "MaskedLM",
    ),
    "roberta-classes": ("roberta", {"num_labels": 3}, "SequenceClassification"),
    "roberta-bare": ("roberta", {}, ""),
    "xlm-roberta": ("xlm-roberta", {"type_vocab_size": 1}, "MaskedLM"),
    "xlm-roberta-classes": ("xlm-roberta", {"num_labels": 3}, "SequenceClassification"),
    "camembert": ("camembert", {}, "MaskedLM"),
    "distilbert": ("distilbert", {}, "MaskedLM"),
    "distilbert-options": (
        "distilbert",
        {"activation": "relu", "tie_word_embeddings": False, "sinusoidal_pos_embds": True},
        "MaskedLM",
    ),
    "distilbert-classes": ("distilbert", {"num_labels": 3}, "SequenceClassification"),
    "distilbert-bare": ("distilbert", {}, ""),
    "bert": ("bert", {}, "MaskedLM"),
    "bert-options": (
        "bert",
        {"hidden_act": "relu", "tie_word_embeddings": False, "type_vocab_size": 3},
        "MaskedLM",
    ),
    "bert-classes": ("bert", {}, "SequenceClassification"),
    "bert-one-class": ("bert", {"num_labels": 1}, "SequenceClassification"),
    "bert-bare": ("bert", {}, ""),
}

_PADDED = {"num_labels": 3, "pad_token_id": 0}
for _kind in ("llama", "mistral", "qwen2", "qwen3", "phi3", "starcoder2", "gemma", "gemma2", "phi"):
    CASES[f"{_kind}-classes"] = (_kind, _PADDED, "SequenceClassification")
    CASES[f"{_kind}-tokens"] = (_kind, _PADDED, "TokenClassification")
for _kind in ("stablelm", "smollm3", "gpt_neox", "gpt2", "gpt_bigcode"):
    CASES[f"{_kind}-classes"] = (_kind, _PADDED, "SequenceClassification")
    CASES[f"{_kind}-tokens"] = (_kind, _PADDED, "TokenClassification")
CASES["opt-classes"] = ("opt", _PADDED, "SequenceClassification")
CASES["opt-350m-classes"] = (
    "opt",
    {**_PADDED, "do_layer_norm_before": False, "word_embed_proj_dim": 20},
    "SequenceClassification",
)
CASES["gemma3-classes"] = (
    "gemma3_text",
    {**_PADDED, "sliding_window": 7, "query_pre_attn_scalar": 24},
    "SequenceClassification",
)
CASES["llama-reward"] = ("llama", {**_PADDED, "num_labels": 1}, "SequenceClassification")
for _kind in ("llama", "qwen3", "gemma2", "olmo2", "granite", "smollm3", "phi", "stablelm", "gpt2"):
    CASES[f"{_kind}-bare"] = (_kind, {"pad_token_id": 0}, "")
for _kind in ("opt", "opt-350m", "codegen", "gpt_neox", "gpt_bigcode", "gemma3_text"):
    options = {"do_layer_norm_before": False, "word_embed_proj_dim": 20}
    CASES[f"{_kind}-bare"] = (_kind.removesuffix("-350m"), options if "-" in _kind else {}, "")
for _kind in ("bert", "roberta", "xlm-roberta", "distilbert"):
    CASES[f"{_kind}-tokens"] = (_kind, {"num_labels": 5}, "TokenClassification")
    CASES[f"{_kind}-span"] = (_kind, {}, "QuestionAnswering")

# What the sizes of `TINY` are called where they are called something else.
_GPT2 = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": None,
    "num_key_value_heads": None,
}

NAMES = {
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "codegen": _GPT2,
    "opt": {"intermediate_size": "ffn_dim", "num_key_value_heads": None},
    "roberta": {"num_key_value_heads": None},
    "xlm-roberta": {"num_key_value_heads": None},
    "camembert": {"num_key_value_heads": None},
    "bert": {"num_key_value_heads": None},
    "distilbert": {
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": None,
    },
}

NAMES["gpt_neox"] = {"num_key_value_heads": None}

EXTRA = {"opt": {"word_embed_proj_dim": TINY["hidden_size"]}, "codegen": {"rotary_dim": 8}}

EXTRA["gemma"] = EXTRA["gemma2"] = EXTRA["gemma3_text"] = {"head_dim": 12}

EXTRA["smollm3"] = {"pad_token_id": 0}

EXTRA["gpt_neox"] = {"rotary_pct": 0.5}


def tiny(kind, options=()):
    """`TINY` in the words of a family."""
    names = NAMES.get(kind, {})
    sizes = {names.get(key, key): value for key, value in TINY.items()}
    sizes.pop(None, None)
    return {**sizes, **EXTRA.get(kind, {}), **dict(options)}


def hf_model(kind, options, head="CausalLM"):
    """A random model whose biases and norms are not at their initial 0 and 1."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **tiny(kind, options))
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.15 * torch.randn(parameter.shape)
            parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens, mask=None, token_types=None):
    return Transformer(config).apply({"params": params}, tokens, mask, token_types)


def hf_logits(model, tokens, **kwargs):
    with torch.no_grad():
        out = model(torch.as_tensor(np.asarray(tokens)).long(), **kwargs)
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], dim=-1).numpy()
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def some_tokens(batch=2):
    """Without 0 and 1, which RoBERTa takes for padding."""
    return np.random.default_rng(0).integers(2, TINY["vocab_size"], (batch, LENGTH), np.int32)
