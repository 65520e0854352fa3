"""Damaged models, wrong tokens and wrong arguments are one line of error each."""

import json
import shutil

import numpy as np
import pytest
from commands import WINDOW, calibration, fails, run

from lordjax.scripts.cli import cli
from lordjax.scripts.flags.options import output


def edit_config(model, **keys):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def break_weights(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def poison_weights(model):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 4] = np.nan
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: shutil.rmtree(model), "no such file or directory"),
        (lambda model: (model / "config.json").unlink(), "config.json"),
        (lambda model: (model / "model.safetensors").unlink(), "model.safetensors"),
        (break_weights, "model.safetensors"),
        (poison_weights, "layer_1/mlp/up/kernel"),
        (lambda model: edit_config(model, model_type="t5"), "t5"),
        (lambda model: edit_config(model, surprising_key=1), "surprising_key"),
    ],
)
def test_bad_model(tiny, text, tmp_path, damage, message):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    damage(model)
    fails(message, "compress", model, tmp_path / "out", *calibration(text))
    assert not {path.name for path in tmp_path.iterdir()} - {"model"}
    fails(message, "evaluate", model, "--tokens", text, "--seq-len", WINDOW)


def test_damaged_compressed_model(compressed, text, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(compressed[0], model)
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    fails(shard.name, "evaluate", model, "--tokens", text, "--seq-len", WINDOW)
    fails(shard.name, "inspect", model)


def test_changed_values_are_refused_unless_someone_insists(compressed, text, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(compressed[0], model)
    shard = max(model.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    evaluate = ("evaluate", model, "--tokens", text, "--seq-len", WINDOW)
    for command in (evaluate, ("convert", model, out), ("export", model, out, "--to", "dense")):
        fails("was changed after it was written", *command)
        assert not out.exists()
    found = run(*evaluate, "--no-verify", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)["perplexity"] > 0
    assert run("convert", model, out, "--no-verify").exit_code == 0
    assert run("inspect", out).exit_code == 0
    # Small files are compared as soon as the model is opened.
    plan = json.loads((model / "plan.json").read_text())
    (model / "plan.json").write_text(json.dumps({**plan, "keep": 0.6}))
    fails("plan.json: was changed", "inspect", model)
    assert run("inspect", model, "--no-verify").exit_code == 0


def test_every_command_that_opens_a_model_can_insist():
    opening = {
        name
        for name, verb in cli.commands.items()
        if any(p.name in ("model", "models") for p in verb.params)
    }
    assert len(opening) == 12
    for name in opening:
        assert any(p.opts == ["--no-verify"] for p in cli.commands[name].params), name


def test_results_that_are_not_finite_are_null_in_json(capsys):
    found = {"perplexity": float("inf"), "rows": [{"nats": float("nan")}]}
    output(found, True, lambda result: None)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"perplexity": None, "rows": [{"nats": None}]}
    assert "note: rows.0.nats is nan; in JSON it is null" in printed.err


def test_bad_tokens(tiny, tmp_path):
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("abc")
    foreign = tmp_path / "foreign.npy"
    np.save(foreign, np.full((2, WINDOW), 257))
    for path, message in [
        (tmp_path / "nothing.txt", "nothing.txt"),
        (empty, "no text"),
        (short, "3 tokens, fewer than one window of 32"),
        (foreign, "id 257 at window 0, position 0; expected 0 to 256"),
    ]:
        fails(message, "compress", tiny, tmp_path / "out", *calibration(path))
        assert not (tmp_path / "out").exists()
        fails(message, "evaluate", tiny, "--tokens", path, "--seq-len", WINDOW)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", "0"), "(0, 1]"),
        (("--keep", "-0.5"), "(0, 1]"),
        (("--keep", "1.01"), "(0, 1]"),
        (("--keep", "nan"), "(0, 1]"),
        (("--method", "lort"), "did you mean lord"),
        (("--allocation", "globl"), "did you mean global"),
        (("--ranks", "mlp/down"), "is not like mlp/down=256"),
        (("--ranks", "mlp=3", "--keep", "0.5"), "leave --keep and --allocation out"),
        (("--ranks", "mlp/dwn=8", "--method", "svd"), "did you mean mlp/down"),
        (("--ranks", "mlp/down=99", "--method", "svd"), "from 1 to 19, or leave the pattern out"),
        (("--dtype", "int8"), "bfloat16"),
        (("--samples", "0"), "--samples"),
        (("--seq-len", "1"), "--seq-len"),
        (("--unknown", "1"), "--unknown"),
    ],
)
def test_bad_arguments(tiny, text, tmp_path, arguments, message):
    fails(message, "compress", tiny, tmp_path / "out", *calibration(text), *arguments)
    assert not (tmp_path / "out").exists()


def test_bad_output(tiny, compressed, text, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("precious")
    fails("not an empty directory", "compress", tiny, tmp_path / "old", *calibration(text))
    assert (tmp_path / "old" / "file").read_text() == "precious"
    fails("not an empty directory", "compress", tiny, tmp_path / "old" / "file", *calibration(text))
    fails("cannot be created", "compress", tiny, tmp_path / "old/file/out", *calibration(text))
    fails("or quantize it", "compress", compressed[0], tmp_path / "new", *calibration(text))
    fails("not an empty directory", "demo", "--out", tmp_path / "old")


def test_no_disk_space(tiny, text, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    fails("make room", "compress", tiny, tmp_path / "out", *calibration(text))
    fails("make room", "demo", "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_missing_verb_and_traceback_on_request(tiny, text, tmp_path, monkeypatch):
    assert run().exit_code == 2
    fails("inspct", "inspct", tiny)
    monkeypatch.setenv("LORDJAX_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        run("evaluate", tiny, "--tokens", tmp_path / "nothing.txt")
