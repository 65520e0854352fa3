"""`lordjax plan` and reports: what is predicted is what comes out."""

import json

import pytest
from commands import WINDOW, calibration, fails, run

from lordjax.forecast import machine_rates
from lordjax.runtime import gpu_compiler
from lordjax.runtime.cards import CARDS


def test_plan_counts_what_compress_writes(tiny, text, tmp_path):
    """From config.json alone, also where the budget is given as ranks."""
    given = ("--method", "svd-llm", "--ranks", "mlp/.*=8", "--json")
    planned = run("plan", tiny / "config.json", *given, "--no-measure")
    assert planned.exit_code == 0, planned.stderr
    planned = json.loads(planned.stdout)
    done = run("compress", tiny, tmp_path / "out", *calibration(text), *given)
    assert done.exit_code == 0, done.stderr
    there = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert there["bytes"] == json.loads(done.stdout)["bytes"] == planned["after"]["bytes"]
    assert there["weights"] == planned["after"]["parameters"]
    assert there["block_linear"]["weights"] == planned["after"]["block_linear_weights"]
    assert (
        planned["before"]["parameters"]
        == json.loads(run("inspect", tiny, "--json").stdout)["weights"]
    )


def test_plan_of_a_budget_alone(tiny):
    """Where ranks depend on data, uniform ones, and it says so."""
    options = ("--keep", "0.5", "--no-measure")
    planned = json.loads(run("plan", tiny, *options, "--json").stdout)
    before, after = planned["before"], planned["after"]
    assert after["block_linear_weights"] <= before["block_linear_weights"] / 2
    saved = before["block_linear_weights"] - after["block_linear_weights"]
    assert before["bytes"] - after["bytes"] == 4 * saved
    assert "estimate" in planned["ranks_are"]
    assert "seconds" not in planned["cost"]
    assert "an estimate: the policy decides" in run("plan", tiny, *options).stdout
    shown = run("plan", tiny, "--method", "rom", "--no-measure").stdout
    assert "estimate" not in shown
    assert "attention/q" in shown
    assert "dense" in shown


def test_plan_expects_a_time(tiny, monkeypatch):
    monkeypatch.setattr(machine_rates, "SIZE", {"cpu": 128})
    options = ("--samples", 8, "--seq-len", WINDOW, "--method", "lord")
    found = json.loads(run("plan", tiny, *options, "--json").stdout)["cost"]
    low, high = found["range"]
    assert low < found["seconds"]["total"] < high
    assert set(found["seconds"]) > {"gradients", "statistics", "factors", "apply", "write"}
    shown = run("plan", tiny, *options).stdout
    assert "compiling" in shown
    assert "peak memory with a work directory" in shown


def test_report_holds_what_was_predicted_and_what_happened(tiny, text, tmp_path):
    out = tmp_path / "out"
    given = ("--method", "svd-llm", "--keep", "0.7")
    shown = run("compress", tiny, out, *calibration(text), *given)
    assert shown.exit_code == 0, shown.stderr
    assert "expected" in shown.stdout
    report = json.loads((out / "report.json").read_text())
    predicted, happened = report["predicted"], report["happened"]
    assert predicted["ranks_are"] == "exact"
    assert predicted["bytes"] == happened["bytes"] == report["bytes"]
    assert "seconds" not in predicted  # a small job
    assert set(happened["flops_per_second"]) == set(predicted["flops"])
    assert happened["peak_rss_bytes"] > 0


def test_bad_plans(tiny, compressed, tmp_path):
    fails("compressed already", "plan", compressed[0])
    fails("no such file or directory", "plan", tmp_path / "nothing")
    fails("did you mean lord", "plan", tiny, "--method", "lort")
    fails("did you mean global", "plan", tiny, "--allocation", "globl")
    fails("did you mean mlp/down", "plan", tiny, "--method", "svd", "--ranks", "mlp/dwn=3")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "new": 1}')
    fails("unknown key", "plan", tmp_path / "config.json")


