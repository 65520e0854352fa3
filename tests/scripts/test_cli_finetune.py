"""``lordjax finetune``, ``merge`` and ``plan --finetune``, through the command line."""

import json

import jax
import numpy as np
import pytest
from commands import WINDOW, calibration, fails, run

from lordjax import load, perplexity
from lordjax.kernels import trees
from lordjax.kernels.quantized import LowRankPlusQuantized

QUICK = ("--steps", 12, "--batch", 4, "--every", 6, "--learning-rate", "1e-2")


@pytest.fixture(scope="module")
def documents(text, tmp_path_factory):
    """The lines of the text, eight to a document."""
    lines = text.read_text().splitlines()
    path = tmp_path_factory.mktemp("documents") / "text.jsonl"
    parts = ("\n".join(lines[i : i + 8]) for i in range(0, len(lines), 8))
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return path


def finetune(*arguments):
    result = run("finetune", *arguments, *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), result.stderr


@pytest.fixture(scope="module")
def qlora(tiny, documents, tmp_path_factory):
    out = tmp_path_factory.mktemp("qlora") / "model"
    options = ("--data", documents, "--seq-len", WINDOW, "--recipe", "qlora", "--rank", 4)
    return (out, *finetune(tiny, out, *options, "--validation", 0.2))


def test_what_is_written(qlora):
    out, summary, progress = qlora
    assert summary["steps"] == 12
    assert summary["validation_after"] < summary["validation_before"]
    assert "step 12/12: loss" in progress
    assert "tokens/s" in progress
    report = json.loads((out / "report.json").read_text())["finetune"]
    assert report["recipe"]["codes"] == "nf4"
    assert report["validation_after"] == summary["validation_after"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == [0, 6, 12]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    flat = trees.flatten(load(out)[1])
    assert isinstance(flat["layer_0/mlp/up/kernel"], LowRankPlusQuantized)


@pytest.mark.full
def test_merging_to_dense_is_the_same_model(qlora, text, tmp_path):
    out = qlora[0]
    result = run("merge", out, tmp_path / "dense", "--to", "dense", "--json")
    assert result.exit_code == 0, result.stderr
    config, params = load(tmp_path / "dense")
    assert all(isinstance(leaf, np.ndarray | jax.Array) for leaf in trees.flatten(params).values())
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, WINDOW), np.int32)
    a, b = (perplexity(config, p, tokens)["perplexity"] for p in (load(out)[1], params))
    assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.full
def test_a_run_goes_on_where_it_is_the_same(qlora, tiny, documents, tmp_path):
    out, summary, _ = qlora
    options = ["--data", documents, "--seq-len", WINDOW, "--recipe", "qlora", "--rank", 4]
    options += ["--validation", 0.2, "--run", summary["run"], *QUICK]
    fails("a run is there; go on with --resume", "finetune", tiny, tmp_path / "b", *options)
    again = run("finetune", tiny, tmp_path / "c", *options, "--resume", "--json")
    assert again.exit_code == 0, again.stderr
    for path, leaf in trees.arrays(load(out)[1]).items():
        np.testing.assert_array_equal(leaf, trees.arrays(load(tmp_path / "c")[1])[path])
    fails(
        "recipe.learning_rate: 0.01 -> 0.02",
        *("finetune", tiny, tmp_path / "d", *options, "--resume", "--learning-rate", "2e-2"),
    )


@pytest.mark.full
def test_recovery_keeps_the_kind_of_the_model(tiny, documents, text, tmp_path):
    small = tmp_path / "small"
    made = run(
        *("compress", tiny, small, "--method", "lord", "--keep", 0.6, *calibration(text), "--json")
    )
    assert made.exit_code == 0, made.stderr
    options = ("--data", documents, "--seq-len", WINDOW, "--recipe", "factors")
    distilled = (*options, "--teacher", tiny, "--distill", 0.5)
    summary, _ = finetune(small, tmp_path / "out", *distilled, "--validation", 0.2)
    assert summary["validation_after"] < summary["validation_before"]
    shapes = [
        {path: np.shape(a) for path, a in trees.arrays(load(path)[1]).items()}
        for path in (small, tmp_path / "out")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.full
def test_instructions(tiny, tmp_path):
    records = [{"instruction": f"add {i} and 1", "output": str(i + 1)} for i in range(24)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    summary, _ = finetune(
        tiny, tmp_path / "out", "--data", tmp_path / "data.json", "--rank", 4, "--recipe", "lora"
    )
    assert summary["validation_after"] < summary["validation_before"]
    kinds = {type(leaf) for leaf in trees.flatten(load(tmp_path / "out")[1]).values()}
    assert LowRankPlusQuantized not in kinds  # folded in


def test_bad_arguments(tiny, documents, tmp_path):
    out, data = tmp_path / "out", ("--data", documents, "--seq-len", WINDOW)
    for message, *options in (
        ("no recipe 'qlor'; did you mean qlora", *data, "--recipe", "qlor"),
        ("this recipe adds no adapters", *data, "--recipe", "full", "--rank", 3),
        ("but no parameter of the model matches", *data, "--recipe", "lq-lora"),
        ("--distill is the weight of a --teacher", *data, "--distill", 0.5),
        ("a batch that accumulate divides", *data, "--accumulate", 3),
        ("no such file", "--data", tmp_path / "none.txt"),
        ("only encoders are supported", "--data", _labelled(tmp_path)),
        ("devices asked for; there are", *data, "--devices", 64),
    ):
        fails(message, "finetune", tiny, out, *options)
        assert not out.exists(), message
    fails("choose an output apart from it", "finetune", tiny, tiny, *data)


def _labelled(folder):
    path = folder / "data.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"text {i}\t{i % 2}\n" for i in range(20)))
    return path


@pytest.mark.full
def test_plan_counts_a_step(tiny):
    options = ("--method", "svd", "--keep", 0.5, "--allocation", "uniform", "--seq-len", WINDOW)
    result = run("plan", tiny, *options, "--finetune", "qlora", "--rank", 4, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["finetune"]
    assert found["after"]["base"] < found["before"]["base"]
    for part in ("before", "after"):
        parts = (found[part][name] for name in ("base", "trained", "activations"))
        assert found[part]["total"] == sum(parts)
    fails("needs ranks, which depend on calibration", "plan", tiny, "--finetune", "qlora")
