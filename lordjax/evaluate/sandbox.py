"""Runs untrusted Python programs in separate processes, and checks what they compute.

A program passes if its `Checks` run to their end. They run in a process of their own, which calls
the program's functions and gets plain values back. So a program cannot change what they compare,
end them early, or say itself that it passed. Without checks it passes if it reaches its last line,
and only it can say so: ``isolation`` then names the program as the source of the verdict.

**What it is.** Every program has its own interpreter with only the standard library, an empty
environment and standard input, and an empty directory. It starts no other programs. `Limits` bound
its resources. When its result is returned, all its processes are killed and its directory is
removed. All other isolation depends on the machine, so every result reports it (``isolation``). A
value with a star is *weak*: it leaves a way out to a hostile program, and programs then run with
``weak=True`` only.

============= ===================== ==============================================================
key           value                 meaning
============= ===================== ==============================================================
network       namespace and filter  an empty network of its own, and no sockets but connected pairs
              filter                no sockets but connected pairs
              namespace *           an empty network; it reaches sockets of other kinds, such as
                                    those that are files or lead to a virtual machine's host
              socket module *       Python's socket module refuses; a C library would not
processes     namespace             it sees only its own processes; all end with it
              filter                all its processes end with it; it can signal none but its first
              orphans adopted *     all its processes end with it; it may kill others of its user
files         private               it sees Python and shared libraries, read-only, and an empty
                                    ``/tmp`` and ``/dev/shm`` in memory, bounded together
              none written          it reads Python and shared libraries and writes no file; it
                                    learns names, sizes and dates of others
              those of its user *   it reads and writes whatever its user may
              all readable *        so, and it reads all files of the machine
user          own                   started by root, it has a user of its own
              caller                it runs as the caller, without capabilities
process_limit own                   counts its own processes (before Linux 5.14: all of the user)
              per user              counts all processes of the user; often the limit is reached
                                    already
              none *                it runs as root, which the kernel does not limit
memory        cgroup                counted for all its processes together, files included
              per process           each process has the limit for itself
system_calls  filter                those that a Python program needs; on x86-64 and aarch64
              all *                 no filter on this machine
verdict       checker               the checks decide
              program               there are no checks
============= ===================== ==============================================================

**What it is not.** It is no virtual machine: a program that finds a fault in what the filter leaves
of the kernel may succeed. CPU time is limited per process. Run programs of unknown origin on a
machine or in a container that holds nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lordjax.runtime.progress import Progress

PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY = "passed", "failed", "timed out", "out of memory"
SUPERVISOR = Path(__file__).with_name("sandbox_supervisor.py")
MECHANISMS = ("namespaces", "landlock", "filter", "cgroup")
GRACE = 60  # extra seconds for the supervisor, to start and to kill a program
KILLING = 10  # seconds that a killed supervisor has to end
# What a process does, by the letter that the kernel has for it.
STATES = {
    "T": "stopped",
    "t": "stopped",
    "D": "waiting for the kernel",
    "S": "waiting",
    "Z": "gone",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Resources that a program may use.

    Attributes:
      seconds: seconds of wall-clock time, after which all its processes are killed.
      cpu_seconds: seconds of CPU time per process; rounded up.
      memory: bytes of address space per process; with a control group also of all together.
      file_bytes: bytes of the largest file; where files are private, bytes of all its files.
      processes: number of processes and threads at the same time.
      open_files: number of open files per process.
      output: last bytes of its output that are kept; it may print more.
    """

    seconds: float = 10.0
    cpu_seconds: float = 5.0
    memory: int = 2**30
    file_bytes: int = 2**24
    processes: int = 8
    open_files: int = 64
    output: int = 2**16

    def check(self) -> None:
        """Raises ValueError if a limit is not positive."""
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ValueError(f"limit {name} is {value}; expected more than 0")


