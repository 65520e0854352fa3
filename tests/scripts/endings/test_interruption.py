"""Signals end a command with one line, the usual exit code, and nothing half-written."""

import os
import signal
import subprocess
import sys

import pytest

from lordjax.runtime.interruption import interruption

# The main thread waits in Python; where no handler runs, as in compiled code; or in a destructor,
# where Python drops exceptions.
PROGRAM = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from lordjax.runtime import interruption
from lordjax.storage.atomic_directory import staged
interruption.GRACE = 0.5
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a job in the background inherits that they are
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, and then they stay so
kind, out = sys.argv[1:]
class Slow:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(60)
other = threading.Thread(target=time.sleep, args=(60,), daemon=True)
other.start()
with interruption.signals_end(["lordjax", "compress", "a b"]):
    with staged(Path(out)) as stage:
        (stage / "half").write_text("x")
        if kind == "destructor":
            Slow()
        print("ready", flush=True)
        try:
            if kind == "compiled":
                ctypes.CDLL(None).pthread_join(ctypes.c_ulong(other.ident), None)
            time.sleep(60)
        except BaseException as error:
            if kind == "wrapped":
                raise RuntimeError("a library's own") from error
            raise
"""


@pytest.mark.quick("waiting-SIGTERM")
@pytest.mark.parametrize(
    ("kind", "name"),
    [("waiting", name) for name in ("SIGTERM", "SIGHUP", "SIGINT")]
    + [(kind, "SIGTERM") for kind in ("wrapped", "compiled", "destructor")],
)
def test_a_signal_ends_a_command(tmp_path, kind, name):
    command = [sys.executable, "-c", PROGRAM, kind, tmp_path / "out"]
    number = getattr(signal, name)
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error == f"interrupted ({name}): nothing unfinished is left\n"
    assert not list(tmp_path.iterdir())


def test_the_line_says_how_to_go_on():
    line = interruption(signal.SIGTERM, ["work is kept in x"], ["lordjax", "compress", "a b"])
    assert line.endswith("work is kept in x; go on with: lordjax compress 'a b'")
    line = interruption(signal.SIGTERM, ["the run is kept"], ["lordjax", "finetune", "m"])
    assert line.endswith("go on with: lordjax finetune m --resume")
