"""What the command line keeps between runs, below the user's cache directory."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from pathlib import Path

PROGRAMS_BYTES = 10**9  # of compiled programs; those written first go first
SECONDS = 0.2  # programs that compile faster are not kept


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/lordjax``, or ``~/.cache/lordjax``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or os.path.expanduser("~/.cache")) / "lordjax"


def keep_programs() -> None:
    """Has JAX keep compiled programs, if JAX_COMPILATION_CACHE_DIR does not say where already.

    To be called before JAX is imported, which reads the environment. JAX's keys hold the program,
    its versions and the compiler's options; home directories may be shared by unlike machines, so
    that each kind of processor has a directory of its own. Nothing is kept where nothing can be
    written.
    """
    directory = cache_directory() / "programs" / processor()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or not writable(directory):
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(SECONDS))
    prune(directory, PROGRAMS_BYTES)


def writable(directory: Path) -> bool:
    """Whether files can be written into a directory, which may have to be made."""
    if not directory.is_absolute():  # the user has no home
        return False
    there = next(path for path in (directory, *directory.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def processor() -> str:
    """A name for what this machine's processor can do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    # The first processor's: its name and its instructions.
    kinds = ("model name", "flags", "Features", "CPU part", "isa")
    found = {name: next((line for line in lines if line.startswith(name)), "") for name in kinds}
    text = f"{platform.machine()} {platform.processor()} {found}"
    name = re.sub(r"\W", "-", platform.machine())
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def prune(directory: Path, most: int) -> None:
    """Removes the files of a directory that were written first, until ``most`` bytes are left."""
    if not directory.is_dir():
        return
    facts = []
    for entry in os.scandir(directory):
        try:
            facts.append((entry.stat().st_mtime, entry.path, entry.stat().st_size))
        except FileNotFoundError:  # another process was faster
            continue
    total = sum(size for _, _, size in facts)
    for _, path, size in sorted(facts):
        if total <= most:
            return
        Path(path).unlink(missing_ok=True)
        total -= size