@dataclasses.dataclass(frozen=True)
class Checks:
    """What decides whether a program is right; it runs in another process than the program.

    Arguments and results of the program's functions travel by value. Objects that are no plain
    data stay in their process, and the other one gets a reference to call or to read attributes of.

    Attributes:
      text: source text that runs to its end if the program is right.
      names: the program's functions and classes that the text uses.
      setup: source text that runs before, for what the text needs besides.
    """

    text: str
    names: tuple[str, ...] = ()
    setup: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a program.

    Attributes:
      outcome: ``passed``, ``failed``, ``timed out`` or ``out of memory``.
      error: one line that says why the program did not pass; empty if it passed.
      seconds: wall-clock seconds that it ran.
      output: the end of its output on stdout and stderr.
      isolation: the isolation in force, see the module's docstring; empty if unknown.
    """

    outcome: str
    error: str
    seconds: float
    output: str
    isolation: dict[str, str]


def run(
    program: str,
    limits: Limits | None = None,
    *,
    checks: Checks | None = None,
    weak: bool = False,
    without: Sequence[str] = (),
) -> Result:
    """Runs a program in the sandbox.

    Args:
      program: source text; its ``__name__`` is not ``__main__``.
      limits: resources it may use; None: the defaults of `Limits`.
      checks: what decides whether it is right; None: it passes if it reaches its last line.
      weak: whether it may run where the isolation is weak, see the module's docstring.
      without: mechanisms of `MECHANISMS` that are not used, as on a machine that lacks them.

    Returns:
      The outcome, output and isolation.

    Raises:
      ValueError: if a limit is not positive, or a mechanism unknown.
      PermissionError: if the isolation is weak and ``weak`` is false; the program did not run.
      OSError: if this is not Linux, or the sandbox cannot be set up.
    """
    limits = limits or Limits()
    limits.check()
    if unknown := set(without) - set(MECHANISMS):
        raise ValueError(f"without {sorted(unknown)}; expected some of {', '.join(MECHANISMS)}")
    if sys.platform != "linux":
        raise OSError(f"programs are run on Linux only, not on {sys.platform}; use a container")
    with tempfile.TemporaryDirectory(
        prefix="lordjax-program-", ignore_cleanup_errors=True
    ) as directory:
        request = {
            "program": program,
            "directory": directory,
            "limits": dataclasses.asdict(limits),
            "weak": weak,
            "without": list(without),
        }
        done = _supervise(request, checks or Checks(""), directory, limits.seconds + GRACE)
    if done.returncode < 0:
        why = f"its supervisor was killed by {signal.Signals(-done.returncode).name}"
        return Result(FAILED, why, 0.0, "", {})
    report = json.loads(done.stdout) if done.returncode == 0 else {}
    _check_accepted(report)
    if set(report) != {field.name for field in dataclasses.fields(Result)}:
        reason = (
            report.get("error") or (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        )
        raise OSError(
            f"the sandbox did not work (exit code {done.returncode}: {reason}); expected a Linux "
            "that lets this user start and limit processes: use another machine or container"
        )
    report["isolation"]["verdict"] = "program" if checks is None else "checker"
    return Result(**report)


def _check_accepted(report: dict[str, Any]) -> None:
    """Raises PermissionError if the supervisor refused to run the program."""
    if "refused" in report:
        found = ", ".join(f"{key}: {value}" for key, value in report["refused"].items())
        raise PermissionError(
            f"this machine isolates programs too weakly ({found}); expected namespaces, Landlock "
            "and a filter of system calls: use a machine, virtual machine or container that allows "
            "them. docs/pages/evaluation.md says what each value means"
        )


def _supervise(
    request: dict[str, Any], checks: Checks, directory: str, seconds: float
) -> subprocess.CompletedProcess[str]:
    """Starts the supervisor and waits for it; raises OSError if it takes too long."""
    # Bytecode is written: compiling the supervisor's modules takes as long as starting Python.
    command = [sys.executable, "-P", "-s", "-S", "-u", "-X", "utf8", str(SUPERVISOR), directory]
    # Some builds of Python do not start without LD_LIBRARY_PATH. A fixed hash seed gives sets of
    # texts, and so the results of programs, the same order in every process.
    kept = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
    first, second = json.dumps(request), json.dumps(dataclasses.asdict(checks))
    supervisor = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={"PYTHONHASHSEED": "0", **kept},
        cwd=directory,
        start_new_session=True,
    )
    try:
        output, errors = supervisor.communicate(f"{len(first)}\n{first}{second}", seconds)
    except BaseException as error:
        state = _kill(supervisor)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise OSError(
            f"the sandbox returned no result within {seconds:g} s (its supervisor was {state}); is "
            "the machine overloaded?"
        ) from error
    return subprocess.CompletedProcess(command, supervisor.returncode, output, errors)


def _kill(supervisor: subprocess.Popen[str]) -> str:
    """Kills a supervisor, and waits for its end, but not for ever; returns what it was doing."""
    try:
        line = Path(f"/proc/{supervisor.pid}/stat").read_text("utf-8", "replace")
        state = STATES.get(line.rpartition(")")[2].split()[0], "at work")
    except OSError:
        state = "gone"
    supervisor.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel may not let go of it
        supervisor.communicate(timeout=KILLING)
    return state


def run_all(
    programs: Sequence[str],
    limits: Limits | None = None,
    *,
    workers: int | None = None,
    checks: Sequence[Checks | None] | None = None,
    weak: bool = False,
    without: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Result]:
    """Runs programs in parallel.

    Args:
      programs: source texts.
      limits: resources that each program may use; None: the defaults of `Limits`.
      workers: number of programs that run at the same time; None: one per core of this process.
      checks: the checks of every program, as many as programs; None: no checks.
      weak: as for `run`.
      without: as for `run`.
      progress: called with ("run", programs done, number of programs).

    Returns:
      The results, in the order of the programs.

    Raises:
      ValueError: if the number of workers is not positive, or as `run`.
      PermissionError, OSError: as `run`.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if workers < 1:
        raise ValueError(f"{workers} workers; expected 1 or more")
    pairs = list(zip(programs, checks or [None] * len(programs), strict=True))
    results = []
    # Threads are enough: they only wait for processes.
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = [
            pool.submit(run, text, limits, checks=check, weak=weak, without=without)
            for text, check in pairs
        ]
        for future in waiting:
            results.append(future.result())
            if progress is not None:
                progress("run", len(results), len(programs))
    finally:
        pool.shutdown(cancel_futures=True)
    return results
