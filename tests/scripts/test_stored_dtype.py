"""Weights of a quantised GGUF file are computed with in float32 and stored as bfloat16."""

import json

import jax
import numpy as np
import pytest
import tiny_gguf
from click.testing import CliRunner

from lordjax.conversions import open_checkpoint
from lordjax.kernels import trees
from lordjax.kernels.kinds import astype
from lordjax.kernels.quantized import NFQuantized
from lordjax.scripts.cli import cli
from lordjax.scripts.report.page import PAGE, without_times
from lordjax.storage import saved_model

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Qwen2's architecture, whose biases are changed by methods that correct them."""
    return tiny_gguf.write(tmp_path_factory.mktemp("model") / "model.gguf", "Q4_0", "qwen2")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(1).integers(0, 200, (4, 32)))
    return path


def run(*arguments):
    result = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result


def dtypes(directory):
    """Those of the arrays of a directory of ours, but for codes."""
    leaves = saved_model.open_saved(directory).leaves().values()
    return {str(leaf.dtype) for leaf in leaves if not isinstance(leaf, NFQuantized)}


def files(directory):
    return {file.name: file.read_bytes() for file in directory.glob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("kind", "stored"),
    [("Q4_0", "bfloat16"), ("Q8_0", "bfloat16"), ("F32", None), ("F16", None), ("BF16", None)],
)
def test_quantised_files_name_a_dtype(tmp_path, kind, stored):
    opened = open_checkpoint(tiny_gguf.write(tmp_path / "model.gguf", kind))
    assert opened.stored_dtype == stored
    for source, expected in ((opened, "float32"), (opened.as_stored(), stored or "float32")):
        assert {str(leaf.dtype) for leaf in source.leaves().values()} == {expected}
        assert {str(leaf.dtype) for leaf in trees.flatten(source.params()).values()} == {expected}


def test_what_is_stored_is_the_float32_result_rounded(model, tokens, tmp_path):
    """And the forecast, the report and the files agree on its bytes."""
    options = ("--method", "modegpt", "--keep", "0.6", "--allocation", "uniform")
    given = ("--calibration", tokens, "--json")
    planned = json.loads(run("plan", model, *options, "--no-measure", "--json").stdout)
    found = json.loads(run("compress", model, tmp_path / "small", *options, *given).stdout)
    run("compress", model, tmp_path / "wide", *options, *given, "--dtype", "float32")
    assert dtypes(tmp_path / "small") == {"bfloat16"}
    assert dtypes(tmp_path / "wide") == {"float32"}
    small, wide = (saved_model.open_saved(tmp_path / name).params() for name in ("small", "wide"))
    jax.tree.map(np.testing.assert_array_equal, small, astype(wide, "bfloat16"))
    assert found["settings"]["dtype"] == "bfloat16"  # so a run that was begun in float32 is refused
    assert planned["after"]["bytes"] == found["bytes"] == found["predicted"]["bytes"]
    shown = json.loads(run("inspect", tmp_path / "small", "--json").stdout)
    assert shown["bytes"] == found["bytes"]


@pytest.mark.parametrize("options", [("nf", "--format", "nf4"), ("lq", "--format", "nf3")])
def test_arrays_beside_codes_are_bfloat16(model, tmp_path, options):
    options = ("--method", *options, *(("--rank", 4) if options[0] == "lq" else ()))
    planned = json.loads(run("plan", model, *options, "--no-measure", "--json").stdout)
    found = json.loads(run("compress", model, tmp_path / "out", *options, "--json").stdout)
    assert planned["after"]["bytes"] == found["bytes"] == found["predicted"]["bytes"]
    saved = saved_model.open_saved(tmp_path / "out")
    assert str(saved.leaves()["embed/embedding"].dtype) == "bfloat16"
    kernel = saved.leaves()["layer_0/mlp/up/kernel"]
    assert isinstance(kernel, NFQuantized) or str(kernel.low_rank.dtype) == "bfloat16"


@pytest.mark.parametrize("method", ["modegpt", "lord-affine"])
def test_a_budget_of_an_elastic_model_is_stored_like_a_compression(model, tokens, tmp_path, method):
    whole, small, direct = (tmp_path / name for name in ("whole", "small", "direct"))
    options = ("--method", method, "--calibration", tokens)
    run("compress", model, whole, *options, "--elastic")
    run("compress", model, direct, *options, "--keep", 0.6)
    run("export", whole, small, "--keep", 0.6)
    # What budgets are cut from is not rounded.
    assert dtypes(whole) == {"float32"}
    assert dtypes(small) == {"bfloat16"}
    ours, theirs = files(small), files(direct)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"report.json", "checksums.json", PAGE}:
        assert ours[name] == theirs[name], name
    pages = [without_times(found[PAGE].decode()) for found in (ours, theirs)]
    assert pages[0] == pages[1]


def test_every_verb_that_writes_stores_bfloat16(model, tmp_path):
    run("convert", model, tmp_path / "native")
    run("merge", model, tmp_path / "merged")
    assert dtypes(tmp_path / "native") == dtypes(tmp_path / "merged") == {"bfloat16"}
    run("convert", model, tmp_path / "hf", "--to", "hf")
    run("export", model, tmp_path / "dense", "--to", "dense")
    assert files(tmp_path / "hf") == files(tmp_path / "dense")
    reopened = open_checkpoint(tmp_path / "dense")
    assert {str(leaf.dtype) for leaf in reopened.leaves().values()} == {"bfloat16"}
    assert reopened.hf_config["dtype"] == "bfloat16"
    run("convert", model, tmp_path / "wide", "--dtype", "float32")
    assert dtypes(tmp_path / "wide") == {"float32"}
