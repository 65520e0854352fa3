"""Configs of every family: keys that released checkpoints have, and errors."""

import dataclasses
import json

import numpy as np
import pytest
from hf_models import CASES, LONGROPE, TINY, stretches, tiny

from lordjax.conversions.families.config.keys import rule_out
from lordjax.conversions.families.registry import (
    FAMILIES,
    model_config,
    normalized,
    tensor_table,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("case", ["llama-llama3", "llama-dynamic", "qwen2-window", "gpt_neox"])
def test_config_of_transformers_4(saved, case):
    """The older spelling of the rotary keys gives the same model."""
    _, checkpoint = saved(case)
    config = dict(checkpoint.hf_config)
    if rope := config.pop("rope_parameters", None):
        config["rotary_emb_base" if case == "gpt_neox" else "rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            config["rotary_pct"] = rope.pop("partial_rotary_factor")
        rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = None if rope == {"type": "default"} else rope
    assert model_config(config) == checkpoint.config


def test_gemma3_config_of_transformers_4(saved):
    _, checkpoint = saved("gemma3-options")
    config = dict(checkpoint.hf_config)
    del config["rope_parameters"], config["layer_types"]
    config |= {"rope_theta": 700, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config |= {"rope_local_base_freq": 50, "sliding_window_pattern": 1}
    expected = dataclasses.replace(checkpoint.config, windows=(None, None))
    assert model_config(config) == expected
    windows = model_config({**config, "sliding_window_pattern": 2}).windows
    assert windows == (9, None)


@pytest.mark.parametrize("kind", FAMILIES)
def test_defaults_are_those_of_transformers(kind):
    full = transformers.AutoConfig.for_model(kind).to_dict()
    assert model_config(json.loads(json.dumps(full, default=str))) == model_config(
        {"model_type": kind}
    )


_SUMMARY = {
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
}

_DROPOUT = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}

# Keys that released checkpoints have besides the sizes: leftovers of training and of other code.
RELEASED = {
    "phi3": {
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "attention_bias": False,
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": 4096,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
    },
    "qwen3": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_window_layers": 28,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "codegen": {
        **_SUMMARY,
        **_DROPOUT,
        "gradient_checkpointing": False,
        "n_ctx": 2048,
        "scale_attn_weights": True,
        "task_specific_params": {"text-generation": {"do_sample": True}},
    },
    "gemma2": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
    },
    "gemma3_text": {
        "_sliding_window_pattern": 6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "sliding_attention"],
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "use_bidirectional_attention": False,
    },
    "gpt_neox": {
        "attention_bias": True,
        "attention_dropout": 0.0,
        "attention_probs_dropout_prob": 0,
        "classifier_dropout": 0.1,
        "hidden_dropout": 0.0,
        "hidden_dropout_prob": 0,
        "rope_scaling": None,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
    },
    "gpt_bigcode": {
        **_SUMMARY,
        **_DROPOUT,
        "attention_softmax_in_fp32": True,
        "inference_runner": 0,
        "max_batch_size": None,
        "max_sequence_length": None,
        "multi_query": True,
        "pad_key_length": True,
        "pre_allocate_kv_cache": False,
        "scale_attention_softmax_in_fp32": True,
        "validate_runner_input": True,
    },
    "opt": {
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "prefix": "</s>",
    },
    "roberta": {
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "output_past": True,
        "pad_token_id": 1,
        "position_embedding_type": "absolute",
    },
    "bert": {
        "attention_probs_dropout_prob": 0.1,
        "directionality": "bidi",
        "gradient_checkpointing": False,
        "hidden_dropout_prob": 0.1,
        "pad_token_id": 0,
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "position_embedding_type": "absolute",
        "use_cache": True,
    },
}


@pytest.mark.parametrize("kind", RELEASED)
def test_leftover_keys_of_released_checkpoints(kind):
    plain = {"model_type": kind, **tiny(kind)}
    config, expected = model_config({**plain, **RELEASED[kind]}), model_config(plain)
    windows = (2047, 2047) if kind == "phi3" else expected.windows
    assert config == dataclasses.replace(expected, windows=windows)


def test_keys_of_phi4_mini():
    keys = {"model_type": "phi3", **tiny("phi3", CASES["phi4-mini"][1])}
    others = {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}
    assert model_config({**keys, **others}) == model_config(keys)
    with pytest.raises(ValueError, match="full_attn_mod = 2: only 1 is supported"):
        model_config({**keys, "full_attn_mod": 2})


