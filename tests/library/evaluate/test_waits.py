"""Every wait of the sandbox has an end: for requests, for supervisors, and for killed processes."""

import subprocess
import sys
import time

import pytest

from lordjax.evaluate import sandbox
from lordjax.evaluate.sandbox import Limits, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")
STOPPED = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"
BUSY = "while True: pass"
# A process that ends only after a second, and signals that do nothing.
UNKILLABLE = """
import os, time
from lordjax.evaluate.isolation import supervisor
child = os.fork()
if not child:
    time.sleep(1)
    os._exit(0)
os.kill = lambda *_: None
supervisor.KILLING = 0.1
assert not supervisor.kill_all(child, {spaces}, ())
supervisor.KILLING = 30
assert supervisor.kill_all(child, {spaces}, ())
"""


@pytest.mark.parametrize(("text", "state"), [(STOPPED, "stopped"), (BUSY, "at work")])
def test_a_supervisor_that_does_not_end_is_killed(tmp_path, monkeypatch, text, state):
    (tmp_path / "supervisor.py").write_text(f"import sys\nprint('up', file=sys.stderr)\n{text}")
    monkeypatch.setattr(sandbox, "SUPERVISOR", tmp_path / "supervisor.py")
    monkeypatch.setattr(sandbox, "GRACE", 0.5)
    start = time.monotonic()
    with pytest.raises(OSError, match=rf"no result within 1 s \(its supervisor was {state}\)"):
        run("", Limits(seconds=0.5))
    assert time.monotonic() - start < sandbox.KILLING


@pytest.mark.parametrize("request_", [b"", b"1", b"100\n{"])
def test_a_supervisor_whose_caller_ends_does_not_wait(tmp_path, request_):
    command = [sys.executable, "-P", "-s", "-S", str(sandbox.SUPERVISOR), str(tmp_path)]
    done = subprocess.run(command, input=request_, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1 and b"EOFError: the request ends too early" in done.stderr


@pytest.mark.full
@pytest.mark.parametrize("spaces", [True, False])
def test_killed_processes_are_not_waited_for_for_ever(spaces):
    code = UNKILLABLE.format(spaces=spaces)
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
