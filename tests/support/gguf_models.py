"""Models of transformers as GGUF files, written with the package gguf by llama.cpp's rules."""

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch")

# The rules of llama.cpp's converter: what it does to a tensor, by the end of its name.


def _pairs(rows, heads):
    """Rotary pairs from half a head apart to neighbours."""
    split = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def _llama(name, values, config):
    if ".q_proj" in name:
        return _pairs(values, config.num_attention_heads)
    if ".k_proj" in name:
        return _pairs(values, config.num_key_value_heads)
    return values


def _gpt2(name, values, config):
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return values.T if name.endswith(matrices) else values


def _gptneox(name, values, config):
    if "query_key_value" not in name:
        return values
    heads = values.reshape(config.num_attention_heads, 3, -1, *values.shape[1:])
    return np.concatenate([heads[:, i].reshape(-1, *values.shape[1:]) for i in range(3)])


def _unchanged(name, values, config):
    return values


_PERMUTED = {"gpt2": _gpt2, "gptneox": _gptneox}
_PERMUTED |= dict.fromkeys(("llama", "granite", "smollm3"), _llama)
_SHIFTED = ("gemma", "gemma2", "gemma3")  # 1 is added to their norms


def _rope(config):
    return getattr(config, "rope_parameters", None) or {}


def _common(writer, config):
    """Sizes that all architectures have."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)


def _modern(writer, config):
    _common(writer, config)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(_rope(config).get("rope_theta", 10_000.0))
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _llama_keys(writer, config):
    _modern(writer, config)
    writer.add_vocab_size(config.vocab_size)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(size)
    if size * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(size)
        writer.add_value_length(size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def _qwen3_keys(writer, config):
    _modern(writer, config)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def _gemma_keys(writer, config):
    _common(writer, config)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def _gemma2_keys(writer, config):
    _gemma_keys(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3_keys(writer, config):
    _gemma_keys(writer, config)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    full = _rope(config)["full_attention"]
    writer.add_rope_freq_base(full["rope_theta"])
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    writer.add_sliding_window(config.sliding_window)


def _phi3_keys(writer, config):
    _modern(writer, config)
    rope = _rope(config)
    share = rope.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(share * config.hidden_size) // config.num_attention_heads)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or 0)
    if rope.get("rope_type") == "longrope":
        scale = config.max_position_embeddings / config.original_max_position_embeddings
        log = np.log(scale) / np.log(config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + log)) if scale > 1 else 1.0)
        for kind in ("long", "short"):
            table = np.array(rope[f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", table)


def _starcoder2_keys(writer, config):
    _modern(writer, config)
    writer.add_layer_norm_eps(config.norm_epsilon)


def _gpt2_keys(writer, config):
    _common(writer, config)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _starcoder_keys(writer, config):
    _gpt2_keys(writer, config)
    writer.add_head_count_kv(1)


def _gptneox_keys(writer, config):
    _common(writer, config)
    writer.add_feed_forward_length(config.intermediate_size)
    if _rope(config)["rope_theta"] != 10_000.0:
        writer.add_rope_freq_base(_rope(config)["rope_theta"])
    size = config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(_rope(config)["partial_rotary_factor"] * size))
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_layer_norm_eps(config.layer_norm_eps)


def _granite_keys(writer, config):
    _llama_keys(writer, config)
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _partial(writer, config):
    """Partly rotary heads, as in Phi-2 and StableLM."""
    _common(writer, config)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    share = _rope(config)["partial_rotary_factor"]
    writer.add_rope_dimension_count(int(share * config.hidden_size) // config.num_attention_heads)


def _stablelm_keys(writer, config):
    _partial(writer, config)
    writer.add_parallel_residual(config.use_parallel_residual)


# model_type -> name of the GGUF architecture, function that writes its metadata.
ROWS = {
    "llama": ("llama", _llama_keys),
    "mistral": ("llama", _llama_keys),
    "qwen2": ("qwen2", _modern),
    "qwen3": ("qwen3", _qwen3_keys),
    "gemma2": ("gemma2", _gemma2_keys),
    "gemma3_text": ("gemma3", _gemma3_keys),
    "phi3": ("phi3", _phi3_keys),
    "starcoder2": ("starcoder2", _starcoder2_keys),
    "gpt2": ("gpt2", _gpt2_keys),
    "gpt_bigcode": ("starcoder", _starcoder_keys),
    "gpt_neox": ("gptneox", _gptneox_keys),
    "gemma": ("gemma", _gemma_keys),
    "granite": ("granite", _granite_keys),
    "olmo2": ("olmo2", _modern),
    "smollm3": ("smollm3", _llama_keys),
    "phi": ("phi2", _partial),
    "stablelm": ("stablelm", _stablelm_keys),
}


def write_model(
    path,
    model,
    kind="F32",
    extra=lambda writer: None,
    architecture=None,
    without=frozenset(),
    **writing,
):
    """Writes a model, and replaces its weights by what the file holds.

    Args:
      path: the file.
      model: a causal model of transformers.
      kind: type of the matrices; vectors are F32.
      extra: adds to the writer.
      architecture: another name of the architecture than the model's.
      without: parameters that are left out.
      writing: options of ``GGUFWriter``, to split the file.
    """
    own, keys = ROWS[model.config.model_type]
    writer = gguf.GGUFWriter(path, architecture or own, **writing)
    keys(writer, model.config)
    extra(writer)
    for name, data, qtype in _stored(model, own, kind, without):
        writer.add_tensor(name, data, raw_dtype=qtype)
    close(writer)
    return path


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored(model, own, kind, without):
    """Names, bytes and types of the tensors; the model's weights are replaced by their values."""
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == own),
        model.config.num_hidden_layers,
    )
    for name, parameter in model.named_parameters():
        if name in without:
            continue
        values = parameter.detach().numpy()
        shift = np.float32(own in _SHIFTED and name.endswith("norm.weight"))
        order = np.arange(values.size).reshape(values.shape)
        order = _PERMUTED.get(own, _unchanged)(name, order, model.config)
        qtype = _type(kind, order.shape)
        data = stored(values.ravel()[order] + shift, qtype)
        back = np.empty(values.size, np.float32)
        back[order.ravel()] = gguf.quants.dequantize(data, qtype).ravel() - shift
        parameter.data = torch.tensor(back.reshape(values.shape))
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), data, qtype


