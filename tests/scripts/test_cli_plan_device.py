"""``lordjax plan --device``: its errors, and what it prints of an answer."""

import json

import pytest
from commands import run

from lordjax.runtime import gpu_compiler
from lordjax.runtime.cards import CARDS

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


def plan(tiny, *options):
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
    result = plan(tiny, *device)
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
    result = plan(
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
    result = plan(tiny, "--device", "h200", "--decode-batch", "32", "--json")
    found = json.loads(result.stdout)["device"]
    assert found["stages"] == {"statistics": STAGE}
    assert (found["card"], found["deciding"]) == ("H200 SXM 141GB", "statistics")
    assert answered.task.batch == 32 and answered.task.fine_tuned is None
