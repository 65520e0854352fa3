"""Imports run one way. The order is a list; what may import what is a table."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up; a module may import from rows above its own, a package's parts from each
# other in the order given here. New modules get a place or the test fails.
ORDER = [
    ["lordjax"],  # lazy: resolves public names when they are used
    ["lordjax.nf", "lordjax.order", "lordjax.documents", "lordjax.files", "lordjax.work"],
    ["lordjax.hosts"],
    ["lordjax.mesh"],
    ["lordjax.flops"],
    ["lordjax.progress", "lordjax.sites", "lordjax.plan", "lordjax.linalg", "lordjax.data"],
    ["lordjax.lapack"],
    ["lordjax.nf_pallas", "lordjax.nf_tiles"],
    ["lordjax.nf_choice"],
    ["lordjax.kernels", "lordjax.evaluate.sandbox", "lordjax.evaluate.problems"],
    ["lordjax.evaluate.questions"],
    ["lordjax.evaluate.supervisor", "lordjax.evaluate.programs"],
    ["lordjax.stats", "lordjax.trees", "lordjax.knapsack"],
    ["lordjax.allocation"],
    ["lordjax.parts", "lordjax.options"],
    ["lordjax.models.config"],
    ["lordjax.examples"],
    ["lordjax.instructions", "lordjax.labelled"],
    ["lordjax.models.layers"],
    ["lordjax.models.heads"],
    ["lordjax.models.transformer"],
    ["lordjax.models"],
    ["lordjax.methods.base", "lordjax.methods.feedback"],
    ["lordjax.methods.mlp_on_host"],
    ["lordjax.methods.svd", "lordjax.methods.modular", "lordjax.methods.low_rank_quantized"],
    ["lordjax.methods"],
    ["lordjax.entries", "lordjax.weightings"],
    ["lordjax.workspace", "lordjax.objective"],
    ["lordjax.functional", "lordjax.source", "lordjax.collect", "lordjax.states"],
    ["lordjax.calibrate"],
    ["lordjax.gradients"],
    ["lordjax.modules", "lordjax.evaluate.perplexity", "lordjax.evaluate.classification"],
    ["lordjax.factoring", "lordjax.evaluate.comparison"],
    ["lordjax.sequential", "lordjax.factor_pass"],
    ["lordjax.prepared", "lordjax.sizing"],
    ["lordjax.compression", "lordjax.quantizer", "lordjax.speed"],
    ["lordjax.stages"],
    ["lordjax.coded"],
    ["lordjax.sharing"],
    ["lordjax.forecast"],
    ["lordjax.quantization"],
    ["lordjax.checkpoint"],
    ["lordjax.output", "lordjax.elastic"],
    ["lordjax.evaluate"],
    ["lordjax.adapters"],
    ["lordjax.recipes"],
    ["lordjax.finetune"],
    ["lordjax.training", "lordjax.memory"],
    ["lordjax.sampling"],
    ["lordjax.generate"],
    ["lordjax.completion", "lordjax.evaluate.likelihood"],
    ["lordjax.evaluate.choices"],
]
RANK = {name: i for i, row in enumerate(ORDER) for name in row}

# Everything outside the standard library that a part may import. `methods` and `kernels` use
# flax.struct only: pytree dataclasses that survive msgpack and Orbax.
JAX, ARRAYS = {"jax", "jaxtyping"}, {"numpy"}
MAY_IMPORT = {
    "lordjax.progress": set(),
    "lordjax.sites": set(),
    "lordjax.plan": set(),
    "lordjax.documents": ARRAYS,
    "lordjax.data": ARRAYS,
    "lordjax.allocation": ARRAYS,
    "lordjax.knapsack": ARRAYS | {"scipy"},
    "lordjax.models.config": set(),
    "lordjax.models": JAX | ARRAYS | {"flax"},
    "lordjax.kernels": JAX | {"flax.struct"},
    "lordjax.methods": JAX | ARRAYS | {"flax.struct"},
    "lordjax.stats": JAX | {"flax"},
    "lordjax.nf": JAX | ARRAYS | {"scipy"},
    "lordjax.flops": JAX,
    "lordjax.linalg": JAX | ARRAYS | {"scipy"},
    "lordjax.lapack": ARRAYS | {"jaxtyping", "scipy"},
    "lordjax.recipes": JAX | {"optax"},
    "lordjax.finetune": JAX | ARRAYS | {"optax"},
    "lordjax.training": JAX | {"orbax"},
    "lordjax.checkpoint": JAX | ARRAYS | {"safetensors"},
    "lordjax": JAX | ARRAYS,
}
# Of the project itself: the parts that must not know the others, whatever the order allows.
MAY_NOT_KNOW = {
    "lordjax.methods": {"lordjax.models", "lordjax.stats", "lordjax.trees", "lordjax.sites"},
    "lordjax.allocation": {"lordjax.models", "lordjax.kernels", "lordjax.methods"},
    "lordjax.kernels": {"lordjax.models"},
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


def imports(module, everywhere=True):
    """Modules that a module imports; without ``everywhere`` only when it is itself imported.

    ``from package import name`` counts as ``package.name`` where that is a module of the project.
    """
    tree, found = sources()[module], set()
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not everywhere and node in lazy:
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


def core():
    """Modules of the library proper."""
    outer = ("lordjax.conversions", "lordjax.scripts")
    return sorted(m for m in sources() if not any(inside(m, package) for package in outer))


def outside(names):
    """Those of the names that are neither the project nor the standard library."""
    import sys

    return {n for n in names if n.split(".")[0] not in {"lordjax", *sys.stdlib_module_names}}


def test_the_order_lists_every_module_once():
    assert sorted(name for row in ORDER for name in row) == core()


@pytest.mark.parametrize("module", core())
def test_imports_run_one_way(module):
    for name in imports(module):
        if name.split(".")[0] != "lordjax":
            continue
        assert name in RANK, f"{module} imports {name}: the library must not know its surroundings"
        assert RANK[name] < RANK[module], f"{module} imports {name}, which stands above it"


@pytest.mark.parametrize("module", core())
def test_libraries_stay_where_they_belong(module):
    part = max((p for p in MAY_IMPORT if inside(module, p)), key=len)
    for name in outside(imports(module)):
        allowed = any(inside(name, library) for library in MAY_IMPORT[part])
        assert allowed, f"{module} imports {name}; {part} may import {sorted(MAY_IMPORT[part])}"


@pytest.mark.parametrize("part", MAY_NOT_KNOW)
def test_parts_that_must_not_know_each_other(part):
    members = [m for m in sources() if inside(m, part)]
    assert members
    for module in members:
        for name in imports(module):
            for other in MAY_NOT_KNOW[part]:
                assert not inside(name, other), f"{module} imports {name}"


COPIED = "lordjax.conversions.modeling_lordjax"  # into exports, where transformers runs it


def test_torch_is_imported_in_conversions_only_and_lazily():
    # What they run beside ours is in torch.
    names = ("decompose", "export", "finetune", "model")
    peers = {f"lordjax.scripts.benchmark_{name}" for name in names}
    for module in sources():
        everything = {name.split(".")[0] for name in imports(module)}
        if not inside(module, "lordjax.conversions") and module not in peers:
            assert "torch" not in everything, module
        at_import = {name.split(".")[0] for name in imports(module, everywhere=False)}
        assert "torch" not in at_import or module == COPIED, module
        assert COPIED not in imports(module), module


def test_conversions_do_not_know_scripts():
    for module in sources():
        if inside(module, "lordjax.conversions"):
            assert not any(inside(name, "lordjax.scripts") for name in imports(module)), module


def test_no_cycles_at_import():
    graph = {m: imports(m, everywhere=False) & sources().keys() - {m} for m in sources()}
    done = set()
    while len(done) < len(graph):
        ready = {m for m in graph.keys() - done if graph[m] <= done}
        assert ready, f"a cycle among {sorted(graph.keys() - done)}"
        done |= ready
