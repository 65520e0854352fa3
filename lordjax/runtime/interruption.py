"""Signals that end a command: one line on stderr, nothing half-written, the usual exit code.

A handler of Python runs only between two instructions of the main thread, so not while XLA compiles
or a program runs. So the signal becomes an exception if it can; and after `GRACE` seconds a thread
ends the process, and leaves its directories as the exception would.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

from lordjax.runtime import unfinished

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
GRACE = 10.0  # seconds until a process that does not react is ended


class Interrupted(BaseException):
    """A signal that ends the process.

    Attributes:
      number: the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


_received: list[int] = []  # the first signal; others change nothing
_swallowed = threading.Event()  # its exception came in a destructor, where Python drops it
_once = threading.Lock()


@contextlib.contextmanager
def signals_end(command: list[str]) -> Iterator[None]:
    """Ends the process with one line if a signal comes while the block runs.

    Args:
      command: the command line, with which work that is kept can be resumed.
    """
    ours = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    # A signal that the caller ignores (nohup, a shell's background job) stays ignored.
    ours = [number for number in ours if signal.getsignal(number) != signal.SIG_IGN]
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watch = (reader, set(ours), command)
    threading.Thread(target=_watch, args=watch, daemon=True, name="signals").start()
    before = sys.unraisablehook

    def dropped(args: Any) -> None:
        if isinstance(args.exc_value, Interrupted):
            _swallowed.set()
        else:
            before(args)

    sys.unraisablehook = dropped
    for number in ours:
        signal.signal(number, _raise_once)
    try:
        yield
    except BaseException as error:
        # A library may have turned the exception into one of its own.
        if not _received:
            raise
        _end(_received[0], getattr(error, "__notes__", []), command)
    finally:
        sys.unraisablehook = before
        signal.set_wakeup_fd(-1)
        writer.close()
    if _received:  # or have swallowed it
        _end(_received[0], [], command)


def _raise_once(number: int, frame: Any) -> None:
    del frame
    if not _received or _swallowed.is_set():
        _swallowed.clear()
        _received.append(number)
        raise Interrupted(number)


def _watch(reader: socket.socket, ours: set[int], command: list[str]) -> None:
    """Waits for a signal, and ends the process if the main thread does not."""
    received = reader.recv(1)
    while received and received[0] not in ours:
        received = reader.recv(1)
    if not received:  # the command has ended
        return
    number = received[0]
    end = time.monotonic() + GRACE
    while time.monotonic() < end:
        _kill_children()  # threads wait for them, and start others until the main thread reacts
        time.sleep(0.2)
        if _swallowed.is_set() and hasattr(signal, "pthread_kill"):  # not on Windows
            signal.pthread_kill(cast(int, threading.main_thread().ident), number)
    _end(number, [], command)


def _kill_children() -> None:
    """Kills the processes that this one has started, such as those that run generated programs."""
    for task in Path("/proc/self/task").glob("*/children"):  # Linux; elsewhere none are started
        with contextlib.suppress(OSError):  # the thread or the process has just ended
            for child in task.read_bytes().split():
                os.kill(int(child), signal.SIGKILL)


def _end(number: int, notes: list[str], command: list[str]) -> NoReturn:
    """Leaves all directories, prints the line and ends the process, in whichever thread is first.

    Nothing runs after it: threads of libraries would be waited for.
    """
    with _once:
        kept = list(dict.fromkeys([*notes, *unfinished.leave_all()]))
        print(interruption(number, kept, command), file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # the reader of stdout may be gone
            sys.stdout.flush()
        os._exit(128 + number)


def interruption(number: int, kept: list[str], command: list[str]) -> str:
    """Returns the line about a signal.

    Args:
      number: the signal.
      kept: what to say about directories that can be resumed.
      command: the command line.
    """
    name = signal.Signals(number).name
    if not kept:
        return f"interrupted ({name}): nothing unfinished is left"
    again = [*command]
    if "finetune" in again[1:2] and "--resume" not in again:
        again.append("--resume")
    return f"interrupted ({name}): {'; '.join(kept)}; go on with: {shlex.join(again)}"
