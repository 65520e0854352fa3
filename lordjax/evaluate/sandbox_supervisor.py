"""Supervises an untrusted program; `sandbox` starts this file as a stand-alone script.

The script reads a request from stdin and writes a report to stdout, both as JSON. It imports only
the standard library, so it stays one file, although it exceeds 350 lines. It starts no threads,
because it forks. There are three processes::

    supervisor   waits, reads the output, kills, reports
    └ keeper     first process of its namespace: when it ends, the kernel kills all others in it
      └ program  limited; runs the text, then reads the secret token and writes it as its answer

Without namespaces, the keeper leads a session, and the supervisor adopts orphans and kills all.
Linux only; for namespaces and mounts see the manual pages unshare(2) and mount_setattr(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import os
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Callable

TYPE_CHECKING = False  # not from `typing`: importing it takes longer than most programs run
if TYPE_CHECKING:
    from typing import Any, NoReturn

NEW_USER, NEW_NETWORK, NEW_PIDS, NEW_IPC, NEW_MOUNTS = 1 << 28, 1 << 30, 1 << 29, 1 << 27, 1 << 17
DEATH_SIGNAL, KEEP_CAPABILITIES, ADOPT_ORPHANS, NO_NEW_PRIVILEGES = 1, 8, 36, 38  # of prctl
MOUNT_SETATTR, WORKING_DIRECTORY, RECURSIVE = 442, -100, 0x8000
PRIVATE, NO_DEVICES = (
    1 << 18 | 1 << 14,
    1 << 1 | 1 << 2,
)  # of mount: recursive, private; no devices or set-uid files
CAPABILITY_VERSION, READ_EVERYTHING = 0x20080522, 1 << 2  # the latter is CAP_DAC_READ_SEARCH
# Normal systems have no accounts in this range; systemd takes its dynamic users from it, too.
FIRST_USER, USERS = 61184, 4336
LINE = 500  # largest number of characters of an error line


def main() -> None:
    """Reads the request, runs the program and writes the report."""
    request = json.load(sys.stdin)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    json.dump(supervise(**request), sys.stdout)


def supervise(
    program: str, directory: str, limits: dict[str, Any], namespaces: bool
) -> dict[str, Any]:
    """Runs a program to its end or its limits, then kills all its processes; returns the report."""
    call("prctl", ADOPT_ORPHANS, 1, 0, 0, 0)
    spaces = namespaces and new_namespaces()
    user = FIRST_USER + os.getpid() % USERS
    pipes = {name: os.pipe() for name in ("output", "answer", "secret", "status")}
    start = time.monotonic()
    keeper = os.fork()
    if not keeper:
        guarded(lambda: keep(program, directory, limits, spaces, user, pipes), pipes["status"][1])
    # The secret's pipe stays open at both ends, so that writing cannot fail if the program ended.
    for name in ("output", "answer", "status"):
        os.close(pipes[name][1])
    # Made after the fork, because the program inherits all memory from before it.
    token = os.urandom(16).hex()
    os.write(pipes["secret"][1], token.encode())
    reading = pipes["output"][0], pipes["status"][0]
    output, messages, ended = watch(*reading, start + limits["seconds"], limits["output"])
    kill_all(keeper, spaces)
    seconds = time.monotonic() - start
    output = (output + drain(pipes["output"][0]))[-limits["output"] :]
    status: dict[str, Any] = {}
    for message in messages.splitlines():
        status |= json.loads(message)
    if "error" in status:
        return status
    kind, _, text = drain(pipes["answer"][0]).decode(errors="replace").partition("\n")
    answer = (kind, text[:LINE])
    passed = kind == token and status.get("status") == 0
    outcome, error = ("passed", "") if passed else failure(answer, status, output, ended, limits)
    return {
        "outcome": outcome,
        "error": error,
        "seconds": seconds,
        "output": output.decode(errors="replace"),
        "isolation": status.get("isolation", {}),
    }


def failure(
    answer: tuple[str, str],
    status: dict[str, Any],
    output: bytes,
    ended: bool,
    limits: dict[str, Any],
) -> tuple[str, str]:
    """Returns the outcome of a program that did not pass, and a line that says why."""
    if not ended:
        return "timed out", f"no end after {limits['seconds']:g} s"
    code = status.get("status")
    if code == -signal.SIGXCPU or (
        code == -signal.SIGKILL and status["cpu"] >= limits["cpu_seconds"]
    ):
        return "timed out", f"more than {limits['cpu_seconds']:g} s of CPU time"
    if answer[0] in ("failed", "out of memory") and code == 0:
        return answer
    if code is None:
        return "failed", "its keeper was killed"
    lines = output.decode(errors="replace").strip().splitlines()
    last = f": {lines[-1][:LINE]}" if lines and code else ""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return "failed", f"ended before its tests did, {how}{last}"


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
      The last ``limit`` bytes of output, the messages, and whether the keeper ended in time. The
      keeper alone holds the pipe of messages, so its end closes that pipe.
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


def kill_all(keeper: int, spaces: bool) -> None:
    """Kills the keeper and all processes below it, and waits until they are gone."""
    if spaces:
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)
        return
    os.kill(keeper, signal.SIGKILL)  # by itself, because it may not lead its session yet
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            for child in file.read().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)  # then its children become children of this process
        except ChildProcessError:
            return


def keep(
    program: str,
    directory: str,
    limits: dict[str, Any],
    spaces: bool,
    user: int,
    pipes: dict[str, tuple[int, int]],
) -> None:
    """Runs the keeper: isolates itself, starts the program, and reports how it ended."""
    os.setsid()
    read_only = spaces and mount(directory, limits["file_bytes"])
    os.chdir(directory)  # before the change of user, who may not be able to reach it
    own_user = leave_privileges(user, directory)
    call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)  # here, as a change of user clears it
    isolation = {
        "network": "namespace" if spaces else "socket module",
        "processes": "namespace" if spaces else "orphans adopted",
        "files": "read-only" if read_only else "those of its user",
        "user": "own" if own_user else "caller",
        "process_limit": "own" if own_user or spaces else "per user",
    }
    if not os.getuid():
        isolation["process_limit"] = "none"
    # The keeper counts as a process of the program's user; in a user namespace the supervisor, too.
    spare = 1 if own_user else 2
    send(pipes["status"][1], {"isolation": isolation})
    child = os.fork()
    if not child:
        guarded(lambda: run(program, limits, spare, spaces, pipes), pipes["status"][1])
    while True:
        found, status, usage = os.wait4(-1, 0)  # also returns adopted orphans of the program
        if found == child:
            break
    cpu = usage.ru_utime + usage.ru_stime
    send(pipes["status"][1], {"status": os.waitstatus_to_exitcode(status), "cpu": cpu})


def mount(directory: str, size: int) -> bool:
    """Makes all files read-only, except in an empty directory; False if not permitted."""
    if libc().mount(None, b"/", None, ctypes.c_ulong(PRIVATE), None):
        return False
    attributes = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # set: read-only
    words = (ctypes.c_long(w) for w in (MOUNT_SETATTR, WORKING_DIRECTORY, RECURSIVE, 32))
    number, start, how, size_of = words
    if libc().syscall(number, start, b"/", how, attributes, size_of):
        return False
    # Hide the files about other processes, and the sockets of services.
    rooms = {"/proc": 0, "/run": 0, "/dev/shm": size, directory: size}
    for path, room in rooms.items():
        if os.path.isdir(path):
            options = f"size={max(room, 4096)},nr_inodes=4096,mode={1777 if room else 555}"
            call("mount", b"tmpfs", path.encode(), b"tmpfs", NO_DEVICES, options.encode())
    return True


def leave_privileges(user: int, directory: str) -> bool:
    """Gives up root's privileges; returns whether the process became another user.

    If only root can read Python's own files, the capability to read everything is kept.
    """
    call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    kept, changed = 0, False
    if not os.getuid():
        readable, folder = True, os.path.dirname(os.__file__)
        while readable and folder != "/":
            readable, folder = bool(os.stat(folder).st_mode & 1), os.path.dirname(folder)
        kept = 0 if readable else READ_EVERYTHING & capabilities()
        if readable or kept:
            call("prctl", KEEP_CAPABILITIES, 1, 0, 0, 0)
            changed = become(user, directory)
    set_capabilities(kept)
    return changed


def become(user: int, directory: str) -> bool:
    """Becomes another user; returns False if not possible, as in a container without others."""
    try:
        os.chown(directory, user, user)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError:
        return False
    return True


def run(
    program: str,
    limits: dict[str, Any],
    spare: int,
    spaces: bool,
    pipes: dict[str, tuple[int, int]],
) -> None:
    """Runs the program's process: sets limits, executes the text, and writes the answer."""
    call("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    output, answer, secret = pipes["output"][1], pipes["answer"][1], pipes["secret"][0]
    os.dup2(output, 1)
    os.dup2(output, 2)
    limit(limits, spare)
    if not spaces:
        close_sockets()
    for pair in pipes.values():
        for end in set(pair) - {answer, secret}:
            os.close(end)
    # Keep these functions, because a program may replace them.
    read, write, leave, number, own = os.read, os.write, os._exit, os.getpid, os.getpid()
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(program, "program", "exec", dont_inherit=True), module.__dict__)
        # A process that the program forked must not answer.
        reply = read(secret, 64) if number() == own else b""
    except MemoryError:
        reply = b"out of memory\nMemoryError"
    except BaseException as error:
        reply = b"failed\n" + line(error).encode(errors="replace")
    if number() == own:
        write(answer, reply)
    leave(0)


