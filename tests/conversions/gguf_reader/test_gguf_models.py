"""GGUF files of every architecture compute what the model of transformers computes."""

import re

import gguf
import numpy as np
import pytest
from gguf_models import ROWS, write_model
from gguf_models import close as write
from hf_models import LONGROPE, hf_logits, hf_model, logits, some_tokens, stretches

from lordjax.conversions.readers.checkpoint import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WIDE_HEADS = {"head_dim": 256, "query_pre_attn_scalar": 256}
# Models that transformers reads from GGUF files, with the sizes that it takes for granted.
READ_BY_TRANSFORMERS = {
    "llama": {"max_position_embeddings": 128},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 128},
    "gemma2": {**WIDE_HEADS, "sliding_window": 7},
    "gemma3_text": {**WIDE_HEADS, "num_hidden_layers": 6, "sliding_window": 7},
    "phi3": {"pad_token_id": 0},
    "starcoder2": {},
    "gpt2": {"n_positions": 1024},
    "stablelm": {"hidden_size": 64},
}
OWN = {"granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}}
OWN |= {"smollm3": {"num_hidden_layers": 4}, "phi": {"partial_rotary_factor": 0.5}}


@pytest.mark.quick("llama-F16", "gpt2-Q8_0", "gemma3_text-F16")
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("name", list(ROWS))
def test_file_computes_as_the_model(name, kind, tmp_path):
    model = hf_model(name, {**READ_BY_TRANSFORMERS, **OWN}.get(name, {}))
    path = write_model(tmp_path / "model.gguf", model, kind, with_vocabulary(model))
    checkpoint = open_checkpoint(path)
    tokens = some_tokens()
    got = logits(checkpoint.config, checkpoint.params(), tokens)
    close(got, hf_logits(model, tokens))
    close(got, hf_logits(rebuilt(checkpoint.hf_config, model), tokens))
    if name in READ_BY_TRANSFORMERS:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
        close(got, hf_logits(theirs.eval(), tokens))


def linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def local_base(writer):
    """Also says for every layer whether it has the sliding window."""
    writer.add_sliding_window_pattern([False, True])
    writer.add_rope_freq_base_swa(50.0)


ROPE_OF = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 700.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
SMALL = {"head_dim": 12, "query_pre_attn_scalar": 12}
LAST_FULL = ["sliding_attention", "sliding_attention", "full_attention"]
PHI3 = {"pad_token_id": 0, "original_max_position_embeddings": 16}
# What else a file may say: model, its options, what is added to the file.
OPTIONS = {
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, None),
    "llama-head-size": ("llama", {"head_dim": 12}, None),
    "mistral-head-size": ("mistral", {"sliding_window": 7, "head_dim": 16}, None),
    "qwen3-biases": ("qwen3", {"head_dim": 12, "attention_bias": True}, None),
    "gemma2-small": ("gemma2", {**SMALL, "sliding_window": 7, "attn_logit_softcapping": 2.0}, None),
    "gemma2-scale": (
        "gemma2",
        {"head_dim": 12, "query_pre_attn_scalar": 24},
        lambda writer: writer.add_attention_scale(24**-0.5),
    ),
    "gemma2-27b": (
        "gemma2",
        {"head_dim": 12, "query_pre_attn_scalar": 8, "num_hidden_layers": 46},
        None,
    ),
    "gemma3-pattern": (
        "gemma3_text",
        {**SMALL, "num_hidden_layers": 3, "sliding_window": 7, "layer_types": LAST_FULL},
        lambda writer: writer.add_sliding_window_pattern(3),
    ),
    "gemma3-rope": (
        "gemma3_text",
        {**SMALL, "rope_parameters": ROPE_OF, "final_logit_softcapping": 1.5, "sliding_window": 9}
        | {"layer_types": ["full_attention", "sliding_attention"]},
        local_base,
    ),
    "phi3-long": ("phi3", {**PHI3, **LONGROPE}, None),
    "phi3-short": ("phi3", {**PHI3, **LONGROPE, "original_max_position_embeddings": 48}, None),
    "phi4-mini": (
        "phi3",
        {**PHI3, "hidden_size": 64, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}
        | {"rope_scaling": {"type": "longrope", **stretches(6)}, "sliding_window": 6},
        None,
    ),
    "starcoder2-plain": (
        "starcoder2",
        {"use_bias": False, "tie_word_embeddings": False, "sliding_window": 9},
        lambda writer: writer.add_sliding_window(9),
    ),
    "gpt2-untied": ("gpt2", {"n_inner": 40, "tie_word_embeddings": False}, None),
    "starcoder-inner": ("gpt_bigcode", {"n_inner": 40}, None),
    "gptneox-options": (
        "gpt_neox",
        {"rotary_pct": 1.0, "rotary_emb_base": 500, "attention_bias": False}
        | {"use_parallel_residual": False},
        None,
    ),
    "gptneox-linear": (
        "gpt_neox",
        {"rotary_pct": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        linear,
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("case", OPTIONS)
def test_file_with_options_computes_as_the_model(case, tmp_path):
    kind, options, extra = OPTIONS[case]
    model = hf_model(kind, options)
    path = write_model(tmp_path / "model.gguf", model, "F16", extra or (lambda writer: None))
    checkpoint = open_checkpoint(path)
    tokens = some_tokens()
    got = logits(checkpoint.config, checkpoint.params(), tokens)
    close(got, hf_logits(model, tokens))
    close(got, hf_logits(rebuilt(checkpoint.hf_config | {"pad_token_id": 0}, model), tokens))


def test_text_part_of_a_file_with_images(tmp_path):
    """Ollama writes the vision tower into the file of the model, and other keys of the bases."""
    model = hf_model("gemma3_text", {**SMALL, "sliding_window": 9, "rope_parameters": ROPE_OF})

    def images(writer):
        writer.add_uint32("gemma3.vision.block_count", 27)
        writer.add_uint32("gemma3.mm.tokens_per_image", 256)
        writer.add_float32("gemma3.rope.local.freq_base", 50.0)
        for name in ("v.patch_embedding.weight", "mm.mm_soft_emb_norm.weight"):
            writer.add_tensor(name, np.ones(4, np.float32))

    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", model, extra=images))
    got = logits(checkpoint.config, checkpoint.params(), some_tokens())
    close(got, hf_logits(model, some_tokens()))
    (note,) = checkpoint.notes
    assert "only the text part is opened; 2 tensors of images, such as v.patch" in note


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_queries_keys_and_values_in_one_matrix_are_taken_apart(name, tmp_path):
    """llama.cpp reads either form; old files of Phi-2 have this one."""
    model = hf_model(name, {"attention_bias": True})
    write_model(tmp_path / "apart.gguf", model)
    fused(tmp_path / "apart.gguf", tmp_path / "fused.gguf")
    checkpoint = open_checkpoint(tmp_path / "fused.gguf")
    got = logits(checkpoint.config, checkpoint.params(), some_tokens())
    close(got, hf_logits(model, some_tokens()))


def fused(path, to):
    """Copies a file, with the three matrices as one."""
    reader, name = gguf.GGUFReader(path), re.compile(r"(blk.\d+.attn_)([qkv])(\.\w+)")
    writer = gguf.GGUFWriter(to, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if "." in key and not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), *field.types[:1])
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for own in list(tensors):
        if (match := name.fullmatch(own)) and match[2] == "q":
            parts = [tensors.pop(f"{match[1]}{part}{match[3]}") for part in "qkv"]
            tensors[f"{match[1]}qkv{match[3]}"] = np.concatenate(parts)
    for own, values in tensors.items():
        writer.add_tensor(own, values)
    write(writer)


def close(got, expected):
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def with_vocabulary(model):
    """Transformers counts the tokens."""

    def extra(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([f"t{i}" for i in range(model.config.vocab_size)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)

    return extra


def rebuilt(hf_config, model):
    """The model of transformers with the config that was made from the file."""
    config = transformers.AutoConfig.for_model(**hf_config)
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(model.state_dict())
    return other
