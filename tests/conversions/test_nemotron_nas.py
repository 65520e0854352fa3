"""Models whose blocks have MLPs of their own widths: Nemotron-NAS, and `deci` in llama.cpp."""

import dataclasses
import json

import numpy as np
import pytest
import transformers
from hf_models import hf_model, some_tokens
from llama_cpp import opened_by_llama_cpp

from lordjax import save
from lordjax.conversions.exporters.export import export
from lordjax.conversions.exporters.gguf_file import FILE
from lordjax.conversions.exporters.nemotron_nas import multiplier
from lordjax.conversions.exporters.verify import our_logits, target_of, verify
from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.kernels import trees
from lordjax.storage.saved_model import open_saved

TOKENS = some_tokens()
WIDTHS = (256, 512)


def narrowed(directory, kind="llama", widths=WIDTHS, **options):
    """A random model of a family, whose MLPs keep their first neurons."""
    hf_model(kind, {"intermediate_size": 768, **options}).save_pretrained(directory / "in")
    checkpoint = open_checkpoint(directory / "in")
    flat = trees.flatten(checkpoint.params())
    for i, width in enumerate(widths):
        for name in ("gate", "up"):
            path = f"layer_{i}/mlp/{name}/"
            flat |= {p: a[..., :width] for p, a in flat.items() if p.startswith(path)}
        path = f"layer_{i}/mlp/down/kernel"
        flat[path] = flat[path][:width]
    save(
        directory / "model",
        checkpoint.config,
        trees.unflatten(flat),
        hf_config=checkpoint.hf_config,
    )
    return open_saved(directory / "model")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
CASES = {
    "llama": {"num_hidden_layers": 3, "widths": (256, 512, 768)},
    "tied": {"tie_word_embeddings": True},
    "all-heads": {"num_key_value_heads": 4, "head_dim": 8},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "mistral": {"kind": "mistral", "sliding_window": None},
}


@pytest.mark.quick("llama")
@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_the_same(tmp_path, name):
    source = narrowed(tmp_path, **CASES[name])
    export(source, tmp_path / "out", "nemotron-nas")
    found = verify(source, tmp_path / "out", "nemotron-nas", TOKENS)
    assert found["passed"] and found["logit_difference"] < 1e-5
    assert found["target"] == "transformers, with its own code"


