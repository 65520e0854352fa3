"""Landlock: a process gives up files, ports and signals, without any privilege.

Source: https://docs.kernel.org/userspace-api/landlock.html. The numbers are those of the kernel's
interface; a version of the interface adds rights that can be given up.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from lordjax.evaluate.isolation.kernel_calls import call

CREATE, ADD_RULE, RESTRICT = 444, 445, 446  # system calls, on all machines
EXECUTE, WRITE_FILE, READ_FILE, READ_DIRECTORY = 1, 2, 4, 8
# Rights on files: the first 13 are there since version 1.
RENAME, TRUNCATE, CONTROL_DEVICE = 1 << 13, 1 << 14, 1 << 15  # since versions 2, 3 and 5
FIRST_RIGHTS = (1 << 13) - 1
PORTS = 3  # to bind and connect TCP sockets, since version 4
SCOPES = 3  # to reach abstract sockets and to signal processes outside, since version 6
ON_FILES = WRITE_FILE | READ_FILE | EXECUTE | TRUNCATE | CONTROL_DEVICE
USED = FIRST_RIGHTS | RENAME | TRUNCATE


class Beneath(ctypes.Structure):
    """The kernel's description of rights beneath a path."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("rights", ctypes.c_uint64), ("path", ctypes.c_int32))


def version() -> int:
    """Returns the version of the kernel's interface; 0 if there is no Landlock."""
    try:
        return call("syscall", CREATE, None, 0, 1)
    except OSError:
        return 0


def ruleset(read: Iterable[str], write: Iterable[str]) -> int:
    """Returns the descriptor of a set of rules that allows nothing but these paths.

    Args:
      read: files and directories that may be read.
      write: files and directories that may also be written.

    Raises:
      OSError: if the kernel has no Landlock, or a path cannot be opened.
    """
    have = version()
    rights = FIRST_RIGHTS
    for since, right in ((2, RENAME), (3, TRUNCATE), (5, CONTROL_DEVICE)):
        rights |= right if have >= since else 0
    wanted = (rights, PORTS if have >= 4 else 0, SCOPES if have >= 6 else 0)
    known = 8 if have < 4 else 16 if have < 6 else 24  # bytes that this kernel reads
    rules = call("syscall", CREATE, (ctypes.c_uint64 * 3)(*wanted), known, 0)
    for paths, allowed in ((read, READ_FILE | READ_DIRECTORY), (write, USED & ~EXECUTE)):
        for path in paths:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed_here = allowed if os.path.isdir(path) else allowed & ON_FILES
            rule = Beneath(allowed_here & rights, descriptor)
            call("syscall", ADD_RULE, rules, 1, ctypes.byref(rule), 0)
            os.close(descriptor)
    return rules


def restrict(rules: int) -> None:
    """Restricts this process; it must have given up new privileges before."""
    call("syscall", RESTRICT, rules, 0)
