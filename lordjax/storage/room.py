"""Room on a disk: asked for before something is written, and named when a write fails."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

RESERVE = 2**24  # bytes that stay free: for small files beside the arrays
FULL = {errno.ENOSPC, errno.EFBIG} | ({errno.EDQUOT} if hasattr(errno, "EDQUOT") else set())
# What libraries that are not written in Python say; their exceptions have no number.
FULL_TEXTS = ("no space left", "quota exceeded", "file too large", "os error 28", "os error 122")


class NoRoomError(OSError):
    """A write that failed; the message says how much was needed and how much is free."""

    def __str__(self) -> str:
        """Returns the message alone, which names the file already."""
        return str(self.args[0])


def free_bytes(path: Path) -> int:
    """Returns the bytes that are free on the disk of a path, which need not exist."""
    there = next(p for p in [path, *path.absolute().parents] if p.exists())
    return shutil.disk_usage(there).free


def check_room(directory: Path, need: int) -> None:
    """Checks that a disk has room for ``need`` bytes and `RESERVE`.

    Args:
      directory: a path on the disk; need not exist.
      need: bytes that will be written.

    Raises:
      OSError: if there is not enough room; says how much is needed and how much is free.
    """
    free = free_bytes(directory)
    if free < need + RESERVE:
        raise OSError(
            f"{directory}: needs about {megabytes(need + RESERVE)} of disk, but {megabytes(free)} "
            "are free; make room or choose another output"
        )


def megabytes(count: int) -> str:
    """Formats bytes as megabytes, small numbers as they are."""
    if count < 1e5:
        return f"{count} bytes"
    return f"{count / 1e6:.3g} MB" if count < 1e8 else f"{count / 1e6:.0f} MB"


def no_room(path: Path, error: BaseException, need: int) -> NoRoomError:
    """Returns the error about a write that failed.

    Args:
      path: what was to be written.
      error: the error of the write.
      need: bytes of all that was to be written there.
    """
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    full = NoRoomError(
        f"{path}: cannot be written ({reason}); is the disk full? {megabytes(need)} are needed, "
        f"{megabytes(free_bytes(path.parent))} are free"
    )
    full.filename = str(path)  # so that no reader takes it for damage of what it reads
    return full


def is_full(error: BaseException) -> bool:
    """Returns whether an exception, of any library, means that a disk or a quota is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return any(text in str(error).lower() for text in FULL_TEXTS)


@contextlib.contextmanager
def naming_room(directory: Path, need: int) -> Iterator[None]:
    """Turns the error of any library about a full disk into `NoRoomError`; others pass.

    Args:
      directory: what is written inside the block.
      need: about how many bytes are written.
    """
    try:
        yield
    except NoRoomError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise no_room(directory, error, need) from error


def remove_tree(path: Path) -> None:
    """Removes a file or a directory with its contents; nothing happens if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
