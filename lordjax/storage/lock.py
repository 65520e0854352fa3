"""A lock on a directory: one process works there at a time.

The lock is the kernel's (``flock``), which releases it when a process ends in any way. Some network
file systems have none. There a file with the process's id and host name stands for it. A process of
the same host that has ended is recognised. Of another host it is not, so the error names the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import filelock

from lordjax.runtime import unfinished
from lordjax.storage.room import remove_tree
from lordjax.storage.tensor_files import sync_directory

LOCK = "lock"
# What file systems without locks answer.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


def lock_directory(directory: Path) -> filelock.BaseFileLock:
    """Locks a directory until the lock is released or the process ends.

    Args:
      directory: the directory; is created if it is missing.

    Returns:
      The lock. If the directory is removed under it, it is still to be released.

    Raises:
      BlockingIOError: if another process holds the lock; says which one, where that is known.
      OSError: if no lock file can be created.
    """
    file = directory / LOCK
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _acquired(file)
        if file.exists():
            return lock
        lock.release()  # the process that held the lock before has removed the directory


def unlock_directory(directory: Path, lock: filelock.BaseFileLock) -> None:
    """Releases the lock of a directory and leaves nothing of it there."""
    if os.name == "nt":  # Windows does not remove files that are open
        lock.release()
    (directory / LOCK).unlink(missing_ok=True)
    lock.release()


@contextlib.contextmanager
def locked(directory: Path, kept: str) -> Iterator[None]:
    """Locks a directory whose files stay, and leaves nothing of the lock there.

    Args:
      directory: the directory; is created, and then removed again if it is empty in the end.
      kept: what to say if the block is ended from outside.

    Raises:
      BlockingIOError: if another process works in the directory.
    """
    there = directory.exists()
    lock = lock_directory(directory)

    def leave() -> str:
        unlock_directory(directory, lock)
        if not there and not any(directory.iterdir()):
            directory.rmdir()
        return kept

    with unfinished.leaving(directory, leave):
        yield


def remove_locked(directory: Path, lock: filelock.BaseFileLock, last: str = LOCK) -> None:
    """Removes a locked directory and releases the lock.

    The lock's file goes at the end, so that no other process begins here in the meantime.

    Args:
      directory: the directory; nothing is removed if it is gone already.
      lock: its lock.
      last: name of the file that goes last but the lock: without it the directory means nothing.
    """
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    for name in sorted(names, key=lambda name: name == last):
        if name != LOCK:
            remove_tree(directory / name)
    if os.name == "nt":  # Windows does not remove files that are open
        lock.release()
    (directory / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another process has just begun here
        directory.rmdir()
        sync_directory(directory.parent)
    lock.release()


def _acquired(file: Path) -> filelock.BaseFileLock:
    try:
        return _try(filelock.FileLock, file)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
    if not file.read_bytes():
        file.unlink()  # the attempt above has created it; with content it is a process's
    return _try(filelock.SoftFileLock, file)


def _try(kind: type[filelock.BaseFileLock], file: Path) -> filelock.BaseFileLock:
    lock = kind(file, 0, mode=0o666, thread_local=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # filelock says where it falls back to a file
            lock.acquire()
    except filelock.Timeout as error:
        raise _busy(file) from error
    return lock


def _busy(file: Path) -> BlockingIOError:
    """The error about a lock that another process holds; the soft lock's file names it."""
    lines = file.read_text("utf-8", "replace").split() if os.name != "nt" and file.exists() else []
    held = f" (process {' of '.join(lines[:2])})" if lines else ""
    stale = f"; if it has ended, remove {file}" if lines else ""
    return BlockingIOError(
        f"{file.parent}: another process works here{held}; wait for it, or choose another "
        f"output{stale}"
    )
