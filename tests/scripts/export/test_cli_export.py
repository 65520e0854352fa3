"""The verbs export and convert, through the command line."""

import json
import shutil

import numpy as np
import pytest
from commands import WINDOW, calibration, fails, run
from safetensors.numpy import load_file, save_file

from lordjax import load
from lordjax.conversions.exporters import verify
from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.kernels import normal_float, trees
from lordjax.storage.saved_model import open_saved

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT asks for it
)


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory):
    """The tiny model as codes and products of rank 12."""
    out = tmp_path_factory.mktemp("quantized") / "model"
    options = ("--method", "lq", "--format", "nf4", "--rank", 12, "--dtype", "float32")
    assert run("compress", tiny, out, *options).exit_code == 0
    return out


@pytest.mark.quick("dense", "factored")
@pytest.mark.parametrize("to", ["dense", "factored", "orbax"])
def test_export_and_verification(compressed, text, tmp_path, to):
    model, out = compressed[0], tmp_path / "out"
    found = run("export", model, out, "--to", to, "--verify", "--tokens", text, "--json")
    assert found.exit_code == 0, found.stderr
    summary = json.loads(found.stdout)
    assert summary["verify"]["logit_difference"] < 1e-5
    assert summary["verify"]["passed"]
    assert summary["bytes"] == sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    assert (out / "tokenizer.json").read_text() == (model / "tokenizer.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_ignored_key_stays_in_the_result(tiny, tmp_path):
    """Written once, the model opens again without the flag, here and as another export."""
    model, out, again = (tmp_path / name for name in ("model", "out", "again"))
    shutil.copytree(tiny, model)
    config = json.loads((model / "config.json").read_text()) | {"tide": 0.5}
    (model / "config.json").write_text(json.dumps(config))
    fails("tide = 0.5: unknown key, it may change the model; if", "convert", model, out)
    fails("has no such key; did you mean tide?", "inspect", model, "--ignore-key", "tode")
    assert run("convert", model, out, "--ignore-key", "tide").exit_code == 0
    assert open_saved(out).hf_config["lordjax_ignored_keys"] == ["tide"]
    assert run("export", out, again, "--to", "dense").exit_code == 0
    assert open_checkpoint(again).config == open_checkpoint(tiny).config


@pytest.mark.full
def test_methods_and_default_tokens(tiny, text, tmp_path):
    """Modules that became narrower; the standard library where there are no other tokens."""
    options = (*calibration(text), "--method", "modegpt-cr", "--keep", 0.5)
    assert run("compress", tiny, tmp_path / "model", *options).exit_code == 0
    for to in ("dense", "factored"):
        found = run("export", tmp_path / "model", tmp_path / to, "--to", to, "--verify")
        assert found.exit_code == 0, found.stderr
        assert "largest difference of logits" in found.stdout


@pytest.mark.full
def test_an_adapter(quantized, text, tmp_path, monkeypatch):
    arguments = ("export", quantized, tmp_path / "out", "--to", "peft", "--verify")
    found = run(*arguments, "--tokens", text, "--json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["notes"] == []
    monkeypatch.setattr("lordjax.conversions.exporters.factored.VLLM_RANK", 8)
    found = run("export", quantized, tmp_path / "again", "--to", "peft")
    assert "--max-lora-rank 12" in found.stderr


def test_a_difference_is_an_error(compressed, text, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "TOLERANCE", 0)
    monkeypatch.setattr(verify, "STEPS", 0)
    options = ("--to", "dense", "--verify", "--tokens", text)
    found = run("export", compressed[0], tmp_path / "out", *options)
    assert found.exit_code == 1
    assert "error: " in found.stderr and "its logits differ from those of" in found.stderr


def test_wrong_exports(tiny, compressed, text, tmp_path, monkeypatch):
    model, out = compressed[0], tmp_path / "out"
    fails("no such file", "export", tmp_path / "nothing", out, "--to", "dense")
    fails("--to", "export", model, out)
    fails("'onnx' is not one of", "export", model, out, "--to", "onnx")
    fails(
        "--tokens is used by --verify only", "export", model, out, "--to", "dense", "--tokens", text
    )
    fails("nothing to make an adapter of", "export", model, out, "--to", "peft")
    fails("not an empty directory", "export", model, tiny, "--to", "dense")
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    fails("tokenizer.json: is missing", "export", bare, out, "--to", "dense", "--verify")
    fails("no tokenizer", "export", bare, out, "--to", "dense", "--verify", "--no-verify")
    find = verify.importlib.util.find_spec
    monkeypatch.setattr(
        verify.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    fails("pip install 'lordjax[export]'", "export", model, out, "--to", "dense", "--verify")
    assert not out.exists()


# --- convert -------------------------------------------------------------------------------------


def equal(a, b):
    a, b = trees.flatten(a), trees.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path])


def test_there_and_back(tiny, text, tmp_path):
    """Hugging Face to ours to Hugging Face; every verb takes what is ours."""
    ours, back = tmp_path / "ours", tmp_path / "back"
    for source, out, to in ((tiny, ours, "native"), (ours, back, "hf")):
        found = run("convert", source, out, "--to", to, "--shard-bytes", 20_000, "--json")
        assert found.exit_code == 0, found.stderr
        assert json.loads(found.stdout)["bytes"] == sum(
            file.stat().st_size for file in out.glob("*.safetensors")
        )
        assert len(list(out.glob("*.safetensors"))) > 1
    original = open_checkpoint(tiny)
    equal(load(ours)[1], original.params())
    equal(open_checkpoint(back).params(), original.params())
    assert open_checkpoint(back).hf_config == original.hf_config

    assert json.loads(run("inspect", ours, "--json").stdout)["kind"] == "native"
    arguments = ("--tokens", text, "--seq-len", WINDOW, "--windows", 2, "--json")
    losses = [
        json.loads(run("evaluate", model, *arguments).stdout)["nll_per_token"]
        for model in (tiny, ours, back)
    ]
    assert losses[0] == losses[1] == losses[2]
    small = tmp_path / "small"
    made = run("compress", ours, small, *calibration(text), "--method", "svd")
    assert made.exit_code == 0, made.stderr
    fails("compressed already", "compress", small, tmp_path / "new", *calibration(text))


@pytest.mark.parametrize("to", ["native", "hf"])
def test_another_dtype(tiny, tmp_path, to):
    out = tmp_path / "out"
    assert run("convert", tiny, out, "--to", to, "--dtype", "bfloat16").exit_code == 0
    rows = json.loads(run("inspect", out, "--json").stdout)["parameters"].values()
    assert {row["dtype"] for row in rows} == {"bfloat16"}


@pytest.mark.full
def test_codes_keep_their_dtypes(quantized, tmp_path):
    assert run("convert", quantized, tmp_path / "out", "--dtype", "float16").exit_code == 0
    (_, before), (_, after) = load(quantized), load(tmp_path / "out")
    a, b = (tree["layer_0"]["mlp"]["up"]["kernel"] for tree in (before, after))
    assert a.base.format == b.base.format
    equal(*({n: getattr(k.base, n) for n in normal_float.Packed._fields} for k in (a, b)))
    assert b.low_rank.dtype == after["final_norm"]["scale"].dtype == np.float16
    assert open_saved(tmp_path / "out").plan() == open_saved(quantized).plan()


def test_wrong_conversions(tiny, tmp_path):
    out = tmp_path / "out"
    fails("choose an output apart from it", "convert", tiny, tiny)
    fails("--dtype", "convert", tiny, out, "--dtype", "int8")
    fails("--shard-bytes", "convert", tiny, out, "--shard-bytes", 0)
    big = tmp_path / "big"
    shutil.copytree(tiny, big)
    tensors = load_file(big / "model.safetensors")
    tensors["model.norm.weight"] = 1e6 * tensors["model.norm.weight"]
    save_file(tensors, big / "model.safetensors", {"format": "pt"})
    for to in ("native", "hf"):
        fails("is not finite", "convert", big, out, "--to", to, "--dtype", "float16")
    assert not out.exists()