@pytest.mark.parametrize("old", ["su", "yarn"])
def test_old_names_of_longrope(old):
    keys = {"model_type": "phi3", **tiny("phi3", LONGROPE)}
    named = {"rope_scaling": {**stretches(4), "type": old}}
    assert model_config({**keys, **named}) == model_config(keys)


def test_the_head_is_that_of_the_architecture():
    keys = {"model_type": "bert", **tiny("bert")}
    masked = model_config(keys)
    assert (masked.head, masked.num_classes) == ("masked", None)
    labels = {"id2label": {str(i): f"label {i}" for i in range(5)}}
    classes = model_config({**keys, "architectures": ["BertForSequenceClassification"], **labels})
    assert (classes.head, classes.num_classes) == ("classes", 5)
    assert model_config({**keys, "architectures": ["BertModel"]}).head == "none"
    assert model_config({"model_type": "gpt2"}).head == "causal"


def test_every_tensor_is_used_once():
    named = [(kind, name) for kind, row in FAMILIES.items() for name in row.architectures]
    for kind, name in named:
        table = tensor_table({"model_type": kind, "architectures": [name], **tiny(kind)})
        parts = {}
        for source in table.values():
            parts.setdefault(source.name, []).append(source)
        for sources in parts.values():  # all of it, and nothing twice
            out = sources[0].shape[0 if sources[0].transpose else -1]
            places = np.concatenate([source.places for source in sources])
            np.testing.assert_array_equal(np.sort(places), np.arange(out))


def bad(**keys):
    with pytest.raises(ValueError) as error:
        model_config({"model_type": "llama", **TINY, **keys}, "here/config.json")
    assert str(error.value).startswith("here/config.json")
    return str(error.value)


def test_all_problems_in_one_error():
    message = bad(
        attn_logit_softcapping=50.0,
        residual_multiplier=0.2,
        hidden_act="quick",
        rope_interleaved=True,
        mlp_bias="yes",
        rope_scaling={"rope_type": "linear", "short_factor": [1.0]},
    )
    for part in (
        "attn_logit_softcapping = 50.0: unknown key",
        "residual_multiplier = 0.2: unknown key",
        "hidden_act = 'quick': supported: silu",
        "rope_interleaved = True: only False",
        "mlp_bias = 'yes': expected a bool",
        "rope type linear: factor is missing",
        "rope type linear: short_factor = [1.0]: unknown key",
        "7 thing(s)",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama, mis"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "supported for llama: LlamaForCausalLM"),
        ({"num_attention_heads": 3}, "hidden_size is no multiple"),
        ({"num_key_value_heads": 3}, "4 query heads are no multiple of 3"),
        ({"head_dim": 7}, "head size 7"),
        ({"vocab_size": 0}, "vocab_size = 0: expected a positive integer"),
        ({"hidden_size": None}, "hidden_size = None: expected a int"),
        ({"quantization_config": {"bits": 4}}, "the checkpoint is quantised"),
        ({"rope_scaling": {"type": "ntk"}}, "rope type 'ntk': supported: default, lin"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type longrope: long_factor is missing"),
        ({"model_type": "phi3", **LONGROPE, "hidden_size": 48}, "4 numbers, expected one for each"),
        (
            {"rope_scaling": {"type": "longrope", **stretches(4), "long_factor": [1, 0]}},
            "long_factor: expected a list of numbers above 0",
        ),
        ({"model_type": "phi3", "partial_rotary_factor": 0.4}, "partial_rotary_factor = 0.4: expe"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor = -1: expected a number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, "rope_theta = 6.0, but 5.0"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias = True: only False"),
        ({"model_type": "gpt2", "num_key_value_heads": 2}, "num_key_value_heads = 2: unknown key"),
        ({"model_type": "gpt2", "rope_theta": 5.0}, "rope_theta = 5.0: unknown key"),
        ({"model_type": "codegen", "rotary_dim": 7}, "rotary_dim = 7: expected an even number"),
        (
            {"model_type": "gpt_neox", "rotary_pct": 0.4},
            "rotary_pct = 0.4: expected an even number",
        ),
        ({"model_type": "gpt_neox", "rope_theta": 5.0}, "rope_theta = 5.0, but rotary_emb_base 1"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0: expec"),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1.0}, "softcapping = -1.0: expected"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "attention = True: only"),
        ({"model_type": "gemma3", "text_config": 3}, "model_type 'gemma3' is not supported"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "moon"}},
            "type 'moon' is not supp",
        ),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "50.0: only None"),
        ({"model_type": "gemma3_text", "sliding_window": None}, "sliding_window = None: expec"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "pattern = 0: expected a pos"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 5.0}},
            "rope_parameters = {'rope_theta': 5.0}: expected those of full_attention and sliding",
        ),
        (
            {"model_type": "gpt_bigcode", "num_key_value_heads": 2},
            "num_key_value_heads = 2: only 1 is supported with multi_query True",
        ),
        ({"model_type": "granite", "logits_scaling": 0.0}, "logits_scaling = 0.0: expected a num"),
        (
            {"model_type": "smollm3", "no_rope_layers": [1]},
            "no_rope_layers = [1]: expected 2 times",
        ),
        (
            {"model_type": "smollm3", "no_rope_layer_interval": 0},
            "interval = 0: expected a positive",
        ),
        (
            {"model_type": "smollm3", "layer_types": ["sliding_attention", "full_attention"]},
            "a layer slides, but no sliding window is in use",
        ),
        ({"model_type": "codegen", "n_head": 6}, "n_head = 6: expected a multiple of 4"),
        ({"model_type": "opt", "word_embed_proj_dim": -1}, "word_embed_proj_dim = -1: expected a"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id = None: expected a int"),
        ({"model_type": "roberta", "pad_token_id": 63}, "pad_token_id = 63: expected an id below"),
        ({"model_type": "roberta", "is_decoder": True}, "is_decoder = True: only False"),
        (
            {"model_type": "bert", "position_embedding_type": "relative_key"},
            "position_embedding_type = 'relative_key': only 'absolute'",
        ),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM", "BertModel"]},
            "heads of several kinds",
        ),
        (
            {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
            | {"num_labels": 0},
            "num_labels = 0: expected a positive integer",
        ),
        ({"model_type": "mistral", "sliding_window": -3}, "sliding_window = -3"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked"] * 2},
            "layer_types = ['chunked', 'chunked']: expected 2 times full_attention",
        ),
    ],
)
def test_bad_config(keys, part):
    assert part in bad(**keys)


