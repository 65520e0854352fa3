"""Imports run one way: the order of folders is a list, what each may import is a table."""

import ast
import functools
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the bottom up: a folder imports from rows above its own only, and its files import each
# other without a circle. A new folder gets a place here or the test fails.
FLOORS = [
    ["lordjax.names", "lordjax.runtime"],
    ["lordjax.kernels"],
    ["lordjax.allocation", "lordjax.models", "lordjax.methods"],
    ["lordjax.storage", "lordjax.data", "lordjax.generation"],
    ["lordjax.calibration", "lordjax.evaluate", "lordjax.finetune", "lordjax.conversions"],
    ["lordjax.compression"],
    ["lordjax.functions"],
    ["lordjax.forecast"],
    ["lordjax.scripts"],
]
FLOOR = {folder: i for i, row in enumerate(FLOORS) for folder in row}

# Everything outside the standard library that a folder may import when the library is used.
# `methods` and `kernels` use flax.struct only: dataclasses that are pytrees, no Flax modules.
JAX, ARRAYS = {"jax", "jaxtyping"}, {"numpy"}
MAY_IMPORT = {
    "lordjax.names": set(),
    "lordjax.runtime": JAX | ARRAYS,
    "lordjax.kernels": JAX | ARRAYS | {"flax.struct", "scipy"},
    "lordjax.allocation": ARRAYS | {"scipy"},
    "lordjax.models": JAX | ARRAYS | {"flax"},
    "lordjax.methods": JAX | ARRAYS | {"flax.struct", "scipy"},
    "lordjax.storage": JAX | ARRAYS | {"filelock", "flax", "safetensors", "xxhash"},
    "lordjax.data": ARRAYS | {"pyarrow"},
    "lordjax.generation": JAX | ARRAYS,
    "lordjax.calibration": JAX | ARRAYS | {"flax"},
    "lordjax.evaluate": JAX | ARRAYS,
    "lordjax.finetune": JAX | ARRAYS | {"optax", "orbax"},
    "lordjax.compression": JAX | ARRAYS,
    "lordjax.forecast": JAX | ARRAYS,
    "lordjax.functions": JAX | ARRAYS | {"flax.struct"},
}
# Parts that must not know each other, whatever the order allows.
MAY_NOT_KNOW = {
    "lordjax.methods": {"lordjax.models", "lordjax.allocation"},
    **{
        f"lordjax.allocation.{name}": {"lordjax.kernels"}
        for name in ("policies", "curves", "block_influence", "knapsack")
    },
    "lordjax.conversions": {"lordjax.scripts"},
}
COPIED = {  # into exports, for transformers
    f"lordjax.conversions.exporters.modeling_{name}" for name in ("lordjax", "decilm")
}
# Only vLLM imports these, which needs torch anyway.
PLUGIN = {f"lordjax.conversions.vllm_plugin.{name}" for name in ("config", "shards")}
# What runs beside ours in these benchmarks is torch's.
TORCH_PEERS = {
    *(f"lordjax.scripts.benchmarks.{name}" for name in ("decompose", "finetune")),
    *(f"lordjax.scripts.benchmarks.export.{name}" for name in ("models", "speed")),
    "lordjax.scripts.verbs.benchmark",
}


def module_name(file):
    """``lordjax/models/layers.py`` -> ``lordjax.models.layers``; conversions are in lordjax."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "lordjax" else ["lordjax", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def sources():
    """``{module: its code}`` of everything that is shipped."""
    files = [f for top in ("lordjax", "conversions", "scripts") for f in (ROOT / top).rglob("*.py")]
    return {module_name(file): ast.parse(file.read_text()) for file in files}


@functools.cache
def imports(module, when="ever"):
    """Modules that a module imports: "ever" (types included), "running", or "at import".

    ``from package import name`` counts as ``package.name`` where that is a module of the project.
    """
    tree, found = sources()[module], set()
    skipped = {"ever": (), "running": (ast.If,), "at import": (ast.If, ast.FunctionDef)}[when]
    unread = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, skipped) and (not isinstance(node, ast.If) or is_type_checking(node))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in sources() or node.module == "flax" else node.module)
    return found


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def inside(name, package):
    return name == package or name.startswith(package + ".")


def folder_of(module):
    """The row of the table that a module belongs to; None for the package's own ``__init__``."""
    return next((folder for folder in FLOOR if inside(module, folder)), None)


