"""A control group (version 2) that counts the memory and processes of a program together.

Source: https://docs.kernel.org/admin-guide/cgroup-v2.html. A group can be made where the process
may write to its own group, or to the one above, and that one hands out memory to its groups.
"""

from __future__ import annotations

import contextlib
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def own_group(proc: str = "/proc/self") -> str | None:
    """Returns the directory of this process's group; None if there is none."""
    with open(f"{proc}/cgroup") as file:
        names = [line.strip()[3:] for line in file if line.startswith("0::")]
    with open(f"{proc}/mountinfo") as file:
        mounts = [line.split(" - ") for line in file]
    for left, right in mounts:
        if right.startswith("cgroup2 ") and names:
            root, at = left.split()[3:5]
            below = os.path.relpath(names[0], root) if root != "/" else names[0].lstrip("/")
            if not below.startswith(".."):
                return os.path.normpath(os.path.join(at, below))
    return None


def create(limits: dict[str, Any], proc: str = "/proc/self") -> str | None:
    """Makes a group with limits.

    Args:
      limits: ``memory`` and ``file_bytes``, which are kept in memory, in bytes; ``processes``.
      proc: directory of the kernel's files about this process.

    Returns:
      Its directory; None where it cannot be made.
    """
    own = own_group(proc)
    if own is None:
        return None
    for parent in (own, os.path.dirname(own)):
        group = f"{parent}/lordjax-{os.getpid()}"
        try:
            with open(f"{parent}/cgroup.subtree_control") as file:
                if "memory" not in file.read().split():
                    continue
            os.mkdir(group)
        except OSError:
            continue
        try:
            write(group, "memory.max", limits["memory"] + limits["file_bytes"])
            with contextlib.suppress(OSError):  # where the machine has no swap
                write(group, "memory.swap.max", 0)
            with contextlib.suppress(OSError):  # where processes are not counted
                write(group, "pids.max", limits["processes"] + 2)  # with keeper and checker
            return group
        except OSError:
            remove(group)
    return None


def write(group: str, name: str, value: int) -> None:
    """Sets a value of a group."""
    with open(f"{group}/{name}", "w") as file:
        file.write(str(value))


def enter(group: str) -> bool:
    """Moves this process into a group; returns whether it was possible."""
    try:
        write(group, "cgroup.procs", 0)
    except OSError:
        return False
    return True


def ran_out(group: str) -> bool:
    """Returns whether the kernel killed a process of a group because memory ran out."""
    try:
        with open(f"{group}/memory.events") as file:
            counts = dict(line.split() for line in file)
    except OSError:
        return False
    return int(counts.get("oom_kill", 0)) > 0


def remove(group: str) -> None:
    """Kills all that is left in a group and removes it."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            write(group, "cgroup.kill", 1)
        try:
            os.rmdir(group)
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)
        else:
            return