def test_the_config_is_what_engines_read(tmp_path):
    """Blocks have attributes, as vLLM reads them; JSON and back is the same config."""
    source = narrowed(tmp_path)
    export(source, tmp_path / "out", "nemotron-nas")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.architectures == ["DeciLMForCausalLM"] and config.model_type == "nemotron-nas"
    assert config.rope_parameters["rope_theta"] == source.config.rope.theta
    widths, groups = [], []
    for block in config.block_configs:
        assert not block.attention.no_op and not block.ffn.no_op
        assert dataclasses.asdict(block)["attention"]["replace_with_linear"] is False
        groups.append(config.num_attention_heads // block.attention.n_heads_in_group)
        width = int(2 * block.ffn.ffn_mult * config.hidden_size / 3)
        widths.append(width if width % 256 == 0 else width + 256 - width % 256)
    assert (*widths,) == WIDTHS and groups == [source.config.num_kv_heads] * 2
    config.save_pretrained(tmp_path / "again")
    first, again = (
        json.loads((tmp_path / d / "config.json").read_text()) for d in ("out", "again")
    )
    assert again["block_configs"] == first["block_configs"]


def test_every_width_has_a_multiplier():
    """By the rule of the engines' loaders, for sizes of real models, also if they round it."""
    for hidden in (*range(64, 4096, 64), 5120, 6144, 8192, 16384):
        for width in range(256, 4 * hidden, 256):
            found = int(2 * multiplier(width, hidden) * hidden / 3)
            assert -(-found // 256) * 256 == width


REFUSED = {
    "gelu": ({"hidden_act": "gelu"}, "have activation silu, this model has gelu"),
    "biases": ({"mlp_bias": True}, "have no biases, which this model has"),
    "head-dim": ({"head_dim": 12}, "have heads of width 8, this model has 12"),
    "window": ({"kind": "mistral", "sliding_window": 7}, "have no sliding window"),
    "qwen2": ({"kind": "qwen2"}, "language models of llama and mistral, not qwen2 with head"),
}


@pytest.mark.quick("biases")
@pytest.mark.parametrize("name", REFUSED)
def test_what_engines_would_run_as_another_model_is_refused(tmp_path, name):
    options, message = REFUSED[name]
    source = narrowed(tmp_path, **options)
    with pytest.raises(ValueError, match=f"nemotron-nas .*{message}.*; export with --to dense"):
        export(source, tmp_path / "out", "nemotron-nas")
    assert not (tmp_path / "out").exists()


def test_other_widths_are_refused(tmp_path):
    source = narrowed(tmp_path, widths=(256, 300))
    wrong = (
        "multiples of 256, but the MLP of block 1 has width 300; compress with --shape per-layer"
    )
    with pytest.raises(ValueError, match=wrong):
        export(source, tmp_path / "out", "nemotron-nas")
    flat = trees.flatten(source.params())
    flat["layer_1/attention/o/kernel"] = flat["layer_1/attention/o/kernel"][:16]
    flat["layer_1/attention/v/kernel"] = flat["layer_1/attention/v/kernel"][:, :8]
    save(tmp_path / "b", source.config, trees.unflatten(flat), hf_config=source.hf_config)
    with pytest.raises(ValueError, match=r"a nemotron-nas export cannot hold narrower .* \(2 of"):
        export(open_saved(tmp_path / "b"), tmp_path / "out", "nemotron-nas")


@pytest.mark.full
@pytest.mark.parametrize("name", [*CASES, "head-dim", "biases"])
def test_llama_cpp_computes_the_same(tmp_path, name):
    """llama.cpp opens `deci` files of any widths, also of such that are no multiples of 256."""
    options = {"biases": {"attention_bias": True, "mlp_bias": True}, "head-dim": {"head_dim": 12}}
    given = {"widths": (256, 300), **{**CASES, **options}[name]}
    source = narrowed(tmp_path, **given)
    export(source, tmp_path / "out", "gguf")
    theirs, ours = opened_by_llama_cpp(tmp_path / "out" / FILE), our_logits(source)
    for window in TOKENS:
        gap, expected = theirs.logits(window) - ours(window[None]), ours(window[None])
        assert np.sqrt((gap**2).mean()) < 2e-3 * expected.std()
        assert np.abs(gap).max() < 2e-2 * expected.std()
    theirs.close()
    found = verify(source, tmp_path / "out", "gguf", TOKENS)
    assert found["passed"] and found["target"] == "llama.cpp"


@pytest.mark.full
def test_widths_that_llama_cpp_has_for_llama_only(tmp_path):
    source = narrowed(tmp_path, kind="qwen2")
    with pytest.raises(ValueError, match="gguf files of qwen2 models have one MLP width for all"):
        export(source, tmp_path / "out", "gguf")
    source = narrowed(tmp_path / "gelu", hidden_act="gelu")
    with pytest.raises(ValueError, match="gguf files cannot say the model's activation"):
        export(source, tmp_path / "out", "gguf")


@pytest.mark.full
def test_without_llama_cpp(tmp_path, monkeypatch):
    """Plain files are opened by our own reader, which says so; files of many widths by none."""
    source = narrowed(tmp_path)
    export(source, tmp_path / "out", "gguf")
    plain = open_checkpoint(tmp_path / "in")
    export(plain, tmp_path / "plain", "gguf")
    monkeypatch.setattr("lordjax.conversions.exporters.llama_cpp.VERSION", "0")
    with pytest.raises(ImportError, match=r"pip install 'lordjax\[llamacpp\]', or leave out --ver"):
        verify(source, tmp_path / "out", "gguf", TOKENS)
    found = verify(plain, tmp_path / "plain", "gguf", TOKENS)
    assert found["passed"] and found["target"] == target_of("gguf")
    assert "own reader, because llama.cpp is not installed" in found["target"]
