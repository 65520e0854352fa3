"""Programs that behave, misbehave and lie: every limit holds, and no process remains."""

import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from lordjax.evaluate import sandbox
from lordjax.evaluate.isolation import supervisor
from lordjax.evaluate.sandbox import (
    FAILED,
    OUT_OF_MEMORY,
    PASSED,
    TIMED_OUT,
    Checks,
    Limits,
    run,
    run_all,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")
# Generous: a machine under load is slow, but a program that is not stopped never ends.
SOON = 30.0
SMALL = Limits(seconds=SOON, memory=2**28, file_bytes=2**20, output=1000)


@pytest.fixture(params=[(), ("namespaces",)], ids=["namespaces", "without"])
def without(request):
    return request.param


def supervisors(folder):
    """Returns the processes of programs with a directory below this one; a fork keeps the name."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # has ended
            continue
        if any(str(folder).encode() in word for word in words):
            found.add(process.name)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not supervisors(folder)
    assert not list(folder.iterdir())


def test_a_program_has_the_standard_library_and_nothing_else(without):
    program = """
import json, os, sys
assert os.listdir() == [] and sys.stdin.read() == ""
assert not os.environ and sys.argv == [""]
assert __name__ != "__main__"
try:
    import numpy
except ImportError:
    print("done", file=sys.stderr)
"""
    result = run(program, without=without)
    assert (result.outcome, result.error) == (PASSED, "")
    assert result.output == "done\n"
    assert 0 < result.seconds < SOON


ERRORS = {
    "assert 1 == 2": "AssertionError",
    "raise ValueError('first\\nsecond')": "ValueError: first",
    "f(": "SyntaxError: '(' was never closed (program, line 1)",
    "\0": "null bytes",
    "x = '\ud800'": "UnicodeEncodeError",
    "input()": "EOFError",
    "class E(Exception):\n  def __str__(self): raise KeyError\nraise E": "E: (its message",
    "raise ValueError('x' * 10**6)": "ValueError: xxx",
    "def f(): f()\nf()": "RecursionError",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
}


def test_an_error_fails_with_its_line():
    for result, error in zip(run_all([*ERRORS]), ERRORS.values(), strict=True):
        assert result.outcome == FAILED and error in result.error
        assert "\n" not in result.error and len(result.error) < 1000


EARLY = [
    "import sys; sys.exit(0)",
    "raise SystemExit",
    "import os; os._exit(0)",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "import os; os.abort()",
    "import ctypes; ctypes.string_at(0)",
    "import os\nif os.fork(): os._exit(0)",  # a copy goes on to the end
    "import os, time\nif os.fork(): time.sleep(0.2); assert False",
    "import os; os.closerange(0, 100)",  # there is no way left to say that it passed
    # Says what it can guess on all pipes that there are.
    "import os\nfor fd in range(64):\n  try: os.write(fd, b'passed' * 9)\n  except OSError: 0\n"
    "os._exit(0)",
]


def test_a_program_that_ends_before_its_last_line_fails(without):
    for program, result in zip(EARLY, run_all(EARLY, without=without), strict=True):
        assert result.outcome == FAILED and result.error, program


def test_the_checks_are_not_in_the_memory_of_the_program():
    token = "f0e1d2c3b4a5968778695a4b3c2d1e0f"
    program = """
import gc, re, sys
seen, frame = [], sys._getframe()
while frame:
    seen += [*frame.f_locals.values(), *frame.f_code.co_consts]
    frame = frame.f_back
seen += [v for o in gc.get_objects() if isinstance(o, dict) for v in list(o.values())]
texts = [o.decode("latin-1") if isinstance(o, bytes) else o for o in seen]
texts = [t for t in texts if isinstance(t, str)]
assert len(texts) > 100
def found(first):
    return any(re.search(first + "[0-9a-f]{28}", t) for t in texts)
"""
    text = f"token = {token!r}; assert not found('f0e1')"
    result = run(program, checks=Checks(text, ("found",)))
    assert (result.outcome, result.error) == (PASSED, "")
    planted = program.replace("def found", f"texts.append({token!r})\ndef found")
    assert run(planted, checks=Checks(text, ("found",))).outcome == FAILED


def test_what_a_program_replaces_does_not_keep_it_from_passing():
    assert run("import os\nos.read = os.write = os._exit = os.getpid = None").outcome == PASSED
    assert run("import os, sys\nsys.stdout.close()\nos.close(2)").outcome == PASSED
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()"
    assert run(thread).outcome == PASSED
    for end in ("0", "1 / 0"):  # of a copy, which ends first
        assert run(f"import os\nif os.fork(): os.wait()\nelse: {end}").outcome == PASSED


def test_memory_is_limited(without):
    for hog in ("x = bytearray(2**29)", "x = []\nwhile True: x.append([0] * 10**5)"):
        result = run(hog, SMALL, without=without)
        assert (result.outcome, result.error) == (OUT_OF_MEMORY, "MemoryError")
    assert run("x = bytearray(2**27)", SMALL, without=without).outcome == PASSED


SLEEPERS = [
    "import time; time.sleep(1000)",
    "import threading; threading.Event().wait()",
    "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "import os\nos.fork()\nos.fork()\nimport time; time.sleep(1000)",
    "import signal\nfor s in range(1, 64):\n  try: signal.signal(s, signal.SIG_IGN)\n"
    "  except (OSError, ValueError): 0\nsignal.pause()",
]


def test_time_is_limited(without):
    limits = Limits(seconds=0.5)
    for result in run_all(SLEEPERS, limits, workers=len(SLEEPERS), without=without):
        assert (result.outcome, result.error) == (TIMED_OUT, "no end after 0.5 s")
        assert limits.seconds <= result.seconds < SOON


@pytest.mark.quick("namespaces")
def test_processor_time_is_limited(without):
    loop = "try:\n  while True: pass\nfinally:\n  while True: pass"
    result = run(loop, Limits(seconds=SOON, cpu_seconds=1), without=without)
    assert (result.outcome, result.error) == (TIMED_OUT, "more than 1 s of CPU time")
    assert result.seconds < SOON


@pytest.mark.quick("namespaces")
def test_a_program_that_prints_for_ever_fills_nothing(without):
    short = Limits(seconds=SOON, cpu_seconds=1, output=1000)
    result = run("while True: print('x' * 10**6)", short, without=without)
    assert result.outcome == TIMED_OUT
    assert len(result.output) <= short.output


def test_no_more_is_kept_in_memory_than_the_limit():
    pipes = {name: os.pipe() for name in ("output", "status")}

    def write():
        for _ in range(100):
            os.write(pipes["output"][1], b"x" * 10_000)
        os.write(pipes["output"][1], b"end")
        time.sleep(0.1)
        os.close(pipes["status"][1])

    writer = threading.Thread(target=write)
    writer.start()
    reading = pipes["output"][0], pipes["status"][0]
    assert supervisor.watch(*reading, time.monotonic() + SOON, 5) == (b"xxend", b"", True)
    writer.join()
    for number in (*reading, pipes["output"][1]):
        os.close(number)


def test_what_was_printed_last_is_kept():
    limits = Limits(output=10)
    result = run("for i in range(1000): print(f'{i:04d}' * 1000)\nprint('the end')", limits)
    assert result.outcome == PASSED and result.output == "9\nthe end\n"
    assert run("print('€' * 5)", limits).output.endswith("€€€\n")
    broken = run("import os; os.write(2, b'Fatal: why\\n'); os._exit(3)", limits)
    assert broken.error.endswith("exit code 3: atal: why")


def test_files_are_limited(without):
    write = "f = open('f', 'wb')\nfor _ in range({}): f.write(b'x' * 1024)\nf.close()"
    if run("", SMALL, without=without).isolation["files"] == "none written":
        assert run(write.format(1), SMALL, without=without).error.startswith("PermissionError")
        return
    assert run(write.format(1000), SMALL, without=without).outcome == PASSED
    result = run(write.format(1100), SMALL, without=without)
    assert result.outcome == FAILED and "File too large" in result.error
    many = "for i in range(10): open(str(i), 'wb').write(b'x' * 200_000)"
    result = run(many, SMALL, without=without)
    if result.isolation["files"] == "private":
        assert result.outcome == FAILED and "No space left" in result.error


def test_open_files_and_core_dumps_are_limited():
    program = """
import resource
files = []
try:
    while True: files.append(open("f", "w"))
except OSError as error:
    print(len(files))
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
"""
    result = run(program, Limits(open_files=20))
    assert result.outcome == PASSED and 10 <= int(result.output) <= 20


def test_processes_are_limited(without):
    program = """
import os, time
made = 0
try:
    while made < 1000:
        if not os.fork(): time.sleep(60)
        made += 1
except BlockingIOError:
    print(made)
"""
    result = run(program, Limits(processes=5), without=without)
    if result.isolation["process_limit"] == "own":
        assert result.outcome == PASSED and int(result.output) == 4  # and itself
    elif result.isolation["process_limit"] == "per user":
        assert int(result.output) <= 4 + 2


def test_orphans_that_hold_the_pipes_end_with_their_program(without):
    # Twice forked, in a session of its own, deaf to signals: `nothing_is_left` looks for it.
    program = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
if not os.fork():
    try: os.setsid()
    except PermissionError: pass  # without namespaces
    if not os.fork():
        while True: time.sleep(0.01)
    os._exit(0)
"""
    limits = Limits(seconds=20)
    result = run(program, limits, without=without)
    assert result.outcome == PASSED and result.seconds < limits.seconds
    result = run(program + "time.sleep(1000)", Limits(seconds=0.5), without=without)
    assert result.outcome == TIMED_OUT


def test_there_is_no_network(without):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        result = run(program, without=without)
        assert result.outcome == FAILED
        with pytest.raises(BlockingIOError):
            server.accept()
    wanted = {"filter": "not permitted", "namespace": "unreachable", "socket module": "no network"}
    assert wanted[result.isolation["network"].split()[-1]] in result.error


@pytest.fixture
def open_folder():
    """A directory where every user may write; pytest's own directories are private."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def test_nothing_is_written_elsewhere_and_no_other_process_is_seen(open_folder):
    target = open_folder / "file"
    result = run(f"open({str(target)!r}, 'w')")
    if result.isolation["files"] == "private":
        assert result.outcome == FAILED and "No such file" in result.error
        # A mount of its own is not for the program to take away.
        escape = (
            "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
            "{}assert libc.mount(None, b'/', None, 32 | 4096, None)\n"  # remount, bind: writable
            "assert libc.umount2(b'/tmp', 2)\n"
            "open(os.path.dirname(os.__file__) + '/new', 'w')"
        )
        for first in ("", "libc.unshare(1 << 28 | 1 << 17)\n"):  # as the root of a namespace
            result = run(escape.format(first))
            assert result.outcome == FAILED and "Error" in result.error and "new" in result.error
        assert run("import os\nassert os.listdir('/proc') == []").outcome == PASSED
    assert not target.exists()
    if result.isolation["processes"] == "namespace":
        assert run(f"import os\nos.kill({os.getpid()}, 0)").error.startswith("ProcessLookupError")
        assert run("import os\nassert os.getpid() < 10").outcome == PASSED


def test_root_becomes_another_user(without):
    result = run("import os\nassert os.getuid() and os.geteuid()", without=without)
    if os.getuid() or result.isolation["user"] == "own":
        assert result.outcome == PASSED
    else:  # a container without other users, or a Python that only root can read
        assert result.isolation["process_limit"] == "none"


def test_the_documentation_names_every_kind_of_isolation(without):
    for key, value in run("", without=without).isolation.items():
        assert key in sandbox.__doc__ and value in sandbox.__doc__


def test_without_namespaces_they_are_not_used():
    assert run("", without=["namespaces"]).isolation["network"] == "filter"


def test_sets_have_one_order():
    program = "print({chr(97 + i) * 3 for i in range(20)})"
    assert len({run(program).output for _ in range(3)}) == 1


def test_many_programs_keep_their_order_and_the_number_of_workers():
    waits = [0.3, 0.0, 0.2, 0.0]
    programs = [f"import time\ntime.sleep({w})\nassert 0, {i}" for i, w in enumerate(waits)]
    seen = []
    results = run_all(programs, workers=2, progress=lambda *step: seen.append(step))
    assert [r.error for r in results] == [f"AssertionError: {i}" for i in range(4)]
    assert seen == [("run", i, 4) for i in range(1, 5)]
    assert run_all([]) == []


def test_no_more_programs_run_than_there_are_workers(monkeypatch):
    lock, running, most = threading.Lock(), [0], [0]
    original = sandbox.run

    def counted(*args, **kwargs):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        try:
            return original(*args, **kwargs)
        finally:
            with lock:
                running[0] -= 1

    monkeypatch.setattr(sandbox, "run", counted)
    run_all(["import time; time.sleep(0.05)"] * 6, workers=3)
    assert 1 < most[0] <= 3


def test_one_bad_sandbox_stops_the_rest(monkeypatch, tmp_path):
    broken = tmp_path / "supervisor.py"
    broken.write_text("raise RuntimeError('no such luck')")
    monkeypatch.setattr(sandbox, "SUPERVISOR", broken)
    with pytest.raises(OSError, match=r"exit code 1: RuntimeError: no such luck.*another machine"):
        run_all([""] * 3, workers=1)
    broken.write_text("import os; os.kill(os.getpid(), 9)")
    result = run("")
    assert (result.outcome, result.isolation) == (FAILED, {}) and "SIGKILL" in result.error


@pytest.mark.parametrize("name", list(Limits.__dataclass_fields__))
def test_limits_are_checked(name):
    with pytest.raises(ValueError, match=f"limit {name} is 0; expected more than 0"):
        run("", Limits(**{name: 0}))


def test_bad_calls_are_errors(monkeypatch):
    with pytest.raises(ValueError, match="0 workers"):
        run_all([""], workers=0)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="on Linux only, not on darwin"):
        run("")