def test_keys_that_nobody_has_seen():
    """What says nothing, and what is named like training or bookkeeping, refuses no model."""
    plain = {"model_type": "llama", **TINY}
    said = {
        "num_moons": 0,
        "tide": None,
        "use_tide": False,
        "tide_name": "",
        "moons": [],
        "sky": {},
    }
    named = {
        "n_special": 3,
        "predict_special_tokens": True,
        "tide_dropout": 0.1,
        "tide_init_std": 0.3,
        "router_aux_loss_coef": 0.01,
        "sun_token_id": 7,
        "moon_version": "3.1",
        "tide_dtype": "float16",
        "output_projection": True,
        "n_ctx": 12,
        "residual_multiplier": 1.0,
        "sliding_window": 64,
        "layer_types": ["full_attention"] * 2,
        "activation_function": "silu",
    }
    assert model_config({**plain, **said, **named}) == model_config(plain)


@pytest.mark.parametrize(
    "keys",
    [
        {"tide": 0.5},
        {"use_tide": True},
        {"residual_multiplier": 0.22},
        {"activation_function": "relu"},
        {"sliding_window": 16},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "tide": 0.5}},
    ],
)
def test_a_key_that_may_change_the_model_can_be_ruled_out(keys):
    plain = {"model_type": "llama", **TINY}
    name = next(iter(keys))
    name, value = ("tide", 0.5) if name == "rope_scaling" else (name, keys[name])
    assert f"{name} = {value!r}: unknown key, it may change the model; if it does not, add" in bad(
        **keys
    )
    ruled = rule_out({**plain, **keys}, [name], "config.json")
    keys = {} if name != "tide" or "tide" in keys else {"rope_scaling": LINEAR}
    assert model_config(ruled) == model_config({**plain, **keys})
    assert rule_out(ruled, [], "config.json") == ruled  # what is noted stays


LINEAR = {"type": "linear", "factor": 2.0}


