"""Runs untrusted Python programs in separate processes with limits.

A program passes if it reaches its last line. Only then can its harness read a secret token and
report it. ``sys.exit(0)`` or ``os._exit(0)`` before the last line is a failure.

**What it is.** Every program has its own interpreter with only the standard library (``-S``), an
environment with only a fixed hash seed, an empty standard input and an empty directory. `Limits`
bound its resources. When its result is returned, all its processes are killed and its directory is
removed. All other isolation depends on the machine, so every result reports it (``isolation``):

============= ================================= ==================================================
key           value                             meaning
============= ================================= ==================================================
network       namespace                         an empty network of its own; it reaches only Unix
                                                sockets that are files on this machine
              socket module                     Python's socket module refuses; a C library would
                                                not
processes     namespace                         it sees only its own processes; all end with it
              orphans adopted                   all its processes end with it; it may kill others
                                                of its user
files         read-only                         it writes to its directory and ``/dev/shm``, both
                                                in memory and bounded; ``/proc``, ``/run`` are empty
              those of its user                 it writes wherever its user may write
user          own                               started by root, it runs as another user
              caller                            it runs as the caller, without capabilities
process_limit own                               counts its own processes (before Linux 5.14: all
                                                of the user)
              per user                          counts all processes of the user; often the limit
                                                is reached already
              none                              it runs as root, which the kernel does not limit
============= ================================= ==================================================

**What it is not.** It is no virtual machine: a program that attacks the kernel may succeed. A
program can *read* every file that the caller can read. Memory and CPU time are limited per process;
their total is limited only by the number of processes and the wall-clock time. The tests run in the
same process as the tested code, so a malicious program can deceive them. Run programs of unknown
origin on a machine or in a container that holds nothing else.
"""

from __future__ import annotations

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

from lordjax.runtime.progress import Progress

PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY = "passed", "failed", "timed out", "out of memory"
SUPERVISOR = Path(__file__).with_name("sandbox_supervisor.py")
GRACE = 60  # extra seconds for the supervisor, to start and to kill a program


@dataclasses.dataclass(frozen=True)
class Limits:
    """Resources that a program may use.

    Attributes:
      seconds: seconds of wall-clock time, after which all its processes are killed.
      cpu_seconds: seconds of CPU time per process; rounded up.
      memory: bytes of address space per process.
      file_bytes: bytes of the largest file; where files are read-only, bytes of all its files.
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


def run(program: str, limits: Limits | None = None, *, namespaces: bool = True) -> Result:
    """Runs a program in the sandbox.

    Args:
      program: source text; its ``__name__`` is not ``__main__``.
      limits: resources it may use; None: the defaults of `Limits`.
      namespaces: whether to use namespaces of the kernel where they are allowed.

    Returns:
      The outcome, output and isolation.

    Raises:
      ValueError: if a limit is not positive.
      OSError: if this is not Linux, or the sandbox cannot be set up.
    """
    limits = limits or Limits()
    limits.check()
    if sys.platform != "linux":
        raise OSError(f"programs are run on Linux only, not on {sys.platform}; use a container")
    # The program can read its environment, so that is empty. A fixed hash seed gives sets of texts,
    # and so the results of programs, the same order in every process.
    command = [sys.executable, "-P", "-s", "-S", "-B", "-u", "-X", "utf8", str(SUPERVISOR)]
    # Some builds of Python do not start without LD_LIBRARY_PATH.
    kept = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
    with tempfile.TemporaryDirectory(
        prefix="lordjax-program-", ignore_cleanup_errors=True
    ) as directory:
        request = {
            "program": program,
            "directory": directory,
            "limits": dataclasses.asdict(limits),
            "namespaces": namespaces,
        }
        try:
            done = subprocess.run(
                command,
                input=json.dumps(request),
                capture_output=True,
                text=True,
                encoding="utf-8",
                env={"PYTHONHASHSEED": "0", **kept},
                cwd=directory,
                start_new_session=True,
                timeout=limits.seconds + GRACE,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(
                f"the sandbox returned no result within {limits.seconds + GRACE:g} s; is the "
                "machine overloaded?"
            ) from error
    if done.returncode < 0:
        why = f"its supervisor was killed by {signal.Signals(-done.returncode).name}"
        return Result(FAILED, why, 0.0, "", {})
    report = json.loads(done.stdout) if done.returncode == 0 else {}
    if set(report) != {field.name for field in dataclasses.fields(Result)}:
        reason = (
            report.get("error") or (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        )
        raise OSError(
            f"the sandbox did not work (exit code {done.returncode}: {reason}); try "
            "namespaces=False, which uses no namespaces of the kernel"
        )
    return Result(**report)


def run_all(
    programs: Sequence[str],
    limits: Limits | None = None,
    *,
    workers: int | None = None,
    namespaces: bool = True,
    progress: Progress | None = None,
) -> list[Result]:
    """Runs programs in parallel.

    Args:
      programs: source texts.
      limits: resources that each program may use; None: the defaults of `Limits`.
      workers: number of programs that run at the same time; None: one per core of this process.
      namespaces: as for `run`.
      progress: called with ("run", programs done, number of programs).

    Returns:
      The results, in the order of the programs.

    Raises:
      ValueError: if a limit or the number of workers is not positive.
      OSError: as `run`.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if workers < 1:
        raise ValueError(f"{workers} workers; expected 1 or more")
    results = []
    # Threads are enough: they only wait for processes.
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = [pool.submit(run, text, limits, namespaces=namespaces) for text in programs]
        for future in waiting:
            results.append(future.result())
            if progress is not None:
                progress("run", len(results), len(programs))
    finally:
        pool.shutdown(cancel_futures=True)
    return results
