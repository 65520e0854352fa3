"""The demo on a tiny GGUF file in place of the real model, which takes minutes and a network."""

import json
from types import SimpleNamespace

import pytest
import tiny_gguf
from blocks import GPT2, random_model
from click.testing import CliRunner

from lordjax import factorize, generate, load
from lordjax.kernels import trees
from lordjax.scripts import demo_model
from lordjax.scripts.cli import cli
from lordjax.scripts.verbs import demo, demo_rows
from lordjax.storage.lock import locked

pytestmark = pytest.mark.full

WINDOW = 32
NAMES = ["dense", "modegpt-0.9", "modegpt-0.6", "auto-9", "auto-6.5"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The file in place of the real model; texts and windows are as short as it takes."""
    path = tiny_gguf.write(tmp_path_factory.mktemp("model") / "model.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "fetch_model", lambda: path)
        patch.setattr(demo_model, "WINDOW", WINDOW)
        patch.setattr(demo_rows, "PROMPT", "def f(x):")
        patch.setattr(demo_rows, "NEW", 6)
        yield path


def run(out, *more):
    arguments = ["demo", "--out", out, "--keeps", "0.6,0.9", "--bits", "6.5,9", "--samples", 2]
    arguments += ["--windows", 2, *more]
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def times(out):
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """A demo that is interrupted, goes on, and is asked for once more."""
    del small
    out, measured, done = tmp_path_factory.mktemp("demo") / "out", demo.measured, []

    def interrupted(variant, *rest):
        if variant.name == NAMES[2]:
            raise KeyboardInterrupt
        return measured(variant, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "measured", interrupted)
        stopped, before = run(out), times(out)
        patch.setattr(demo, "measured", lambda v, *rest: done.append(v.name) or measured(v, *rest))
        finished, shown = run(out, "--json"), run(out)
    assert finished.exit_code == shown.exit_code == 0, finished.stderr + shown.stderr
    return SimpleNamespace(
        out=out, stopped=stopped, before=before, done=done, finished=finished, shown=shown
    )


def test_the_table_is_true_of_the_directories(runs, small):
    found, out = json.loads(runs.finished.stdout), runs.out
    assert [row["name"] for row in found["rows"]] == NAMES
    assert found["original"] == {"file": small.name, "bytes": small.stat().st_size}
    for row in found["rows"]:
        files = (out / row["name"]).glob("*.safetensors")
        assert row["bytes"] == sum(file.stat().st_size for file in files)
        params = load(out / row["name"])[1]
        assert str(params["embed"]["embedding"].dtype) == "bfloat16"
        assert row["tokens_per_second"] > 0
        assert row["perplexity"] > 1
        assert row["protocol"] | {"windows": 2, "dtype": "float32"} == row["protocol"]
        assert isinstance(row["text"], str)
    bits = [row["bits_per_weight"] for row in found["rows"]]
    assert bits[0] == 16
    assert all(row["kept"] <= row["budget"] for row in found["rows"][1:3])
    assert all(row["bits_per_weight"] <= row["budget"] for row in found["rows"][3:])
    assert bits[:3] == sorted(bits[:3], reverse=True)
    # Calibrated on modules a-m and measured on others.
    report = json.loads((out / "auto-9" / "report.json").read_text())
    assert report["calibration"]["tokens_sha256"] != found["rows"][0]["protocol"]["tokens_sha256"]
    assert {path.name for path in out.iterdir()} == {*NAMES, "demo.json", "picture.png"}


def test_an_interrupted_demo_goes_on(runs):
    assert runs.stopped.exit_code == 130
    assert f"what is finished is kept in {runs.out}" in runs.stopped.stderr
    assert {path.parent.name for path in runs.before} == set(NAMES)
    assert runs.done == NAMES[2:]  # and nothing in the third run
    assert times(runs.out) == runs.before
    assert f"going on in {runs.out}" in runs.finished.stderr


def test_what_is_shown_ends_with_commands(runs):
    shown, out = runs.shown.stdout, runs.out
    for column in ("on disk", "perplexity", "tokens/s", "GGUF file", "modegpt-0.6", "16.00"):
        assert column in shown
    assert shown.count("def f(x):") == 3  # before, and after by each method
    commands = [line.split()[:2] for line in shown.splitlines()[-3:]]
    assert commands == [["lordjax", verb] for verb in ("generate", "inspect", "compress")]
    assert f"{out}/auto-6.5" in shown


def test_other_settings_and_other_directories_are_refused(small, tmp_path, monkeypatch):
    del small
    monkeypatch.setattr(demo, "make", lambda *_: None)
    monkeypatch.setattr(demo, "measured", lambda *_: {})
    monkeypatch.setattr(demo, "draw_rows", lambda *_: None)
    out = tmp_path / "out"
    assert run(out, "--json").exit_code == 0
    refused = run(out, "--windows", 3)
    assert refused.exit_code == 2
    assert "windows was 2, is 3" in refused.stderr
    assert f"remove {out} to start over" in refused.stderr
    (out / "demo.json").write_text("{")
    assert f"{out / 'demo.json'}: not JSON" in run(out).stderr
    (out / "demo.json").unlink()
    (out / "mine.txt").write_text("precious")
    assert "not an empty directory" in run(out).stderr
    assert (out / "mine.txt").read_text() == "precious"


def test_one_demo_at_a_time(small, tmp_path, monkeypatch):
    """Even one that has not written its record yet."""
    del small
    monkeypatch.setattr(demo, "make", lambda *_: None)
    monkeypatch.setattr(demo, "measured", lambda *_: {})
    monkeypatch.setattr(demo, "draw_rows", lambda *_: None)
    with locked(out := tmp_path / "out", "kept"):
        refused = run(out)
    assert refused.exit_code == 2
    assert f"{out}: another process works here" in refused.stderr
    assert not out.exists()
    assert run(out, "--json").exit_code == 0
    assert [path.name for path in out.iterdir()] == ["demo.json"]


def test_another_form_of_the_model_may_read_the_prompt(monkeypatch):
    """A demo decodes what `generate` does, with the prompt read by the multiplied-out model."""
    monkeypatch.setattr(demo_rows, "NEW", 20)  # more than one chunk
    params, prompt = random_model(GPT2).params, [3, 1, 4, 1, 5]
    low_rank = factorize(params, keep=0.5)
    source = SimpleNamespace(leaves=lambda: trees.flatten(params))
    multiplied_out = demo_rows.in_shapes_of(source, low_rank)
    tokens, speed = demo_rows.decoded(GPT2, low_rank, multiplied_out, prompt)
    assert tokens == generate(GPT2, low_rank, [prompt], max_new_tokens=20)[0].tokens
    assert speed > 0
