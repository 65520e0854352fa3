"""GGUF files: parameters and tokenizers are those of the model; damage is named."""

import json
import math
import os
import struct

import numpy as np
import pytest
from damage import fails
from hf_models import TINY, hf_logits, hf_model, logits, some_tokens

from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.conversions.readers.gguf import ROW_BYTES, TYPES, Gguf, _longer_rows, llama3_scaling
from lordjax.kernels.trees import flatten
from lordjax.models.config import Rope
from lordjax.models.rope import rope_frequencies

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

# --- GGUF ---

WIDE = {
    **TINY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "attention_bias": True,
}

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

HANDMADE = {"Q4_K": 2e-4, "Q5_K": 1e-4, "Q6_K": 5e-5}  # the package cannot write these


def gguf_name(name):
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, i, stem = stem.split(".", 3)
        return f"blk.{i}.{GGUF_NAMES[stem]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def stored(weight, kind):
    """Bytes of a weight; random blocks of sensible scale for the K-quants."""
    qtype = gguf.GGMLQuantizationType[kind]
    if kind not in HANDMADE:
        return gguf.quants.quantize(weight, qtype)
    values, size = gguf.GGML_QUANT_SIZES[qtype]
    blocks = np.random.default_rng(0).integers(
        0, 256, (weight.shape[0], weight.shape[1] // values, size), np.uint8
    )
    scale = np.array([HANDMADE[kind], 1e-3], np.float16).view(np.uint8)
    if kind == "Q6_K":
        blocks[..., -2:] = scale[:2]
    else:
        blocks[..., :4] = scale
    return blocks.reshape(weight.shape[0], -1)


def llama_cpp_permute(rows, heads):
    """What llama.cpp's converter does to the rows of q and k."""
    split = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, model, kind="F32", architecture="llama", extra=lambda writer: None):
    """Writes a model, and replaces its weights by what the file holds."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    extra(writer)
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        use = kind if weight.ndim == 2 else "F32"
        data = stored(weight, use)
        qtype = gguf.GGMLQuantizationType[use]
        back = gguf.quants.dequantize(data, qtype).reshape(weight.shape)
        parameter.data = torch.tensor(back)
        if architecture == "llama" and ".q_proj" in name:
            data = llama_cpp_permute(data, config.num_attention_heads)
        elif architecture == "llama" and ".k_proj" in name:
            data = llama_cpp_permute(data, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name), data, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", TYPES)
def test_gguf_types(tmp_path, kind):
    model = hf_model("llama", WIDE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3 if parameter.ndim == 2 else 1.0)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", model, kind))
    file = next(value for value in vars(checkpoint).values() if isinstance(value, Gguf))
    for name, tensor in file._tensors.items():  # values are read, not mapped
        zeros = np.broadcast_to(tensor.data.dtype.type(0), tensor.data.shape)
        file._tensors[name] = tensor._replace(data=zeros)
    params = checkpoint.params()
    assert {leaf.dtype for leaf in flatten(params).values()} == {np.dtype(np.float32)}
    theirs = model.model.layers[0].self_attn
    ours = params["layer_0"]["attention"]
    np.testing.assert_array_equal(ours["q"]["kernel"], theirs.q_proj.weight.detach().numpy().T)
    np.testing.assert_array_equal(ours["k"]["bias"], theirs.k_proj.bias.detach().numpy())
    tokens = some_tokens()
    expected = hf_logits(model, tokens)
    assert np.abs(expected).max() > 0.1
    got = logits(checkpoint.config, params, tokens)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("shape", [(4, 96), (7, 20000), (6000, 34), (5, 6, 64), (9001,), (0, 32)])
def test_gguf_rows_are_joined_whole(shape):
    """Rows are joined up to `ROW_BYTES`, in order, and none is cut; vectors stay as they are."""
    data = np.arange(math.prod(shape), dtype=np.uint32).view(np.uint8).reshape(*shape, 4)
    data = data.reshape(*shape[:-1], 4 * shape[-1])
    rows = _longer_rows(data)
    np.testing.assert_array_equal(rows.ravel(), data.ravel())
    if len(shape) > 1 and data.size:
        assert rows.shape[1] % data.shape[-1] == 0
        assert rows.shape[1] <= max(ROW_BYTES, data.shape[-1])
    else:
        assert rows.shape == data.shape


def test_gguf_qwen2(tmp_path):
    model = hf_model("qwen2", {"tie_word_embeddings": True})
    path = write_gguf(tmp_path / "model.gguf", model, architecture="qwen2")
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.tie_embeddings
    got = logits(checkpoint.config, checkpoint.params(), some_tokens())
    np.testing.assert_allclose(got, hf_logits(model, some_tokens()), rtol=0, atol=1e-5)


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_gguf_rope_scaling(tmp_path, kind):
    model = hf_model("llama", {"rope_scaling": SCALINGS[kind], "max_position_embeddings": 256})

    def extra(writer):
        if kind == "llama3":
            rope = Rope(10_000.0, "llama3", 8.0, 128)
            divisors = rope_frequencies(Rope(), 8, 1, 1)[0] / rope_frequencies(rope, 8, 1, 1)[0]
            writer.add_tensor("rope_freqs.weight", divisors)
            writer.add_rope_scaling_orig_ctx_len(128)
        else:
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(16)

    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", model, extra=extra))
    assert checkpoint.config.rope.kind == kind
    got = logits(checkpoint.config, checkpoint.params(), some_tokens())
    np.testing.assert_allclose(got, hf_logits(model, some_tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("numbers", [(8.0, 8192, 1.0, 4.0), (32.0, 1000, 2.0, 12.0)])
def test_llama3_scaling_from_its_table(numbers):
    plain, _ = rope_frequencies(Rope(500_000.0), 64, 1, 1)
    scaled, _ = rope_frequencies(Rope(500_000.0, "llama3", *numbers), 64, 1, 1)
    found = llama3_scaling(plain / scaled, 500_000.0, 64, 8192)
    rope = Rope(
        500_000.0,
        "llama3",
        found["factor"],
        found["original_max_position_embeddings"],
        found["low_freq_factor"],
        found["high_freq_factor"],
    )
    np.testing.assert_allclose(rope_frequencies(rope, 64, 1, 1)[0], scaled, rtol=1e-4)
    noise = 1 + np.random.default_rng(0).random(32)
    assert llama3_scaling(noise, 500_000.0, 64, 8192) is None


def test_gguf_problems_are_one_error(tmp_path, model):
    def extra(writer):
        writer.add_expert_count(8)
        writer.add_float32("llama.logit_scale", 2.0)
        blocks = np.zeros((4, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q2_K][1]), np.uint8)
        writer.add_tensor("odd", blocks, raw_dtype=gguf.GGMLQuantizationType.Q2_K)

    path = write_gguf(tmp_path / "model.gguf", model, extra=extra)
    fails(
        path,
        "3 thing(s)",
        "metadata llama.expert_count = 8: expected 0",
        "metadata llama.logit_scale = 2.0: unknown key",
        "type Q2_K (1 tensors, e.g. odd); supported: F32, F16",
    )
    fails(
        write_gguf(path, model, extra=lambda w: w.add_tensor("odd", np.ones(3, np.float32))),
        "unknown: ",
        "tensor odd (3,)",
    )
    fails(write_gguf(path, model, architecture="mamba"), "architecture 'mamba'; supported: llama")
    path.write_bytes(path.read_bytes()[:9000])
    fails(path, "not a complete GGUF file")
    path.write_bytes(b"PK" + struct.pack("<Q", 7))
    fails(path, "not a complete GGUF file")
    path.with_suffix(".onnx").write_bytes(b"")
    fails(path.with_suffix(".onnx"), "cannot read this file; expected")


def test_gguf_metadata_numbers(tmp_path, model):
    """Single-precision metadata come out as they were written in config.json."""
    path = write_gguf(tmp_path / "model.gguf", model)
    assert Gguf(path).hf_config["rms_norm_eps"] == model.config.rms_norm_eps


# --- Tokenizers of GGUF files ---

TEXT = (
    "The tower is 324 metres (1,063 ft) tall, about the same height as an 81-storey building.\n\n"
    "def f(x):\n    return x**2 + 1000000  # it's what WE'LL do\n\tÄpfel, 東京 and 🎉 don't\r\n   "
    "  12345   67 +=<|>$ ~^ e\u0301 ½ <|end|>after "
)

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def reference_tokenizer(pre):
    """A small trained tokenizer that cuts text as the models' tokenizer.json do."""
    import tokenizers
    from tokenizers import normalizers, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre == "llama-bpe"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    steps = [level]
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), level]
    elif pre in ("llama-bpe", "qwen2"):
        words = LLAMA3_WORDS.replace("{1,3}", "" if pre == "qwen2" else "{1,3}")
        steps = [pre_tokenizers.Split(tokenizers.Regex(words), "isolated"), level]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|unk|>", "<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def write_tokenizer(path, kind, vocab, model, types, fields):
    def extra(writer):
        writer.add_tokenizer_model(kind)
        writer.add_token_list(sorted(vocab, key=vocab.get))
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_chat_template("{{ messages }}")
        fields(writer)

    return write_gguf(path, model, extra=extra)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_tokenizer(tmp_path, model, pre):
    from transformers import AutoTokenizer

    reference = reference_tokenizer(pre)
    vocab = reference.get_vocab()
    merges = [" ".join(m) for m in json.loads(reference.to_str())["model"]["merges"]]

    def fields(writer):
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(merges)

    types = [3] * 3 + [1] * (len(vocab) - 3)
    path = write_tokenizer(tmp_path / "model.gguf", "gpt2", vocab, model, types, fields)
    tokenizer = open_checkpoint(path).tokenizer()
    expected = reference.encode(TEXT).ids
    assert tokenizer.encode(TEXT, add_special_tokens=False) == expected
    assert tokenizer.encode(TEXT) == [1] * (pre == "llama-bpe") + expected
    assert tokenizer.decode(expected) == reference.decode(expected, skip_special_tokens=False)

    open_checkpoint(path).tokenizer_files(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert (again.bos_token, again.eos_token) == ("<|begin|>", "<|end|>")
    assert again.chat_template == "{{ messages }}"


def test_default_pre_tokenizer(tmp_path, model):
    """llama.cpp's default cuts punctuation and digits, in threes, from words."""
    vocab = {token: i for i, token in enumerate(["<u>", "<b>", "<e>", *"abc123Ġ,"])}
    merges = ["a b", "b c", "1 2", "2 3", "12 3", "Ġ a", ", a", "c 1"]
    for merge in merges:
        vocab[merge.replace(" ", "")] = len(vocab)

    def fields(writer):
        writer.add_tokenizer_pre("default")
        writer.add_token_merges(merges)

    types = [3] * 3 + [1] * (len(vocab) - 3)
    path = write_tokenizer(tmp_path / "model.gguf", "gpt2", vocab, model, types, fields)
    tokens = open_checkpoint(path).tokenizer().tokenize("abc,a 12312 ab,ac1")
    assert tokens == ["ab", "c", ",", "a", "Ġ", "123", "12", "Ġ", "ab", ",", "a", "c", "1"]


def test_sentence_piece_tokenizer(tmp_path, model):
    import tokenizers
    from tokenizers import normalizers, trainers

    reference = tokenizers.Tokenizer(
        tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    reference.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=specials, limit_alphabet=50, show_progress=False
    )
    reference.train_from_iterator([TEXT.replace(" ", "\n")] * 3 + TEXT.split() * 3, trainer)
    vocab = reference.get_vocab()
    types = [2, 3, 3] + [6] * 256 + [1] * (len(vocab) - 259)

    def fields(writer):
        writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(vocab) - 259)])

    path = write_tokenizer(tmp_path / "model.gguf", "llama", vocab, model, types, fields)
    tokenizer = open_checkpoint(path).tokenizer()
    text = TEXT.replace("<|end|>", "")
    assert tokenizer.encode(text) == [1, *reference.encode(text).ids]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("kind", "pre", "part"),
    [("gpt2", "odd", "pre-tokenizer 'odd'"), ("bert", "odd", "tokenizer of kind 'bert'")],
)
def test_unknown_tokenizer(tmp_path, model, kind, pre, part):
    def fields(writer):
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(["a b"])

    vocab = {"a": 0, "b": 1, "ab": 2}
    path = write_tokenizer(tmp_path / "model.gguf", kind, vocab, model, [1] * 3, fields)
    fails(path, part, "known" if kind == "gpt2" else "supported", then=lambda c: c.tokenizer())


def test_directory_tokenizer(directory, tmp_path_factory):

    reference_tokenizer("smollm").save(str(directory / "tokenizer.json"))
    checkpoint = open_checkpoint(directory)
    expected = reference_tokenizer("smollm").encode(TEXT).ids
    assert checkpoint.tokenizer().encode(TEXT) == expected
    checkpoint.tokenizer_files(copy := tmp_path_factory.mktemp("copy"))
    assert (copy / "tokenizer.json").exists()
    (directory / "tokenizer.json").unlink()
    fails(directory, "no tokenizer", kind=FileNotFoundError, then=lambda c: c.tokenizer())


REAL = os.environ.get("LORDJAX_SMOLLM2_GGUF", "")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="LORDJAX_SMOLLM2_GGUF names no SmolLM2 GGUF file")
def test_real_gguf():
    """SmolLM2-135M-Instruct: ids, round trip, and next tokens that make sense."""
    checkpoint = open_checkpoint(REAL)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.tokenize("   in 1947") == ["ĠĠ", "Ġin", "Ġ", "1", "9", "4", "7"]
    ids = np.array([tokenizer.encode("The capital of France is")])
    best = int(logits(checkpoint.config, checkpoint.params(), ids)[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"
