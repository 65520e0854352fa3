"""The whole file: embeddings as codes and budgets of a file's bytes, through the command line."""

import json

import click
import numpy as np
import pytest
from commands import WINDOW, calibration, fails, run

from lordjax.scripts.flags.types import BYTES
from lordjax.scripts.verbs import compress
from lordjax.storage.saved_model import open_saved

pytestmark = pytest.mark.full
EMBED = "embed/embedding"


def file_bytes(directory):
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def perplexity(directory, text):
    shown = run(
        "evaluate", directory, "--tokens", text, "--windows", 2, "--seq-len", WINDOW, "--json"
    )
    assert shown.exit_code == 0, shown.stderr
    return json.loads(shown.stdout)["perplexity"]


@pytest.fixture(scope="module")
def small(tiny, text, tmp_path_factory):
    """A low-rank model with its embedding in codes."""
    out = tmp_path_factory.mktemp("tables") / "small"
    options = (*calibration(text), "--method", "svd", "--keep", "0.7", "--embeddings", "nf4")
    made = run("compress", tiny, out, *options, "--json")
    assert made.exit_code == 0, made.stderr
    return out, json.loads(made.stdout)


def test_summary_and_inspect_say_what_is_stored(small):
    out, summary = small
    assert summary["file_bytes"] == file_bytes(out)
    assert summary["tables"][EMBED] == "nf4"
    row = json.loads(run("inspect", out, "--json").stdout)["parameters"][EMBED]
    assert row["kind"] == "nf_quantized"
    assert 4 < row["bits"] < 5.5


def test_a_model_with_coded_tables_is_used_as_any_other(small, text):
    out, _ = small
    assert np.isfinite(perplexity(out, text))
    assert run("generate", out, "the", "--max-new-tokens", 3).exit_code == 0


def test_exports_decode_the_tables(small, text, tmp_path):
    out, _ = small
    made = run("export", out, tmp_path / "dense", "--to", "dense")
    assert made.exit_code == 0, made.stderr
    assert perplexity(tmp_path / "dense", text) == pytest.approx(perplexity(out, text), rel=1e-4)


def test_a_budget_of_bytes_is_planned_and_kept(tiny, text, tmp_path):
    """`plan` says about the bytes that `compress` keeps within the budget."""
    budget = ("--method", "nf", "--weighting", "both", "--file-bytes", "30kB")
    planned = run("plan", tiny, *budget, "--samples", 4, "--seq-len", WINDOW, "--json")
    assert planned.exit_code == 0, planned.stderr
    assert 10_000 < json.loads(planned.stdout)["after"]["bytes"] <= 30_000
    made = run("compress", tiny, tmp_path / "out", *calibration(text), *budget, "--json")
    assert made.exit_code == 0, made.stderr
    summary = json.loads(made.stdout)
    assert summary["file_bytes"] == file_bytes(tmp_path / "out") <= 30_000
    assert open_saved(tmp_path / "out").plan().file_bytes == 30_000


def test_a_budget_that_cannot_be_met_says_what_can(tiny, text, tmp_path):
    options = (*calibration(text), "--file-bytes", "1000")
    for method in ("nf", "svd"):
        fails("need at least", "compress", tiny, tmp_path / "a", *options, "--method", method)
        fails("need at least", "plan", tiny, "--method", method, "--file-bytes", "1000")
    fails("both are budgets", "compress", tiny, tmp_path / "a", *options, "--keep", "0.5")
    fails("no format", "compress", tiny, tmp_path / "a", *calibration(text), "--embeddings", "int8")


def test_a_budget_that_cannot_be_met_is_refused_before_data_is_read(tiny, tmp_path, monkeypatch):
    """The model may have to write its own calibration text first, which takes minutes."""
    monkeypatch.setattr(compress, "_data", lambda *_, **__: pytest.fail("data was read"))
    for method in ("nf", "svd", "auto"):
        out = tmp_path / method
        fails("need at least", "compress", tiny, out, "--method", method, "--file-bytes", "1000")
        assert not out.exists()


def test_numbers_of_bytes_take_units():
    sizes = {"60000000": 60_000_000, "60MB": 60_000_000, "2 kB": 2000, "1.5GiB": 3 * 2**29}
    assert {text: BYTES.convert(text, None, None) for text in sizes} == sizes
    for wrong in ("60XB", "MB", "-1MB", "0MB", "1e3MB"):
        with pytest.raises(click.BadParameter):
            BYTES.convert(wrong, None, None)
