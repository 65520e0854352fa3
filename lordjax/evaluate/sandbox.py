"""Untrusted Python programs, each in processes of its own, with limits.

A program passes if its last line is reached: it then hands over a token that nothing but its
harness reads, and only then. ``sys.exit(0)`` or ``os._exit(0)`` before that is a failure.

**What it is.** Every program has an own interpreter with the standard library and nothing else
(``-S``), no environment but a fixed hash seed, an empty standard input and an empty directory.
`Limits` bound it, and nothing of it is left when its result is there. What else holds depends on
the machine, so every result says it (``isolation``):

============= ================================= ==================================================
key           value                             meaning
============= ================================= ==================================================
network       namespace                         own, empty network; of sockets only those that
                                                are files, of this machine, can be reached
              socket module                     Python's module refuses; a C library would not
processes     namespace                         reaches only its own, and all end with it
              orphans adopted                   all end with it; may kill others of its user
files         read-only                         writes to its directory and ``/dev/shm``, both in
                                                memory and bounded; ``/proc``, ``/run`` are empty
              those of its user                 writes what its user may write
user          own                               started by root, which it no longer is
              caller                            the user who started it, without capabilities
process_limit own                               counts its processes (before Linux 5.14 per user)
              per user                          counts all processes of the user: often none left
              none                              root, whom the kernel does not limit
============= ================================= ==================================================

**What it is not.** No virtual machine: a program that attacks the kernel may win. A program may
*read* every file that its caller may read. Limits of memory and of CPU time are per process; all
of them together are bounded by their number and by wall-clock time only. Tests share their process
with what they test: a program that sets out to deceive them can. For programs of unknown origin use
a machine or a container that holds nothing else.
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
GRACE = 60  # seconds the supervisor has beyond a program's, for starting and for killing


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
      seconds: of wall-clock time, until everything of it is killed.
      cpu_seconds: of CPU time of each process; rounded up.
      memory: bytes of address space of each process.
      file_bytes: of its largest file; where files are read-only, of all of them together.
      processes: and threads, at one time.
      open_files: of each process.
      output: bytes of what it prints that are kept, the last ones; it may print more.
    """

    seconds: float = 10.0
    cpu_seconds: float = 5.0
    memory: int = 2**30
    file_bytes: int = 2**24
    processes: int = 8
    open_files: int = 64
    output: int = 2**16

    def check(self) -> None:
        """Raises ValueError if one of them is not positive."""
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ValueError(f"limit {name} is {value}; expected more than 0")


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a program.

    Attributes:
      outcome: ``passed``, ``failed``, ``timed out`` or ``out of memory``.
      error: one line that says why it did not pass.
      seconds: of wall-clock time that it ran.
      output: the end of what it printed, on stdout and stderr.
      isolation: what was in force; see the module's docstring. Empty if not even that is known.
    """

    outcome: str
    error: str
    seconds: float
    output: str
    isolation: dict[str, str]


def run(program: str, limits: Limits | None = None, *, namespaces: bool = True) -> Result:
    """Runs a program.

    Args:
      program: its source; it is no ``__main__``.
      limits: what it may use; None: `Limits`.
      namespaces: False: without those of the kernel, as where they are not allowed.

    Raises:
      ValueError: if a limit is not positive.
      OSError: if this is not Linux, or the sandbox cannot be set up.
    """
    limits = limits or Limits()
    limits.check()
    if sys.platform != "linux":
        raise OSError(f"programs are run on Linux only, not on {sys.platform}; use a container")
    # What the environment holds is for the program to see. Its hash seed is fixed: sets of texts
    # have another order in every process otherwise, and so may what a program returns.
    command = [sys.executable, "-P", "-s", "-S", "-B", "-u", "-X", "utf8", str(SUPERVISOR)]
    # Without it some builds of Python do not start.
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
                f"the sandbox gave no result {GRACE} s after its program's time"
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
            f"the sandbox did not work (exit code {done.returncode}: {reason}); "
            "namespaces=False does without those of the kernel"
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
    """Runs programs beside each other.

    Args:
      programs: their sources.
      limits: what each of them may use.
      workers: how many run at one time; None: as many as there are cores for this process.
      namespaces: see `run`.
      progress: called with ("run", programs done, programs in all).

    Returns:
      Their results, in the order of the programs.

    Raises:
      ValueError: if a limit or the number of workers is not positive.
      OSError: as `run`.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if workers < 1:
        raise ValueError(f"{workers} workers; expected 1 or more")
    results = []
    # Threads only wait: the work is in the processes.
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
