"""README and docs: Python blocks run, commands exist with their flags, links lead somewhere.

The blocks of a page run in order and share their names, in a directory that holds a tiny model
``SmolLM2-135M`` and token ids ``calibration.npy``. docs/README.md says how to skip a block.
"""

import importlib.util
import json
import re
import shlex
import unittest
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from commands import run
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import lordjax
from lordjax.allocation.policies import POLICIES
from lordjax.conversions.families.registry import FAMILIES, tensor_table
from lordjax.kernels.kinds import KINDS
from lordjax.methods import METHODS
from lordjax.scripts.cli import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXTENDING = ROOT / "docs/pages/extending.md"
WORDS = 64  # of the vocabulary
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def name_of(page):
    return str(page.relative_to(ROOT))


def write_model(directory):
    """A random Llama with a tokenizer of whole words, as a Hugging Face directory."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models

    draw = np.random.default_rng(0).normal
    tensors = {
        source.name: draw(len(source.shape) == 1, 0.1, source.shape).astype(np.float32)
        for source in tensor_table(CONFIG).values()
    }
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    words = {f"w{i}": i for i in range(WORDS)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(directory / "tokenizer.json"))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working directory with the model and the tokens that the pages speak of."""
    write_model(tmp_path / "SmolLM2-135M")
    tokens = np.random.default_rng(1).integers(0, WORDS, (4, 24), np.int32)
    np.save(tmp_path / "calibration.npy", tokens)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tables():
    """What a page adds to the tables is gone afterwards."""
    before = [(table, dict(table)) for table in (METHODS, POLICIES, KINDS, FAMILIES)]
    yield
    for table, rows in before:
        table.clear()
        table.update(rows)


def run_blocks(page):
    """Runs the Python blocks of a page; the names that they made."""
    document = Sybil([PythonCodeBlockParser(), SkipParser()]).parse(page)
    for example in document.examples():
        try:
            with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
                example.evaluate()
        except unittest.SkipTest:
            continue
    return document.namespace


def bash_blocks(page):
    parser = CodeBlockParser("bash", lambda example: None)
    return [str(example.parsed) for example in Sybil([parser]).parse(page).examples()]


def calls(text):
    """Every call of ``lordjax`` in shell text, as the words behind it."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "||", "|", "&")), None)
            call, words = words[:end], [] if end is None else words[end + 1 :]
            if call and Path(call[0]).name == "lordjax":
                yield call[1:]


def problem_of(call):
    """What is wrong with a call of the command, or None."""
    verb, *words = call
    if verb not in cli.commands:
        return f"no command {verb!r}"
    flags = {flag for p in cli.commands[verb].params for flag in (*p.opts, *p.secondary_opts)}
    unknown = [w for w in words if w.startswith("--") and w.split("=")[0] not in (*flags, "--help")]
    return f"{verb} has no {unknown}" if unknown else None


@pytest.mark.quick("README.md", "docs/pages/index.md")
@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=name_of)
def test_python_blocks_run(page, files, tables):
    names = run_blocks(page)
    assert "lordjax" in names


@pytest.mark.full
def test_method_of_the_recipe_needs_nothing_else(files, tables):
    names = run_blocks(EXTENDING)
    command = "compress SmolLM2-135M out --method abs-mean --keep 0.5 --calibration calibration.npy"
    done = run(*command.split(), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads((files / "out/plan.json").read_text())["method"] == "abs-mean"
    planned = run("plan", "SmolLM2-135M", "--method", "abs-mean", "--keep", "0.5", "--no-measure")
    assert planned.exit_code == 0, planned.output
    config, params = lordjax.load("out")
    assert lordjax.nbytes(params) < lordjax.nbytes(names["model"].params())
    assert np.isfinite(lordjax.perplexity(config, params, names["tokens"])["perplexity"])


def test_method_of_the_recipe_predicts_its_error(files, tables):
    factor = run_blocks(EXTENDING)["factor"]
    draw = np.random.default_rng(2)
    kernel = draw.normal(size=(12, 8)).astype(np.float32)
    scale = draw.uniform(0.5, 2, 12).astype(np.float32)
    found = factor(kernel, {"abs_mean": SimpleNamespace(mean=lambda: scale)})
    for rank in range(9):
        missed = scale[:, None] * (kernel - found.left[:, :rank] @ found.right[:rank])
        np.testing.assert_allclose((missed**2).sum(), found.spectrum[rank:].sum(), atol=1e-3)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    found = [call for block in bash_blocks(page) for call in calls(block)]
    assert [problem for call in found if (problem := problem_of(call))] == []


def test_wrong_commands_are_found():
    text = 'X=1 && lordjax compress M OUT --kep 0.8 & .venv/bin/lordjax squeeze "M && N" # lordjax'
    assert [problem_of(call) for call in calls(text)] == [
        "compress has no ['--kep']",
        "no command 'squeeze'",
    ]


def test_readme_names_every_command_and_method():
    text = (ROOT / "README.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    named = set(re.findall(r"[a-z][\w-]*", " ".join(rows)))
    assert {*cli.commands, *METHODS} <= named


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = {link.split("#")[0] for link in links if not re.match(r"[a-z]+:", link)} - {""}
    assert [link for link in sorted(local) if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_modules_exist(page):
    text = page.read_text()
    folders = "|".join(("lordjax", "conversions", "scripts", "tests", "docs"))
    files = set(re.findall(rf"`((?:{folders})/[\w./-]*)`", text))
    assert [file for file in sorted(files) if not (ROOT / file).exists()] == []
    modules = set(re.findall(r"lordjax\.scripts(?:\.\w+)+", text))
    assert [name for name in sorted(modules) if importlib.util.find_spec(name) is None] == []


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1500
