"""A GGUF file that cannot be read ends in one error that names it, and never in a long loop."""

import struct

import gguf
import numpy as np
import pytest
from damage import fails
from gguf_models import write_model
from hf_models import hf_model

from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.conversions.readers.gguf import Gguf

torch = pytest.importorskip("torch")


def test_gguf_problems_are_one_error(tmp_path, model):
    def extra(writer):
        writer.add_expert_count(8)
        writer.add_float32("llama.logit_scale", 2.0)
        writer.add_uint32("llama.odd", 7)
        writer.add_tensor("odd", np.zeros(4, np.int32), raw_dtype=gguf.GGMLQuantizationType.I32)

    path = write_model(tmp_path / "model.gguf", model, extra=extra)
    fails(
        path,
        "4 thing(s)",
        "metadata llama.expert_count = 8: expected 0",
        "metadata llama.logit_scale = 2.0: expected 1.0",
        "metadata llama.odd = 7: expected a key that is known",
        "type I32 (1 tensors, e.g. odd); supported: F32, F16",
    )
    fails(
        write_model(path, model, extra=lambda w: w.add_tensor("odd", np.ones(3, np.float32))),
        "unknown: ",
        "tensor odd (3,)",
    )
    fails(write_model(path, model, architecture="mamba"), "architecture 'mamba'; supported: llama")
    path.write_bytes(path.read_bytes()[:9000])
    fails(path, "not a complete GGUF file")
    path.write_bytes(b"PK" + struct.pack("<Q", 7))
    fails(path, "not a complete GGUF file")
    path.with_suffix(".onnx").write_bytes(b"")
    fails(path.with_suffix(".onnx"), "cannot read this file; expected")


def test_keys_that_say_nothing_and_keys_that_are_ruled_out(tmp_path, model):
    def extra(writer):
        writer.add_expert_count(0)
        writer.add_bool("llama.odd", False)
        writer.add_float32("llama.attention.clamp_kqv", 0.0)
        writer.add_causal_attention(True)
        writer.add_float32("llama.other", 2.0)

    path = write_model(tmp_path / "model.gguf", model, extra=extra)
    fails(path, "1 thing(s)", "metadata llama.other = 2.0")
    assert Gguf(path, ignored=["llama.other"]).hf_config["num_hidden_layers"] == 2


WRONG = {
    "a-text": (lambda w: w.add_string("llama.rope.freq_base", "a"), "= 'a': expected a number"),
    "infinite": (lambda w: w.add_rope_freq_base(float("inf")), "= inf: expected a number"),
    "no-layers": (lambda w: w.add_block_count(0), "block_count = 0: expected a number above 0"),
    "many-layers": (lambda w: w.add_block_count(10**9), "= 1000000000: expected at most 2"),
    "many-heads": (lambda w: w.add_head_count(10**6), "head_count = 1000000: expected what fits"),
    "no-heads": (lambda w: w.add_head_count(0), "head_count = 0: expected a number above 0"),
    "other-width": (lambda w: w.add_embedding_length(64), "embedding_length = 64: expected what"),
    "negative": (lambda w: w.add_int32("llama.block_count", -2), "= -2: expected a number above 0"),
    "per-layer": (lambda w: w.add_head_count_kv([2, 1]), "= [2, 1]: expected one value for all"),
    "rope-type": (lambda w: w.add_string("llama.rope.scaling.type", "x"), "expected one of none"),
    "rope-size": (lambda w: w.add_rope_dimension_count(6), "= 6: expected the head size, 8"),
    "no-tables": (
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
        "longrope scaling of rotary positions and the tables none",
    ),
    "odd-table": (
        lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 7, 2, 5], np.float32)),
        "rope_freqs.weight: expected a table of Llama 3's rotary scaling",
    ),
    "bits": (lambda w: w.add_uint32("general.alignment", 0), "general.alignment = 0"),
    "adapter": (lambda w: w.add_type("adapter"), "general.type is 'adapter', expected 'model'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_value_is_named(tmp_path, model, case):
    change, part = WRONG[case]
    fails(write_model(tmp_path / "model.gguf", model, extra=change), part)


def test_missing_keys_and_tensors_are_named(tmp_path, model):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fails(path, "metadata llama.block_count is missing")
    write_model(path, model, without={"model.norm.weight"})
    fails(path, "missing: model.norm.weight (32,)")


def test_models_that_a_file_cannot_hold_are_refused(tmp_path):
    model = hf_model("gpt_bigcode", {})

    def extra(writer):
        writer.add_head_count_kv(2)

    path = tmp_path / "model.gguf"
    write_model(path, model, extra=extra)
    fails(path, "metadata starcoder.attention.head_count_kv = 2: expected 1")


@pytest.fixture
def small(tmp_path, model):
    """A file with a header of a few hundred bytes."""

    def extra(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b", "ab"])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(1)

    return write_model(tmp_path / "model.gguf", model, extra=extra)


def test_file_that_ends_early_is_one_error(small):
    whole = small.read_bytes()
    for length in [*range(0, 3000, 61), len(whole) - 1]:
        small.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.gguf: not a complete GGUF file") as error:
            open_checkpoint(small)
        assert f"its {length} bytes are truncated or corrupt" in str(error.value)


@pytest.mark.full
def test_changed_bytes_end_in_one_error_or_in_none(small):
    """Also where a length becomes huge: nothing is allocated or counted before it is compared."""
    whole, draw = small.read_bytes(), np.random.default_rng(0)
    for i in range(600):
        changed = bytearray(whole)
        at = draw.integers(4, 3000)
        changed[at : at + 8 * (i % 2) + 1] = bytes([0xFF if i % 3 else draw.integers(256)])
        small.write_bytes(changed)
        try:
            open_checkpoint(small).tokenizer()
        except ValueError as error:
            assert str(small) in str(error)


def test_array_of_impossible_length_is_refused_at_once(tmp_path):
    path = tmp_path / "model.gguf"
    key = b"llama.odd"
    array = struct.pack("<IIQ", 9, 4, 2**60)
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    path.write_bytes(header + struct.pack("<Q", len(key)) + key + array + b"\0" * 64)
    fails(path, f"it announces {2**60} items, but has 64 more bytes")


@pytest.mark.parametrize(
    ("version", "part"), [(1, "its version is 1; supported: 2 and 3"), (3 << 24, "byte order")]
)
def test_other_versions_and_byte_orders_are_named(tmp_path, version, part):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
    fails(path, part)


@pytest.mark.parametrize(
    ("shift", "part"), [(-64, "overlap"), (2**40, "ends at byte"), (2**63, "ends at byte")]
)
def test_tensors_outside_of_their_place_are_named(small, shift, part):
    """The offset of the second tensor is changed; the first one begins at 0."""
    whole = bytearray(small.read_bytes())
    tensors = sorted(gguf.GGUFReader(small).tensors, key=lambda t: t.data_offset)
    field = tensors[1].field
    at = field.offset + sum(part.nbytes for part in field.parts[:-1])
    (offset,) = struct.unpack_from("<Q", whole, at)
    struct.pack_into("<Q", whole, at, offset + shift)
    small.write_bytes(whole)
    fails(small, part)