def ours(names):
    return {name for name in names if inside(name, "lordjax")}


def outside(names):
    """Those of the names that are neither the project nor the standard library."""
    return {n for n in names if n.split(".")[0] not in {"lordjax", *sys.stdlib_module_names}}


@pytest.mark.parametrize("module", sorted(m for m in sources() if folder_of(m)))
def test_imports_run_one_way(module):
    mine = folder_of(module)
    for name in ours(imports(module)):
        theirs = folder_of(name)
        if theirs is None or theirs == mine:
            continue
        assert FLOOR[theirs] < FLOOR[mine], f"{module} imports {name}, which stands above it"


@pytest.mark.parametrize("folder", FLOOR)
def test_no_circles_inside_a_folder(folder):
    members = {m for m in sources() if inside(m, folder)}
    graph = {m: {n for n in imports(m, "running") if n in members and n != m} for m in members}
    done = set()
    while len(done) < len(graph):
        ready = {m for m in graph.keys() - done if graph[m] <= done}
        assert ready, f"a circle among {sorted(graph.keys() - done)}"
        done |= ready


@pytest.mark.parametrize("module", sorted(m for m in sources() if folder_of(m) in MAY_IMPORT))
def test_libraries_stay_where_they_belong(module):
    folder = folder_of(module)
    for name in outside(imports(module)):
        allowed = any(inside(name, library) for library in MAY_IMPORT[folder])
        assert allowed, f"{module} imports {name}; {folder} may import {MAY_IMPORT[folder]}"


@pytest.mark.parametrize("part", MAY_NOT_KNOW)
def test_parts_that_must_not_know_each_other(part):
    for module in (m for m in sources() if inside(m, part)):
        for name in imports(module):
            for other in MAY_NOT_KNOW[part]:
                assert not inside(name, other), f"{module} imports {name}"


def test_torch_is_imported_in_conversions_only_and_lazily():
    for module in sources():
        everything = {name.split(".")[0] for name in imports(module)}
        if not inside(module, "lordjax.conversions") and module not in TORCH_PEERS:
            assert "torch" not in everything, module
        at_import = {name.split(".")[0] for name in imports(module, "at import")}
        assert "torch" not in at_import or module in COPIED | PLUGIN, module
        assert not COPIED & set(imports(module)) or module in PLUGIN, module


def test_distributions_hold_every_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {
        module_name(f)
        for m in ("lordjax", "conversions", "scripts")
        for f in (ROOT / m).rglob("__init__.py")
    }
    assert set(listed) == packages


# Files that Python and type checkers want to have there, whatever else a folder holds.
ALWAYS = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
FOLDERS = sorted(
    {
        f.parent
        for top in ("lordjax", "conversions", "scripts", "tests")
        for f in (ROOT / top).rglob("*.py")
    }
)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_has_at_most_fifteen_entries(folder):
    entries = {path.name for path in folder.iterdir()} - ALWAYS
    assert len(entries) <= 15, sorted(entries)


def test_every_module_has_a_floor():
    """A module outside the folders of the list would escape the order."""
    outside_of_the_list = {m for m in sources() if not folder_of(m)}
    assert outside_of_the_list == {"lordjax", "lordjax.__main__"}


def lines_of(path):
    """``(what, lines)`` of a file and of every function in it."""
    text = path.read_text()
    yield path.name, text.count("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{path.name}: {node.name}", node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("top", ["lordjax", "conversions", "scripts"])
def test_files_and_functions_are_short(top):
    found = [pair for path in sorted((ROOT / top).rglob("*.py")) for pair in lines_of(path)]
    limits = {True: 60, False: 350}  # lines of a function, of a file
    long = [(what, n) for what, n in found if n > limits[": " in what]]
    assert not long


# What makes JSON without `json_files`: programs of their own, and messages between processes.
OWN_JSON = {
    "lordjax.evaluate.sandbox",
    "lordjax.runtime.json_files",
    "lordjax.runtime.multihost",
    "lordjax.scripts.make_checkpoint",
}


def test_json_is_made_in_one_place():
    """So no file and no output of a command holds a NaN or an infinite number."""
    found = {
        module
        for module, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dumps", "json.dump")
    }
    others = ("lordjax.scripts.benchmarks", "lordjax.evaluate.isolation")
    assert {m for m in found if not any(inside(m, other) for other in others)} == OWN_JSON
