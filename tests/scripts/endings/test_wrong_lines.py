"""Wrong command lines of every command are one line that names what is wrong; nothing is written.

``python -m pytest tests/scripts/endings -n 0 --no-cov -m "not slow"`` runs all of them.
"""

import os
import shutil
import socket

import click
import numpy as np
import pytest
from commands import WINDOW, run
from wrong_lines import lines

from lordjax.scripts.cli import cli
from lordjax.scripts.flags import types

OURS = (
    *(types.Integer, types.Real, types.Text, types.InputPath, types.OutputPath, types.Listed),
    *(click.Choice, click.types.BoolParamType),
)


@pytest.fixture(scope="module")
def places(tiny, compressed, text, tmp_path_factory):
    """What the letters of the table stand for, in a folder that is the working directory."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(tiny, folder / "model")
    shutil.copytree(compressed[0], folder / "small")
    (folder / "texts").mkdir()
    shutil.copy(text, folder / "texts" / "a.txt")
    np.save(folder / "ids.npy", np.zeros((2, WINDOW), np.int32))
    os.mkfifo(folder / "fifo")
    before, unix = os.getcwd(), socket.socket(socket.AF_UNIX)
    os.chdir(folder)
    unix.bind("socket")
    names = {"M": "model", "C": "small", "O": "new", "T": "texts/a.txt", "F": "fifo"}
    names |= {"S": "socket", "H": "nothing.txt", "D": "texts", "A": "ids.npy"}
    yield names
    os.chdir(before)
    unix.close()


def replaced(word, names):
    """A word with its letters replaced: alone, before ``/`` and before ``:``."""
    if ":" in word:
        pairs = [part.partition(":") for part in word.split(",")]
        return ",".join(replaced(name, names) + colon + share for name, colon, share in pairs)
    head, slash, rest = word.partition("/")
    return names.get(head, head) + slash + rest


def files():
    """Every file below the working directory."""
    return sorted(os.path.join(where, name) for where, _, names in os.walk(".") for name in names)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_wrong_command_lines(places):
    before, wrong, count = files(), [], 0
    for words, name in lines():
        given = [replaced(word, places) for word in words]
        count += 1
        try:
            found = run(*given)
        except Exception as error:
            wrong.append((given, f"traceback: {error!r}"))
            continue
        errors = [line for line in found.stderr.splitlines() if not line.startswith("note:")]
        one = len(errors) == 1 and errors[0].startswith("error: ")
        if found.exit_code != 2 or not one or name not in errors[0] or found.stdout:
            wrong.append((given, found.exit_code, name, found.stderr[-300:]))
    assert not wrong, "\n".join(map(repr, wrong))
    assert count >= 200 and files() == before


@pytest.mark.parametrize("name", cli.commands)
def test_every_value_has_a_type_of_ours(name):
    """So numbers have finite ranges, and paths are looked at before they are opened."""
    for param in cli.commands[name].params:
        kind = param.type
        assert isinstance(kind, OURS), f"{name} {param.opts}"
        if isinstance(kind, types.Integer | types.Real):
            assert np.isfinite([kind.min, kind.max]).all()
