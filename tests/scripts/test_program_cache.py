"""Compiled programs are kept between runs of the command, where its user says."""

import os
import subprocess
import sys

import pytest

from lordjax.scripts.program_cache import keep_programs, processor, prune, writable

RUN = "from lordjax.scripts.cli import main; main()"


def generate(model, home, **more):
    """Text of ``lordjax generate`` in a process of its own, and what its cache then holds."""
    named = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    kept = {k: v for k, v in os.environ.items() if k not in named}
    environment = kept | {"XDG_CACHE_HOME": str(home), **more}
    command = [sys.executable, "-c", RUN, "generate", str(model), "ab", "--max-new-tokens", "4"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert not found.stderr
    return found.stdout, sorted(p.name for p in home.rglob("*-cache"))


@pytest.fixture
def always(monkeypatch):
    """Programs of a tiny model compile fast."""
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.mark.full
def test_the_second_run_compiles_nothing(tiny, tmp_path, always):
    text, first = generate(tiny, tmp_path)
    folder = tmp_path / "lordjax" / "programs" / processor()
    for name in ("decode", "prefill"):
        assert sum(file.startswith(f"jit_{name}-") for file in first) == 1
    assert sorted(path.name for path in folder.glob("*-cache")) == first
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert generate(tiny, tmp_path) == (text, first)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


@pytest.mark.slow
def test_variables_of_jax_win(tiny, tmp_path, always):
    own = tmp_path / "own"
    home = tmp_path / "home"
    home.mkdir()
    generate(tiny, home, JAX_COMPILATION_CACHE_DIR=str(own))
    assert not list(home.rglob("*-cache")) and list(own.glob("*-cache"))
    _, kept = generate(tiny, home, JAX_ENABLE_COMPILATION_CACHE="false")
    assert not kept


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for home in (file, "no/home"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        keep_programs()
        assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert writable(tmp_path / "a" / "b") and list(tmp_path.iterdir()) == [file]


def test_the_library_keeps_nothing():
    code = "import lordjax.generation.decode, lordjax.scripts.cli, jax; print(jax.config.values"
    code += "['jax_compilation_cache_dir'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "None\n"


def test_what_was_written_first_goes_first(tmp_path):
    for i in range(4):
        (tmp_path / str(i)).write_bytes(b"x" * 10)
        os.utime(tmp_path / str(i), (i, i))
    prune(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    prune(tmp_path / "none", 0)
