"""Cache of compiled programs between runs of the command, in the user's cache directory."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path

PROGRAMS_BYTES = 10**9  # of compiled programs; the oldest ones are removed first
SECONDS = 0.2  # programs that compile faster are not cached


def cache_directory() -> Path:
    """Returns ``$XDG_CACHE_HOME/lordjax``, or ``~/.cache/lordjax``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or os.path.expanduser("~/.cache")) / "lordjax"


def keep_programs() -> None:
    """Makes JAX cache compiled programs, unless JAX_COMPILATION_CACHE_DIR is set.

    Must be called before JAX is imported, which reads the environment. JAX's cache keys hold the
    program, the versions and the compiler's options, but not the processor. Different machines may
    share a home directory, so each kind of processor has its own directory. Nothing is cached if
    the directory is not writable.
    """
    directory = cache_directory() / "programs" / processor()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not writable(directory):
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(SECONDS))
    prune(directory, PROGRAMS_BYTES)


def writable(directory: Path) -> bool:
    """Returns whether files can be written into a directory, which need not exist yet."""
    if not directory.is_absolute():  # the user has no home
        return False
    there = next(path for path in (directory, *directory.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def processor() -> str:
    """Returns a name for this machine's kind of processor and its instructions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    # Name and instructions of the first core.
    kinds = ("model name", "flags", "Features", "CPU part", "isa")
    found = {name: next((line for line in lines if line.startswith(name)), "") for name in kinds}
    text = f"{platform.machine()} {platform.processor()} {found}"
    name = re.sub(r"\W", "-", platform.machine())
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def prune(directory: Path, most: int) -> None:
    """Removes the oldest files of a directory until at most ``most`` bytes are left."""
    if not directory.is_dir():
        return
    facts = []
    for entry in os.scandir(directory):
        try:
            facts.append((entry.stat().st_mtime, entry.path, entry.stat().st_size))
        except FileNotFoundError:  # another process removed it
            continue
    total = sum(size for _, _, size in facts)
    for _, path, size in sorted(facts):
        if total <= most:
            return
        Path(path).unlink(missing_ok=True)
        total -= size
