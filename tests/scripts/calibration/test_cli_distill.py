"""``lordjax compress --distill``: what is written, and which command lines are refused."""

import json

import numpy as np
import pytest
from commands import WINDOW, calibration, fails, run

from lordjax import load
from lordjax.kernels import trees
from lordjax.scripts.report.page import without_times
from lordjax.storage.saved_model import open_saved

TOKENS = 40 * WINDOW + 5  # not whole sequences
METHODS = {
    "modegpt": ("--keep", 0.5),
    "nf": ("--method", "nf", "--format", "nf2"),
    "lq": ("--method", "lq", "--format", "nf2", "--rank", 4, "--factors", "nf8"),
}


def compressed(tiny, text, out, method, *more):
    options = (*METHODS[method], *calibration(text), *more, "--json")
    result = run("compress", tiny, out, *options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), result.stderr


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_a_distilled_model_is_an_ordinary_one_of_the_same_size(tiny, text, tmp_path, method):
    plain, _ = compressed(tiny, text, tmp_path / "plain", method)
    assert plain["distillation"] is None
    found, progress = compressed(
        tiny, text, tmp_path / "out", method, "--distill", TOKENS, "--distill-rate", "1e-2"
    )
    facts = found["distillation"]
    assert facts["tokens"] == 40 * WINDOW
    assert facts["held_out_tokens"] == 4 * WINDOW
    assert facts["kept"] == (facts["after"]["divergence"] < facts["before"]["divergence"])
    assert "distill: 40/40" in progress
    assert found["bytes"] == plain["bytes"]
    saved = [open_saved(tmp_path / name) for name in ("plain", "out")]
    shapes = [saved[0].shapes(), saved[1].shapes()]
    assert shapes[0] == shapes[1]
    for key in ("kinds", "constants"):
        assert saved[0].meta[key] == saved[1].meta[key]
    assert not list(tmp_path.glob("out.*"))
    arrays = [trees.arrays(load(tmp_path / name)[1]) for name in ("plain", "out")]
    changed = {path for path, a in arrays[0].items() if not np.array_equal(a, arrays[1][path])}
    assert any("norm/scale" in path for path in changed) == facts["kept"]
    assert not any(path.endswith("/codes") and "low_rank" not in path for path in changed)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["distillation"] == facts
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{facts['after']['divergence']:.4f} after" in page
    assert "peak memory with it" in page
    assert "peak memory with it" not in without_times(page)


@pytest.mark.full
def test_weights_that_training_makes_worse_are_kept(tiny, text, tmp_path):
    compressed(tiny, text, tmp_path / "plain", "nf")
    options = (*METHODS["nf"], *calibration(text), "--distill", TOKENS, "--distill-rate", 30)
    result = run("compress", tiny, tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    assert "distillation did not help, so the weights before it are kept" in result.stdout
    first, second = (load(tmp_path / name)[1] for name in ("plain", "out"))
    for path, a in trees.arrays(first).items():
        np.testing.assert_array_equal(a, trees.arrays(second)[path], err_msg=path)


def test_command_lines_that_are_refused(tiny, text, tmp_path):
    def refused(message, *options):
        fails(message, "compress", tiny, tmp_path / "out", *calibration(text), *options)
        assert not list(tmp_path.iterdir())

    refused("--distill", "--distill", 0)
    refused("--distill 31: fewer tokens than one calibration sequence", "--distill", 31)
    refused("expected 31250 to train on and 8 that are held out", "--distill", 10**6)
    refused("cannot be combined with --elastic", "--distill", 64, "--elastic")
    refused("leave --mesh", "--distill", 64, "--mesh", "data=1")
    refused("--distill-rate needs --distill", "--distill-rate", 0.1)
    refused("--distill-dtype needs --distill", "--distill-dtype", "bfloat16")