def _type(kind, shape):
    """Vectors are F32; matrices whose rows are no whole blocks are F16."""
    qtype = gguf.GGMLQuantizationType[kind]
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    whole = shape[-1] % gguf.GGML_QUANT_SIZES[qtype][0] == 0
    return qtype if whole else gguf.GGMLQuantizationType.F16


def stored(weight, qtype):
    """Bytes of a weight; random blocks of sensible scale for types that gguf cannot write."""
    try:
        return gguf.quants.quantize(np.ascontiguousarray(weight), qtype)
    except NotImplementedError:
        return random_blocks(weight.shape, qtype)


# Bytes of a block that hold its scales in half precision, where they are not the first two.
_SCALES = {"Q2_K": slice(-4, None), "Q3_K": slice(-2, None), "Q6_K": slice(-2, None)}
_SCALES |= dict.fromkeys(("Q4_K", "Q5_K"), slice(0, 4))
_LARGEST = 0.3  # of the values of random blocks


def random_blocks(shape, qtype):
    """Random bytes whose values are of moderate size."""
    weights, size = gguf.GGML_QUANT_SIZES[qtype]
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (shape[0], shape[1] // weights, size), np.uint8)
    if qtype.name == "NVFP4":  # scales of 8 bits
        blocks[..., :4] = 0x10
        return blocks.reshape(shape[0], -1)
    for factor in (1.0, None):
        if factor is None:
            values = gguf.quants.dequantize(blocks.reshape(shape[0], -1), qtype)
            factor = _LARGEST / np.abs(values).max()
        _scale(blocks, qtype.name, np.float16(factor))
    return blocks.reshape(shape[0], -1)


def _scale(blocks, kind, factor):
    """Writes the scale of all blocks."""
    bits = factor.view(np.uint16)
    if kind == "IQ1_M":  # the last four numbers hold four bits of it each
        numbers = blocks[..., -8:].view(np.uint16)
        numbers &= 0x0FFF
        numbers |= np.array([(bits >> shift & 15) << 12 for shift in (0, 4, 8, 12)], np.uint16)
        return
    where = _SCALES.get(kind, slice(0, 2))
    width = blocks[..., where].shape[-1]
    blocks[..., where] = np.tile(np.array([bits]).view(np.uint8), width // 2)