def line(error: BaseException) -> str:
    """Returns the first line of an exception, as Python prints it."""
    try:
        text = str(error)
    except BaseException as other:
        text = f"(its message raises {type(other).__name__})"
    name = type(error).__name__
    return f"{name}: {text}".splitlines()[0][:LINE] if text else name


def limit(limits: dict[str, Any], spare: int) -> None:
    """Sets the limits that the kernel enforces per process."""
    processes = limits["processes"] + spare
    cpu = math.ceil(limits["cpu_seconds"])
    wanted = {
        resource.RLIMIT_AS: (limits["memory"], limits["memory"]),
        resource.RLIMIT_CPU: (cpu, cpu + 1),  # SIGXCPU, then SIGKILL
        resource.RLIMIT_FSIZE: (limits["file_bytes"], limits["file_bytes"]),
        resource.RLIMIT_NOFILE: (limits["open_files"], limits["open_files"]),
        resource.RLIMIT_NPROC: (processes, processes),
        resource.RLIMIT_CORE: (0, 0),
    }
    for kind, pair in wanted.items():
        most = resource.getrlimit(kind)[1]
        soft, hard = (v if most == resource.RLIM_INFINITY else min(v, most) for v in pair)
        resource.setrlimit(kind, (soft, hard))


def close_sockets() -> None:
    """Makes Python's socket module refuse; protects against accidents, not against intent."""
    import socket

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        del args, kwargs
        raise PermissionError("no network in the sandbox")

    for owner, name in ((socket.socket, "__init__"), (socket, "getaddrinfo")):
        setattr(owner, name, refuse)


def guarded(part: Callable[[], None], errors: int) -> NoReturn:
    """Runs a function in a forked process and exits; never returns into the parent's code."""
    code = 0
    try:
        part()
    except BaseException as error:
        code = 1
        send(errors, {"error": line(error)})
    finally:
        os._exit(code)


@functools.cache
def libc() -> Any:
    """Returns the C library."""
    return ctypes.CDLL(None, use_errno=True)


def send(pipe: int, message: dict[str, Any]) -> None:
    """Writes a message as one line, short enough that writing never blocks."""
    os.write(pipe, json.dumps(message).encode() + b"\n")


def call(name: str, *args: Any) -> None:
    """Calls a function of the C library; raises OSError if it fails."""
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
    if getattr(libc(), name)(*words):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def capabilities() -> int:
    """Returns the permitted capabilities of this process among the first 32, as bits."""
    words = (ctypes.c_uint32 * 6)()
    call("capget", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), words)
    return words[1]


def set_capabilities(kept: int) -> None:
    """Gives up all capabilities but these."""
    words = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
    call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), words)


if __name__ == "__main__":
    main()
