"""Compiling for a GPU that is not here: the table of cards, the plugin, what is traced."""

import importlib.metadata
import re

import jax
import jax.numpy as jnp
import pytest

from lordjax.calibration.observers import sequences_per_step
from lordjax.runtime import gpu_compiler, target
from lordjax.runtime.cards import CARDS, parse_device


def test_devices_are_a_card_and_a_number():
    assert parse_device("h200") == (CARDS["h200"], 1)
    assert parse_device("a100:8") == (CARDS["a100"], 8)


@pytest.mark.parametrize("text", ["h300", "", "h200:", "h200:0", "h200:-1", "h200:x", "h200:100"])
def test_wrong_devices_are_told_what_is_expected(text):
    with pytest.raises(ValueError, match=r"expected .*N") as error:
        parse_device(text)
    assert repr(text) in str(error.value) or repr(text.partition(":")[0]) in str(error.value)


@pytest.mark.parametrize("name", CARDS)
def test_xla_gets_every_size_of_a_card(name):
    card = CARDS[name]
    numbers = dict(re.findall(r"(\w+): (\d[\d.]*)", card.target_config().splitlines()[0]))
    assert int(numbers["device_memory_size"]) == card.memory
    assert int(numbers["core_count"]) == card.cores
    assert (int(numbers["major"]), int(numbers["minor"])) == card.capability
    # A float32 unit multiplies and adds in one cycle; data sheets round.
    units = 2e9 * card.cores * card.fpus * card.clock
    assert card.rates["float32"] == pytest.approx(units, rel=0.02)


def test_code_for_accelerators_is_traced_for_gpus_that_are_absent():
    def program(x):
        return x * (2 if target.platform() == "gpu" else 1)

    x, jitted = jnp.ones(2), jax.jit(program)
    assert jitted(x)[0] == 1
    here = sequences_per_step(64, 512), target.device_count()
    with target.absent_gpus(8):
        assert target.is_absent()
        assert "2.0" in str(jitted.trace(x).jaxpr)  # what was traced before is forgotten
        assert (sequences_per_step(64, 512), target.device_count()) == (16, 8)
    assert not target.is_absent()
    assert (sequences_per_step(64, 512), target.device_count()) == here
    assert jitted(x)[0] == 1


@pytest.mark.parametrize("version", [None, "0.0.1"])
def test_a_missing_plugin_is_one_error_that_says_what_to_install(monkeypatch, version):
    jaxlib = importlib.metadata.version("jaxlib")

    def installed(name):
        if name == "jaxlib":
            return jaxlib
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(ImportError, match=f"pip install jax-cuda12-plugin=={jaxlib}") as error:
        gpu_compiler.run_apart("lordjax.nothing", None)
    assert error.value.name is None  # so that the command line prints one line
    assert "not installed" in str(error.value) if version is None else version in str(error.value)


def test_a_missing_compiler_is_one_error(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs ptxas of nvidia-cuda-nvcc-cu12"):
        gpu_compiler.require_plugin()


def test_the_process_sees_no_gpu_and_keeps_the_flags_of_xla(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    own = gpu_compiler.environment(tmp_path)
    assert own["JAX_PLATFORMS"] == "cpu"
    assert own["XLA_FLAGS"].split()[0] == "--xla_one=1"
    assert f"--xla_gpu_cuda_data_dir={tmp_path}" in own["XLA_FLAGS"]


SCRIPT = """
from lordjax.runtime.gpu_compiler import answer
def run(task):
    if task == "wrong":
        raise ValueError("expected a right task")
    return {"got": task, "broken": 1 / task}
answer(run)
"""


@pytest.mark.full
def test_a_process_answers_with_its_result_or_its_error(monkeypatch, tmp_path):
    (tmp_path / "apart.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_compiler, "require_plugin", lambda: tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "")
    assert gpu_compiler.run_apart("apart", 4) == {"got": 4, "broken": 0.25}
    with pytest.raises(ValueError, match="expected a right task"):
        gpu_compiler.run_apart("apart", "wrong")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        gpu_compiler.run_apart("apart", 0)
