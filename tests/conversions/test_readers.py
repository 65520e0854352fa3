"""Files: safetensors, torch files and GGUF give the same parameters; damage is named."""

import json
import math
import os
import struct
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import TINY, hf_logits, hf_model, logits, some_tokens
from safetensors.numpy import load_file, save_file

from lordjax.conversions.readers import tensor_files
from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.conversions.readers.gguf import ROW_BYTES, TYPES, Gguf, _longer_rows, llama3_scaling
from lordjax.forecast import peak_memory
from lordjax.kernels.trees import flatten
from lordjax.models.config import Rope
from lordjax.models.rope import rope_frequencies

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")


# --- Hugging Face directories ---


@pytest.fixture(scope="module")
def model():
    return hf_model("llama", {})


@pytest.fixture
def directory(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def same(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_sharded_and_torch_files_equal_one_file(model, directory, tmp_path_factory):
    one = open_checkpoint(directory).params()
    sharded = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert same(open_checkpoint(sharded).params(), one)

    shards = sorted(sharded.glob("*.safetensors"))
    names = {}
    for shard in shards:  # the same shards as torch files
        state = {k: torch.tensor(v) for k, v in load_file(shard).items()}
        file = shard.name.replace("model", "pytorch_model").replace("safetensors", "bin")
        names |= dict.fromkeys(state, file)
        torch.save(state, sharded / file)
        shard.unlink()
    (sharded / "model.safetensors.index.json").unlink()
    index = json.dumps({"weight_map": names})
    (sharded / "pytorch_model.bin.index.json").write_text(index)
    assert same(open_checkpoint(sharded).params(), one)

    single = tmp_path_factory.mktemp("bin")
    model.config.save_pretrained(single)
    for zipped in (True, False):  # False: as torch < 1.6 wrote it
        state, file = model.state_dict(), single / "pytorch_model.bin"
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
        assert same(open_checkpoint(single).params(), one)


def test_blocks_are_read_alone(directory, monkeypatch):
    checkpoint = open_checkpoint(directory)
    read = []
    original = tensor_files.Safetensors.read
    monkeypatch.setattr(
        tensor_files.Safetensors, "read", lambda s, name: read.append(name) or original(s, name)
    )
    block = checkpoint.block(1)
    assert len(read) == 9
    assert all("layers.1." in name for name in read)
    params = checkpoint.params()
    assert same(block, params["layer_1"])
    assert same(checkpoint.rest(), {k: params[k] for k in ("embed", "final_norm", "head")})
    with pytest.raises(IndexError, match="block 2, but there are 2"):
        checkpoint.block(2)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_what_was_read_of_files_does_not_stay_mapped(directory, kind, monkeypatch):
    expected = open_checkpoint(directory).params()
    if kind == "bin":
        state = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        half = len(state) // 2
        parts = {"a.bin": list(state)[:half], "b.bin": list(state)[half:]}
        for file, names in parts.items():
            values = {name: torch.from_numpy(state[name]) for name in names}
            torch.save(values, directory / file)
        index = {name: file for file, names in parts.items() for name in names}
        text = json.dumps({"weight_map": index})
        (directory / "pytorch_model.bin.index.json").write_text(text)
    monkeypatch.setattr(tensor_files, "PAGES", 1000)
    opened = open_checkpoint(directory)
    (files,) = [value for value in vars(opened).values() if isinstance(value, tensor_files._Mapped)]
    first = dict(files._handle)
    params = opened.params()
    assert same(params, expected)
    assert files._pages.total() <= 1000  # of all files together
    assert all(files._handle[file] is not handle for file, handle in first.items())
    if kind == "bin":  # what was read holds no mapping
        old = [weakref.ref(tensor) for handle in first.values() for tensor in handle.values()]
        del first
        assert not any(ref() is not None for ref in old)


def test_the_forecast_counts_the_pages_that_stay_mapped():
    assert peak_memory.PAGES == tensor_files.PAGES


def test_a_file_that_cannot_be_mapped_is_read_once(directory, monkeypatch):
    expected = open_checkpoint(directory).params()
    state = {n: torch.from_numpy(a) for n, a in load_file(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    file = directory / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(tensor_files, "PAGES", 1000)
    opened, read = open_checkpoint(directory), []
    monkeypatch.setattr(torch, "load", lambda *args, **options: read.append(args))
    assert same(opened.params(), expected)
    assert not read


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_dtype_is_kept(directory, dtype, kind):
    half = hf_model("llama", {}).to(getattr(torch, dtype))
    expected = half.lm_head.weight.detach().float().numpy().T
    half.save_pretrained(directory)
    if kind == "bin":
        (directory / "model.safetensors").unlink()
        torch.save(half.state_dict(), directory / "pytorch_model.bin")
    checkpoint = open_checkpoint(directory)
    assert {leaf.dtype for leaf in flatten(checkpoint.params()).values()} == {jnp.dtype(dtype)}
    head = checkpoint.read("head/kernel", dtype=np.float32)
    assert head.dtype == np.float32
    np.testing.assert_array_equal(head, expected)


# --- Damage: each error names the thing ---


def edit(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return directory


def fails(directory, *parts, kind=ValueError, then=lambda c: None):
    with pytest.raises(kind) as error:
        then(open_checkpoint(directory))
    for part in (str(directory), *parts):
        assert part in str(error.value)


def test_wrong_tensors_are_one_error(directory):
    def change(tensors):
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = np.ones(31, np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    fails(
        edit(directory, change),
        "3 tensor(s)",
        "unknown: " + str(directory / "model.safetensors"),
        "tensor model.layers.0.self_attn.q_norm.weight (8,)",
        "missing: model.layers.1.mlp.up_proj.weight (48, 32)",
        "tensor model.norm.weight is (31,), not (32,)",
    )


def test_not_finite(directory):
    def change(tensors):
        tensors["model.layers.1.self_attn.q_proj.weight"][3, 5] = np.nan
        tensors["model.norm.weight"][2] = 1e10

    checkpoint = open_checkpoint(edit(directory, change))
    assert np.isfinite(checkpoint.block(0)["mlp"]["up"]["kernel"]).all()
    with pytest.raises(
        ValueError,
        match=r"model\.safetensors: tensor model\.layers\.1\.self_attn.*"
        r"layer_1/attention/q/kernel.* holds 1 non-finite .* \(3, 5\)",
    ):
        checkpoint.block(1)
    assert checkpoint.read("final_norm/scale").max() > 1e9
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*cast to float16 has 1 non-finite"):
        checkpoint.rest("float16")


def test_integer_tensor(directory):
    def change(tensors):
        tensors["model.norm.weight"] = np.ones(32, np.int8)

    fails(edit(directory, change), "model.norm.weight", "int8", then=lambda c: c.rest())


@pytest.mark.parametrize("size", [5, 500, -7])
def test_truncated_safetensors(directory, size):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    fails(directory, "model.safetensors: not a complete safetensors file", "download it again")


def test_damaged_torch_file(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), file := tmp_path / "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[:5000])
    fails(tmp_path, "pytorch_model.bin: torch cannot load it")
    torch.save({"weight": print}, file)  # refused: unpickling it would run code
    fails(tmp_path, "pytorch_model.bin: torch cannot load it")


def test_torch_is_optional(directory, monkeypatch):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    fails(directory, "needs torch, which is not installed", kind=ImportError)


def test_missing_files(directory, tmp_path_factory):
    fails(directory / "nowhere" / "at" / "all", "no such file", kind=FileNotFoundError)
    fails(tmp_path_factory.mktemp("empty"), "no config.json", kind=FileNotFoundError)
    (directory / "model.safetensors").unlink()
    fails(directory, "no weights in this directory", kind=FileNotFoundError)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(directory, "2 of 2 shards", "model-1.safetensors, model-2", kind=FileNotFoundError)
    (directory / "config.json").write_text("{")
    fails(directory, "config.json: not JSON")


def test_config_errors_name_the_file(directory):
    config = json.loads((directory / "config.json").read_text()) | {"clip_qkv": 8.0}
    (directory / "config.json").write_text(json.dumps(config))
    fails(directory, "config.json: 1 thing(s)", "clip_qkv = 8.0: unknown key")


def test_head_beside_tied_embedding(directory):
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    fails(directory, "lm_head.weight differs", "tie_word_embeddings", then=lambda c: c.rest())

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    assert "head" not in open_checkpoint(edit(directory, change)).rest()


def test_hub(directory, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        if name == "owner/away":
            raise LocalEntryNotFoundError("no connection")
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("owner/model").path == directory
    fails("owner/away", "no connection", "hub", kind=FileNotFoundError)
    assert asked == ["owner/model", "owner/away"]


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
    """As few rows as fit `ROW_BYTES`, the values in order, none cut; vectors as they are."""
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
