"""Supervises an untrusted program: sets up, waits, reads its output, kills and reports.

There are four processes, and no threads, because they fork::

    supervisor     waits outside the namespaces, reads output and verdict
    └ keeper       first process inside; when it ends, the kernel kills all others
      ├ program    confined; runs the text, then answers calls
      └ checker    confined; runs the checks on the program's answers, and writes the verdict

Without namespaces, the keeper leads a session, and the supervisor adopts orphans and kills all.
Linux only; for namespaces see unshare(2).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time

from lordjax.evaluate.isolation import cgroup, confinement, kernel_calls
from lordjax.evaluate.isolation.keeper import guarded, keep
from lordjax.evaluate.isolation.kernel_calls import libc, prctl
from lordjax.evaluate.isolation.peer import LINE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

KILLING = 10.0  # seconds that killed processes have to end
NEW_USER, NEW_NETWORK, NEW_PIDS, NEW_IPC, NEW_MOUNTS = 1 << 28, 1 << 30, 1 << 29, 1 << 27, 1 << 17


def main() -> None:
    """Reads the request, runs the program and writes the report."""
    json.dump(supervise(read_request()), sys.stdout)


def read_request() -> dict[str, Any]:
    """Reads the request from standard input, and leaves the checks behind it unread.

    So they are in the memory of the checker only.

    Raises:
      EOFError: if the caller ended before it had written the request.
    """
    digits = b""
    while not digits.endswith(b"\n"):
        digits += read(1)
    text, length = b"", int(digits)
    while len(text) < length:
        text += read(length - len(text))
    return json.loads(text)


def read(most: int) -> bytes:
    """Reads some bytes of standard input."""
    if not (data := os.read(0, most)):
        raise EOFError("the request ends too early")
    return data


def supervise(request: dict[str, Any]) -> dict[str, Any]:
    """Runs a program to its end or its limits, then kills all its processes; returns the report."""
    limits, without = request["limits"], request["without"]
    prctl(kernel_calls.ADOPT_ORPHANS, 1)
    group = None if "cgroup" in without else cgroup.create(limits)
    spaces = "namespaces" not in without and new_namespaces()
    prctl(kernel_calls.DUMPABLE, 0)
    users = confinement.own_users()
    pipes = {name: os.pipe() for name in ("output", "verdict", "status")}
    writing = {name: pair[1] for name, pair in pipes.items()}

    def inside() -> None:
        prctl(kernel_calls.DEATH_SIGNAL, signal.SIGKILL)  # it never outlives the supervisor
        os.setsid()
        in_group = group is not None and cgroup.enter(group)
        keep(request, spaces, users, in_group, writing)

    begin = time.monotonic()
    keeper = os.fork()
    if not keeper:
        guarded(inside, writing["status"])
    for number in (0, *writing.values()):
        os.close(number)
    reading = {name: pair[0] for name, pair in pipes.items()}
    deadline = begin + limits["seconds"]
    output, messages, ended = watch(
        reading["output"], reading["status"], deadline, limits["output"]
    )
    status: dict[str, Any] = {}
    for message in messages.splitlines():
        status |= json.loads(message)
    gone = kill_all(keeper, spaces, status.get("groups", ()))
    seconds = time.monotonic() - begin
    exhausted = group is not None and cgroup.ran_out(group)
    if group is not None:
        cgroup.remove(group)
    output = (output + drain(reading["output"]))[-limits["output"] :]
    status |= {"verdict": drain(reading["verdict"]), "exhausted": exhausted}
    if not gone:
        status["error"] = f"killed processes of the program were still there after {KILLING:g} s"
    if "error" in status or "refused" in status:
        return {key: status[key] for key in ("error", "refused") if key in status}
    outcome, error = result(status, output, ended, limits)
    return {
        "outcome": outcome,
        "error": error,
        "seconds": seconds,
        "output": output.decode(errors="replace"),
        "isolation": status.get("isolation", {}),
    }


def result(
    status: dict[str, Any], output: bytes, ended: bool, limits: dict[str, Any]
) -> tuple[str, str]:
    """Returns the outcome of a program, and a line that says why it did not pass."""
    if not ended:
        return "timed out", f"no end after {limits['seconds']:g} s"
    if "checker" not in status:
        return "failed", "its keeper was killed"
    for who, what in (("program", ""), ("checker", "its checks: ")):
        code, cpu = status[who] or (0, 0.0)
        killed = code == -signal.SIGKILL
        if code == -signal.SIGXCPU or (killed and cpu >= limits["cpu_seconds"]):
            return "timed out", f"{what}more than {limits['cpu_seconds']:g} s of CPU time"
        if killed and status["exhausted"]:
            return "out of memory", f"{what}more than {limits['memory']} bytes in all processes"
    if not status["verdict"]:
        return "failed", f"its checks ended without a verdict, {how_ended(status['checker'][0])}"
    outcome, error = json.loads(status["verdict"])
    if outcome != "ended":
        return outcome, error[:LINE]
    code = status["program"][0] if status["program"] else 0
    lines = output.decode(errors="replace").strip().splitlines()
    last = f": {lines[-1][:LINE]}" if lines and code else ""
    return "failed", f"ended before its tests did, {how_ended(code)}{last}"


def how_ended(code: int) -> str:
    """Returns an exit code or a negative signal in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def new_namespaces() -> bool:
    """Enters new namespaces for network, processes, IPC and mounts; False if not permitted."""
    user, group = os.getuid(), os.getgid()
    flags = NEW_NETWORK | NEW_PIDS | NEW_IPC | NEW_MOUNTS | (NEW_USER if user else 0)
    if libc().unshare(flags):
        return False
    if user:
        maps = {"uid_map": f"{user} {user} 1", "setgroups": "deny", "gid_map": f"{group} {group} 1"}
        # Ubuntu may grant a user namespace without rights in it. Then all namespaces are in force,
        # but the user is not mapped, and `mount` will be refused.
        with contextlib.suppress(PermissionError):
            for name, text in maps.items():
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
    return True


