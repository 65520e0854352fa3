"""The public names: they resolve, are documented, and cost nothing until they are used."""

import importlib
import inspect
import subprocess
import sys

import pytest

import lordjax


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