def test_only_a_key_that_is_there_and_not_understood_is_ruled_out():
    plain = {"model_type": "llama", **TINY, "rope_interleaved": True}
    with pytest.raises(ValueError, match=r"--ignore-key moon: config\.json has no such key"):
        rule_out(plain, ["moon"], "config.json")
    with pytest.raises(ValueError, match="rope_interleaved = True: only False is supported"):
        model_config(rule_out(plain, ["rope_interleaved"], "config.json"))


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"rope_theta": float("inf")}, "rope_theta = inf: expected a number above 0"),
        ({"rope_theta": 10**400}, ": expected a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: expected a finite number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps = -1e-05: expected a number that is not"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: expected a positive integer"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0: expected a positive integer"),
        ({"architectures": True}, "architectures = True: expected a list of names"),
        ({"architectures": "LlamaForCausalLM"}, "expected a list of names"),
        ({"architectures": [3]}, "architectures = [3]: expected a list of names"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: expected at most 10,000"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers = 2.0: expected a int"),
        ({"vocab_size": 10**12}, "vocab_size = 1000000000000: expected at most"),
        ({"head_dim": 10**9}, "head_dim = 1000000000: expected at most"),
        ({"rope_scaling": {"type": []}}, "rope type []: supported"),
        ({"rope_scaling": 3}, "rope_scaling = 3: expected an object"),
        (
            {"rope_scaling": {"type": "linear", "factor": float("nan")}},
            "factor = nan: expected a number above 0",
        ),
        ({"model_type": "phi3", "num_attention_heads": 0}, "num_attention_heads = 0"),
        (
            {"model_type": "phi3", "partial_rotary_factor": float("nan")},
            "factor = nan: expected a finite number",
        ),
        (
            {"model_type": "gpt_neox", "rotary_pct": float("inf")},
            "rotary_pct = inf: expected a fin",
        ),
        ({"model_type": "mistral", "num_hidden_layers": 10**9}, "expected at most 10,000"),
        ({"model_type": "gemma2", "hidden_size": -4}, "hidden_size = -4: expected a positive int"),
        (
            {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
            | {"id2label": 3},
            "id2label = 3: expected an object",
        ),
    ],
)
def test_impossible_values_are_one_line(keys, part):
    # Two of the families have no such key.
    others = (
        {} if keys.get("model_type") not in ("bert", "gpt_neox") else {"num_key_value_heads": 0}
    )
    message = bad(**others, **keys)
    assert part in message and "\n" not in message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"architectures": ["LLaMAForCausalLM"]}, {"model_type": "llama"}),
        ({"architectures": ["GPT2LMHeadModel"]}, {"model_type": "gpt2"}),
        ({"architectures": ["BertForPreTraining"]}, {"model_type": "bert"}),
        (
            {"architectures": ["StableLMEpochForCausalLM"], "model_type": "stablelm_epoch"},
            {"model_type": "stablelm"},
        ),
        ({"architectures": ["GPTBigCodeLMHeadModel"]}, {"model_type": "gpt_bigcode"}),
    ],
)
def test_old_names_of_classes(old, new):
    """Also configs from before there was a model_type."""
    assert model_config(old) == model_config(new)
    assert normalized(old)["model_type"] == new["model_type"]
    (name,) = normalized(old)["architectures"]
    assert hasattr(transformers, name)


def test_a_normal_config_stays_as_it_is():
    plain = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TINY}
    assert normalized(plain) == plain and normalized({"model_type": "bert"}) == {
        "model_type": "bert"
    }


def test_text_part_of_gemma_3_as_released():
    """The 4B model names only what differs from the defaults."""
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    config, text = model_config(whole), normalized(whole)
    assert (config.hidden_size, config.windows[:7]) == (2560, (*[1024] * 5, None, 1024))
    assert config.rope.factor == 8 and config.tie_embeddings
    assert (text["eos_token_id"], text["torch_dtype"]) == ([1, 106], "bfloat16")
    assert text["architectures"] == ["Gemma3ForCausalLM"] and "vision_config" not in text
    with pytest.raises(ValueError, match="tide = 1: unknown key"):
        model_config({**whole, "text_config": {**whole["text_config"], "tide": 1}})
    ruled = {**whole, "text_config": {**whole["text_config"], "tide": 1}}
    assert model_config(rule_out(ruled, ["tide"], "config.json")) == config
