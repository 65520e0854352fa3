"""Persistent cache of the command line, with JAX's compiled programs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
from pathlib import Path

PROGRAMS_BYTES = 10**9  # limit of the compiled programs; the oldest are removed first
SECONDS = 0.2  # programs that compile faster are not stored


def cache_directory() -> Path:
    """Returns ``$XDG_CACHE_HOME/lordjax``, or ``~/.cache/lordjax`` if that is not set."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or os.path.expanduser("~/.cache")) / "lordjax"


def keep_programs() -> None:
    """Turns on JAX's persistent compilation cache, unless JAX_COMPILATION_CACHE_DIR is set.

    Call it before JAX is imported: JAX reads these variables on import. JAX's cache keys contain
    the program, the versions and the compiler options, but machines with unlike processors may
    share a home directory. So each kind of processor has its own directory. If the directory is
    not writable, the cache stays off.
    """
    directory = cache_directory() / "programs" / processor()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not writable(directory):
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(SECONDS))
    prune(directory, PROGRAMS_BYTES)


def writable(directory: Path) -> bool:
    """Returns whether files can be written into a directory that may not exist yet."""
    if not directory.is_absolute():  # the user has no home directory
        return False
    there = next(path for path in (directory, *directory.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def processor() -> str:
    """Identifier of this machine's processor model and instruction set."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    # The first core's model name and instruction flags stand for all cores.
    kinds = ("model name", "flags", "Features", "CPU part", "isa")
    found = {name: next((line for line in lines if line.startswith(name)), "") for name in kinds}
    text = f"{platform.machine()} {platform.processor()} {found}"
    name = re.sub(r"\W", "-", platform.machine())
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def prune(directory: Path, most: int) -> None:
    """Removes the oldest files of a directory until at most ``most`` bytes are left.

    A clock that jumps changes which programs go, and so only what is compiled again.
    """
    if not directory.is_dir():
        return
    facts = []
    for entry in os.scandir(directory):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if entry.is_file(follow_symlinks=False):
                facts.append((entry.stat().st_mtime, entry.path, entry.stat().st_size))
    total = sum(size for _, _, size in facts)
    for _, path, size in sorted(facts):
        if total <= most:
            return
        with contextlib.suppress(FileNotFoundError, PermissionError):  # or another user's
            Path(path).unlink()
        total -= size