@pytest.mark.full
def test_codes_are_planned_as_they_come_out(tiny, text, tmp_path):
    options = ("--method", "nf", "--format", "nf4")
    planned = json.loads(run("plan", tiny, *options, "--no-measure", "--json").stdout)
    assert run("compress", tiny, tmp_path / "out", *options).exit_code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert planned["after"]["bytes"] == report["bytes"] == report["predicted"]["bytes"]
    assert report["happened"]["seconds"].keys() >= {"decomposition", "apply"}
    shown = run("plan", tiny, "--method", "auto", "--bits", "9", *calibration(text)[2:])
    assert "an estimate: formats next to the budget" in shown.stdout
    assert "predictions" in shown.stdout


@pytest.mark.full
def test_devices_have_shares_in_plan_and_report(tiny, text, tmp_path):
    options = (*calibration(text), "--method", "lord", "--keep", "0.7", "--mesh", "data=2")
    shown = run("compress", tiny, tmp_path / "out", *options)
    assert shown.exit_code == 0, shown.stderr
    assert "share of each device in its operations" in shown.stdout
    devices = json.loads((tmp_path / "out" / "report.json").read_text())["happened"]["devices"]
    assert set(devices) == {"gradients", "statistics", "factors"}
    for row in devices.values():
        assert row["seconds"] > 0
        assert len(row["flops"]) == len(row["shares"]) == 2
        assert sum(row["shares"]) >= 1 - 1e-9
    planned = json.loads(run("plan", tiny, *options[2:], "--no-measure", "--json").stdout)["cost"]
    assert {name: row["shares"] for name, row in planned["devices"].items()} == {
        name: row["shares"] for name, row in devices.items()
    }


STAGE = {
    "bytes": 2 * 10**9,
    "forecast": 10**9,
    "seconds": 0.25,
    "launches": 1234,
    "sent": 10**6,
    "fits": True,
}


def answered(stages):
    def run_apart(module, task):
        assert module == "lordjax.forecast.compiled.worker"
        answered.task = task
        return stages

    return run_apart


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(gpu_compiler, "require_plugin", lambda: None)


def plan_lord(tiny, *options):
    return run("plan", tiny, "--method", "lord", "--no-measure", *options)


@pytest.mark.parametrize(
    ("device", "says"),
    [
        (("--device", "h300"), "no GPU 'h300'; expected one of h200, h100, a100, l4"),
        (("--device", "h200:0"), "expected h200:N with N from 1 to 64"),
        (("--device", "h200:2", "--mesh", "data=2"), "leave --mesh out"),
    ],
)
def test_wrong_devices_are_one_error(tiny, installed, device, says):
    result = plan_lord(tiny, *device)
    assert result.exit_code == 2 and says in result.stderr
    assert result.stdout == "" and len(result.stderr.strip().splitlines()) == 1


def test_a_missing_plugin_is_one_error_before_anything_is_read():
    result = run("plan", "no-such-model", "--device", "h200")
    assert result.exit_code == 2 and "pip install jax-cuda12-plugin==" in result.stderr


def test_stages_of_the_answer_are_printed(tiny, installed, monkeypatch):
    large = STAGE | {"bytes": 10**12, "fits": False}
    monkeypatch.setattr(
        gpu_compiler, "run_apart", answered({"statistics": STAGE, "factors": large})
    )
    result = plan_lord(
        tiny, "--device", "a100:4", *("--finetune", "lora", "--rank", "4", "--ranks", "mlp/.*=8")
    )
    assert result.exit_code == 0, result.stderr
    assert "as compiled for 4 x A100 SXM 80GB" in result.stdout
    assert "1,234" in result.stdout and "does not fit" in result.stdout
    assert "does not fit: stage factors needs the most" in result.stdout
    task = answered.task
    assert (task.card, task.count, task.batch) == (CARDS["a100"], 4, 1)
    assert task.fine_tuned is not None


def test_the_answer_is_in_the_json(tiny, installed, monkeypatch):
    monkeypatch.setattr(gpu_compiler, "run_apart", answered({"statistics": STAGE}))
    result = plan_lord(tiny, "--device", "h200", "--decode-batch", "32", "--json")
    found = json.loads(result.stdout)["device"]
    assert found["stages"] == {"statistics": STAGE}
    assert (found["card"], found["deciding"]) == ("H200 SXM 141GB", "statistics")
    assert answered.task.batch == 32 and answered.task.fine_tuned is None