def watch(output: int, status: int, deadline: float, limit: int) -> tuple[bytes, bytes, bool]:
    """Reads the program's output and the keeper's messages until the keeper ends or time is up.

    Returns:
      The last ``limit`` bytes of output, the messages, and whether the keeper ended in time. Once
      program and checker run, the keeper alone holds the pipe of messages, so its end closes that
      pipe.
    """
    printed, messages, waiting = b"", b"", [output, status]
    while (left := deadline - time.monotonic()) > 0:
        for pipe in select.select(waiting, [], [], left)[0]:
            data = os.read(pipe, 65536)
            if pipe == status:
                messages += data
                if not data:
                    return printed, messages, True
            elif data:
                printed = (printed + data)[-limit:]
            else:  # the program closed its output
                waiting.remove(output)
    return printed, messages, False


def drain(pipe: int) -> bytes:
    """Returns the contents of a pipe without waiting for processes that hold its other end."""
    os.set_blocking(pipe, False)
    try:
        return os.read(pipe, 1 << 20)
    except BlockingIOError:
        return b""


def kill_all(keeper: int, spaces: bool, groups: Iterable[int]) -> bool:
    """Kills the keeper and all processes below it, and waits until they are gone.

    Args:
      keeper: the keeper's process.
      spaces: whether namespaces are in force, which end with the keeper.
      groups: process groups of program and checker, which the filter does not let them leave. A
        group is killed at once, so no process of it can fork in time.

    Returns:
      Whether they were gone within `KILLING` seconds.
    """
    os.kill(keeper, signal.SIGKILL)
    for group in () if spaces else groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    end = time.monotonic() + KILLING
    with contextlib.suppress(ChildProcessError):  # none are left
        while time.monotonic() < end:
            if not spaces:
                kill_children()
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # then its children become children of this process
            time.sleep(0.001)
        return False
    return True


def kill_children() -> None:
    """Kills the children that the kernel lists, which may lack some while others end."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        for child in file.read().split():
            os.kill(int(child), signal.SIGKILL)
