"""Values of GGUF files: every type, split files, embedding and head, rotary tables."""

import math

import gguf
import numpy as np
import pytest
from commands import run
from gguf_models import close, stored, write_model
from hf_models import TINY, hf_logits, hf_model, logits, some_tokens

from lordjax.conversions.readers.checkpoint import open_checkpoint, read_config
from lordjax.conversions.readers.gguf import Gguf
from lordjax.conversions.readers.gguf.decode import ROW_BYTES, decodable, longer_rows, read_values
from lordjax.conversions.readers.gguf.header import read_header
from lordjax.conversions.readers.gguf.rotary import llama3_scaling
from lordjax.kernels.trees import flatten
from lordjax.models.config import Rope
from lordjax.models.rope import rope_frequencies
from lordjax.scripts.opened_model import file_bytes, open_model

torch = pytest.importorskip("torch")

# --- Types ---

WIDE = {
    **TINY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "attention_bias": True,
}


def test_types_are_those_that_gguf_decodes():
    assert {"F32", "F16", "BF16", "Q2_K", "Q3_K", "Q8_0", "IQ1_S", "IQ4_XS", "TQ1_0"} <= {
        *decodable()
    }
    assert not {"Q8_1", "I32", "F64"} & {*decodable()}


@pytest.mark.quick("F32", "Q4_1", "Q6_K")
@pytest.mark.parametrize("kind", decodable())
def test_gguf_types(tmp_path, kind):
    model = hf_model("llama", WIDE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3 if parameter.ndim == 2 else 1.0)
    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", model, kind))
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


@pytest.mark.parametrize("shape", [(4, 96), (7, 20000), (6000, 34)])
def test_gguf_rows_are_joined_whole(shape):
    """Rows are joined up to `ROW_BYTES`, in order, and none is cut."""
    data = np.arange(math.prod(shape), dtype=np.uint32).view(np.uint8)
    data = data.reshape(shape[0], 4 * shape[1])
    rows = longer_rows(data)
    np.testing.assert_array_equal(rows.ravel(), data.ravel())
    assert rows.shape[1] % data.shape[1] == 0
    assert rows.shape[1] <= max(ROW_BYTES, data.shape[1])


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("shape", [(4, 96), (5, 6, 64), (9024,), (0, 32), (6000, 32)])
def test_gguf_shapes(shape, kind, tmp_path):
    """Matrices, stacks and vectors are read whole; a vector is not cut inside a block."""
    writer, qtype = gguf.GGUFWriter(tmp_path / "a.gguf", "llama"), gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    data = stored(values, qtype)
    writer.add_tensor("a", data, raw_dtype=qtype)
    close(writer)
    tensor = read_header(tmp_path / "a.gguf").tensors["a"]
    expected = gguf.quants.dequantize(data, qtype).reshape(shape)
    np.testing.assert_array_equal(read_values(tensor), expected)


def test_scale_of_a_tensor_is_multiplied(tmp_path):
    """Types with small floats have a factor per tensor besides, and one for inputs."""
    model = hf_model("llama", {})
    path = write_model(tmp_path / "model.gguf", model, extra=factors)
    read = open_checkpoint(path).read("layer_0/mlp/up/kernel")
    np.testing.assert_array_equal(read, 3 * model.model.layers[0].mlp.up_proj.weight.detach().T)


def factors(writer):
    writer.add_tensor("blk.0.ffn_up.scale", np.array([3.0], np.float32))
    writer.add_tensor("blk.0.ffn_up.input_scale", np.array([5.0], np.float32))


# --- Split files ---


@pytest.fixture
def split(tmp_path):
    """A model, and the files that it is split into."""
    model = hf_model("llama", {})
    write_model(tmp_path / "model.gguf", model, split_max_tensors=5)
    files = sorted(tmp_path.glob("model-*.gguf"))
    assert len(files) > 2
    return model, files


