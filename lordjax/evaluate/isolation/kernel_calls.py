"""Calls of the Linux kernel through the C library, which Python's standard library lacks."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

TYPE_CHECKING = False  # not from `typing`: importing it takes longer than most programs run
if TYPE_CHECKING:
    from typing import Any

# Arguments of prctl(2).
DEATH_SIGNAL, DUMPABLE, KEEP_CAPABILITIES = 1, 4, 8
ADOPT_ORPHANS, NO_NEW_PRIVILEGES = 36, 38
CAPABILITY_VERSION, READ_EVERYTHING = 0x20080522, 1 << 2  # the latter is CAP_DAC_READ_SEARCH
CHANGE_USER = 1 << 0 | 1 << 6 | 1 << 7  # CAP_CHOWN, CAP_SETGID, CAP_SETUID
MACHINES = ("x86_64", "aarch64")  # whose numbers of system calls this package knows


def machine() -> int | None:
    """Returns the place of this machine in `MACHINES`; None for other or 32-bit processors."""
    name = os.uname().machine
    return MACHINES.index(name) if name in MACHINES and sys.maxsize > 2**32 else None


@functools.cache
def libc() -> Any:
    """Returns the C library."""
    return ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: Any) -> int:
    """Calls a function of the C library and returns its result.

    Raises:
      OSError: if it returns -1; the message names the function.
    """
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
    if (result := getattr(libc(), name)(*words)) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def prctl(option: int, value: int) -> None:
    """Sets a property of this process; raises OSError if the kernel refuses."""
    call("prctl", option, value, 0, 0, 0)


def capabilities() -> int:
    """Returns the permitted capabilities of this process among the first 32, as bits."""
    words = (ctypes.c_uint32 * 6)()
    call("capget", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), words)
    return words[1]


def set_capabilities(kept: int) -> None:
    """Gives up all capabilities but these."""
    words = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
    call("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), words)
