"""The public names: they resolve, are documented, and cost nothing until they are used."""

import dataclasses
import importlib
import importlib.resources
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import lordjax
from lordjax.models import ModelConfig


@pytest.mark.parametrize("name", lordjax.__all__)
def test_public_name_resolves_and_is_documented(name):
    value = getattr(lordjax, name)
    assert name in dir(lordjax)
    if inspect.isclass(value) or inspect.isroutine(value):
        # A class inherits its parent's docstring; its own is what counts.
        assert value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
        assert value.__name__ == name
        assert value.__module__.startswith("lordjax.")
    else:
        assert name.isupper()  # a constant: a table, documented row by row
        assert all(row.summary for row in value.values())


def test_no_public_name_is_a_module():
    # A submodule of the same name would replace the function once it is imported.
    for name in lordjax.__all__:
        assert not inspect.ismodule(getattr(lordjax, name))
        assert importlib.util.find_spec(f"lordjax.{name}") is None


@pytest.mark.parametrize("module", ["compression", "allocation", "kernels", "storage"])
def test_importing_a_module_leaves_the_functions(module):
    before = {name: getattr(lordjax, name) for name in lordjax.__all__}
    importlib.import_module(f"lordjax.{module}")
    assert all(getattr(lordjax, name) is value for name, value in before.items())
    assert inspect.isfunction(lordjax.compress) and inspect.isfunction(lordjax.allocate)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match=r"'lordjax' has no attribute 'compres'"):
        _ = lordjax.compres


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["jax", "flax", "numpy", "scipy", "torch", "transformers", "optax", "safetensors"]
    code = f"import lordjax, sys; print([m for m in {heavy} if m in sys.modules])"
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_from_import_of_everything_and_no_device_is_touched():
    # Nothing happens at import: modules may import jax, but must not start a backend.
    code = (
        "from lordjax import *\n"
        "import lordjax, pkgutil, importlib\n"
        "for m in pkgutil.walk_packages(lordjax.__path__, 'lordjax.'):\n"
        "    if not m.name.startswith(('lordjax.conversions', 'lordjax.scripts')):\n"
        "        importlib.import_module(m.name)\n"
        "from jax._src import xla_bridge\n"
        "print(callable(compress), callable(factorize), xla_bridge.backends_are_initialized())\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True", "False"]


def test_the_package_runs_like_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "lordjax", "inspect", "nothing"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: nothing: ")
    shown = subprocess.run([sys.executable, "-m", "lordjax", "-h"], capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.startswith("Usage: lordjax [OPTIONS]")


def test_type_checkers_find_the_marker_and_wheels_have_it():
    assert importlib.resources.files("lordjax").joinpath("py.typed").is_file()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["lordjax"]


def test_all_packages_are_in_the_wheel():
    root = Path(__file__).parents[2]
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = setuptools["package-dir"]
    folders = {file.parent.relative_to(root) for file in root.glob("[!.]*/**/__init__.py")}
    listed = set()
    for name in setuptools["packages"]:
        top = max((p for p in places if f"{name}.".startswith(f"{p}.")), key=len)
        listed.add(Path(places[top], *name.removeprefix(top).strip(".").split(".")))
    shipped = {Path(place).parts[0] for place in places.values()}
    assert {folder for folder in folders if folder.parts[0] in shipped} == listed


def test_a_result_is_a_few_lines():
    plan = lordjax.Plan(
        "lord", {"layer_0/mlp/up/kernel": 3, "layer_0/mlp/down/kernel": None}, 0.7, "g"
    )
    config = ModelConfig(61, 32, 64, 2, 4, 4, 8, 48)
    found = {"kept": 0.7, "weights_before": 1000, "weights_after": 700}
    report = {"plan": found, "bytes": 2800}
    result = lordjax.Result(config, {"big": np.zeros((512, 512))}, plan, report)
    lines = repr(result).splitlines()
    assert len(lines) <= 6 and max(map(len, lines)) < 100
    assert lines[0] == "Result(method='lord', keep=0.7, policy='g')"
    assert "2 blocks of width 32" in lines[1] and "1 compressed, 1 dense" in lines[2]
    assert "700 of 1,000 block linear weights (0.7000)" in lines[3] and "2,800" in lines[4]
    plan = dataclasses.replace(plan, keep=None, bits=3.1, formats={"layer_0/mlp/up/kernel": "nf3"})
    result = dataclasses.replace(result, plan=plan, report={"plan": {"bits_per_weight": 3.0991}})
    assert "bits=3.1" in repr(result) and "3.099 per block linear weight" in repr(result)
    assert repr(dataclasses.replace(result, report={}))  # also of one that somebody made by hand


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert lordjax.__version__ == version("lordjax")


def test_functions_that_the_documentation_names_by_their_folders():
    from lordjax.finetune import make_step
    from lordjax.runtime import make_mesh

    assert inspect.isfunction(make_step) and inspect.isfunction(make_mesh)
    for folder in ("finetune", "runtime"):
        with pytest.raises(AttributeError, match=f"lordjax.{folder}' has no attribute 'make'"):
            _ = importlib.import_module(f"lordjax.{folder}").make
