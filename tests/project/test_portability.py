"""Systems without POSIX modules, and terminals that are not UTF-8."""

import ast
import os
import subprocess
import sys

import pytest
from test_imports import ROOT, sources

# Modules of the standard library that Windows lacks.
POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
# Imported by a program of its own only, which is started on Linux only.
LINUX = {m for m in sources() if m.startswith("lordjax.evaluate.isolation.")}
HIDE = f"import sys; sys.modules.update(dict.fromkeys({sorted(POSIX - {'posix'})}))\n"


def python(code, *arguments, **environ):
    """Runs code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environ},
        cwd=ROOT,
        check=False,
    )


@pytest.mark.parametrize("module", sorted(sources().keys() - LINUX))
def test_modules_of_posix_are_imported_where_they_are_used(module):
    tree = sources()[module]
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in inside:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not POSIX & {name.split(".")[0] for name in names}, module


READERS = ("documents", "record_files")  # modules of ours with a function `read_text`


@pytest.mark.parametrize("module", sorted(sources().keys() - LINUX))
def test_text_files_are_read_and_written_as_utf_8(module):
    """Windows has another default."""
    for node in ast.walk(sources()[module]):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
        named = "encoding" in {keyword.arg for keyword in node.keywords}
        told = named or any("utf-8" in str(mode) for mode in modes)
        if name in ("read_text", "write_text") and module != "lordjax.storage.tensor_files":
            ours = isinstance(node.func, ast.Name) or ast.unparse(node.func.value) in READERS
            assert ours or told, f"{module}, line {node.lineno}"
        if name == "open" and any(str(mode) in ("r", "w", "a", "x") for mode in modes):
            assert told, f"{module}, line {node.lineno}"


@pytest.mark.full
def test_the_command_and_the_lock_work_without_posix_modules(tmp_path):
    code = HIDE + (
        "import lordjax.scripts.cli, lordjax.evaluate.sandbox\n"
        "from lordjax.runtime import progress\n"
        "from lordjax.storage.disk_store import DiskStore\n"
        "progress.Path = lambda name: __import__('pathlib').Path('/nowhere')\n"
        "assert progress.peak_rss() is None\n"
        "with DiskStore(sys.argv[1], {}) as store:\n"
        "    assert store.open\n"
        "    try:\n"
        "        DiskStore(sys.argv[1], {})\n"
        "    except BlockingIOError:\n"
        "        print('locked')\n"
    )
    found = python(code, str(tmp_path / "store"))
    assert found.stdout.split() == [b"locked"], found.stderr


def test_a_terminal_without_a_sign_gets_its_number():
    code = (
        "import sys\n"
        "from lordjax.scripts.console import printable_streams, say\n"
        "printable_streams()\n"
        "print('caf\\xe9 \\u2264'); say('\\u4e2d'); print('\\udce9', end='')"
    )
    found = python(code, PYTHONIOENCODING="ascii")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [b"caf\\xe9 \\u2264", b"\\udce9"]
    assert found.stderr.strip() == b"\\u4e2d"


@pytest.mark.full
def test_an_error_with_a_strange_path_is_one_line_on_any_terminal():
    code = "import sys; from lordjax.scripts.cli import main; sys.argv[0] = 'lordjax'; main()"
    found = python(code, "inspect", "./h\u00e9\u4e2d", PYTHONIOENCODING="latin-1")
    assert found.returncode == 2 and found.stdout == b""
    assert found.stderr.startswith(b"error: ./h\xe9\\u4e2d: no such file")
