"""A random model as a GGUF file, of any type of tensors, with a byte-level tokenizer."""

import gguf
import numpy as np
from tokenizers import pre_tokenizers

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, CONTEXT = 32, 64, 2, 4, 2, 64
SPECIAL = ["<unk>", "<begin>", "<end>"]


def write(path, kind="Q4_0", architecture="llama"):
    """Writes the file; matrices are of type ``kind``, vectors F32. Qwen2's have biases."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in _weights(len(tokens), biases=architecture == "qwen2"):
        use = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(weight, use), raw_dtype=use)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _weights(vocabulary, *, biases):
    """Names and values, outputs first."""
    draw = np.random.default_rng(0).standard_normal
    keys = HIDDEN // HEADS * KV_HEADS
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (keys, HIDDEN), "attn_v": (keys, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (MLP, HIDDEN)}
    shapes |= {"ffn_up": (MLP, HIDDEN), "ffn_down": (HIDDEN, MLP)}
    yield "token_embd.weight", draw((vocabulary, HIDDEN)).astype(np.float32)
    yield "output_norm.weight", np.ones(HIDDEN, np.float32)
    for i in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{i}.{name}.weight", np.ones(HIDDEN, np.float32)
        for name, shape in shapes.items():
            yield f"blk.{i}.{name}.weight", draw(shape).astype(np.float32) / shape[1] ** 0.5
            if biases and name in ("attn_q", "attn_k", "attn_v"):
                yield f"blk.{i}.{name}.bias", 0.3 * draw(shape[0]).astype(np.float32)
