"""The files that a program needs to run: Python's standard library and shared libraries."""

from __future__ import annotations

import os
import sys

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/gnu/store")
DATA = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def readable() -> list[str]:
    """Returns the files and directories that programs may read, none inside another."""
    with open("/proc/self/maps", "rb") as file:
        mapped = [os.fsdecode(line.split(maxsplit=5)[-1].strip()) for line in file]
    loaded = {os.path.dirname(name) for name in mapped if name.startswith("/") and ".so" in name}
    named = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    standard = [os.path.realpath(path) for path in sys.path]
    found: list[str] = []
    for path in sorted({*loaded, *standard, *filter(None, named), *LIBRARIES, *DATA}):
        inside = any(path == other or path.startswith(other + "/") for other in found)
        if os.path.isabs(path) and path != "/" and not inside and os.path.exists(path):
            found.append(path)
    return found


def readable_by_all() -> bool:
    """Returns whether every user can reach the standard library."""
    folder = os.path.dirname(os.__file__)
    while folder != "/":
        if not os.stat(folder).st_mode & 1:
            return False
        folder = os.path.dirname(folder)
    return True