def test_split_model_opens_by_any_file(split):
    model, files = split
    tokens = some_tokens()
    for file in (files[0], files[-1]):
        checkpoint = open_checkpoint(file)
        got = logits(checkpoint.config, checkpoint.params(), tokens)
        np.testing.assert_allclose(got, hf_logits(model, tokens), rtol=0, atol=1e-5)


def test_bytes_of_a_split_model_are_those_of_all_files(split):
    _, files = split
    assert file_bytes(files[1]) == sum(file.stat().st_size for file in files)
    assert open_model(str(files[1])).kind == "gguf"


@pytest.mark.parametrize("name", ["MODEL.GGUF", "sha256-0123"])
def test_file_is_known_by_its_first_bytes_or_any_case_of_its_name(name, model, tmp_path):
    path = write_model(tmp_path / name, model)
    assert open_model(str(path)).kind == "gguf"
    assert read_config(path)[1].num_layers == 2


def test_missing_file_of_a_split_model_is_named(split):
    _, files = split
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of {len(files)} files.*{files[1].name}"):
        open_checkpoint(files[0])


def test_files_of_different_models_do_not_mix(split, tmp_path):
    _, files = split
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(ValueError, match=r"split\.no and split\.count are"):
        open_checkpoint(files[0])
    other = files[0].rename(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"must be named NAME-00001-of-"):
        open_checkpoint(other)


# --- Embedding and head ---


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_equal_embedding_and_head_are_one(kind, tmp_path):
    model = hf_model(kind, {"tie_word_embeddings": True})

    def extra(writer):
        head = model.get_input_embeddings().weight.detach().numpy()
        writer.add_tensor("output.weight", head)

    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", model, extra=extra))
    assert checkpoint.config.tie_embeddings and checkpoint.notes == ()
    got = logits(checkpoint.config, checkpoint.params(), some_tokens())
    np.testing.assert_allclose(got, hf_logits(model, some_tokens()), rtol=0, atol=1e-5)


def test_two_roundings_of_one_matrix_are_both_taken_and_said(tmp_path):
    model = hf_model("gpt2", {"tie_word_embeddings": False})
    model.lm_head.weight.data = model.transformer.wte.weight.data.clone()

    def extra(writer):  # the embedding is Q8_0, the head Q4_0
        qtype = gguf.GGMLQuantizationType.Q4_0
        head = stored(model.lm_head.weight.detach().numpy(), qtype)
        writer.add_tensor("output.weight", head, raw_dtype=qtype)
        values = torch.tensor(gguf.quants.dequantize(head, qtype))
        model.lm_head = torch.nn.Linear(*values.shape[::-1], bias=False)
        model.lm_head.weight = torch.nn.Parameter(values, requires_grad=False)

    names = {"lm_head.weight"}
    path = write_model(tmp_path / "model.gguf", model, "Q8_0", extra, without=names)
    checkpoint = open_checkpoint(path)
    assert not checkpoint.config.tie_embeddings
    (note,) = checkpoint.notes
    for part in (str(path), "token_embd.weight (Q8_0)", "output.weight (Q4_0)", "not tied"):
        assert part in note
    assert f"note: {note}\n" in run("inspect", path).stderr
    got = logits(checkpoint.config, checkpoint.params(), some_tokens())
    np.testing.assert_allclose(got, hf_logits(model, some_tokens()), rtol=0, atol=1e-4)


def test_a_head_of_its_own_needs_no_words(tmp_path):
    model = hf_model("gpt2", {"tie_word_embeddings": False})
    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", model))
    assert not checkpoint.config.tie_embeddings and checkpoint.notes == ()


# --- Rotary scaling ---

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

    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", model, extra=extra))
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


def test_gguf_metadata_numbers(tmp_path, model):
    """Single-precision metadata come out as they were written in config.json."""
    path = write_model(tmp_path / "model.gguf", model)
    assert Gguf(path).hf_config["rms_norm_eps"] == model.config.rms_norm_eps
