"""Directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lordjax.storage.tensor_files import sync_directory


def check_destination(directory: str | os.PathLike[str]) -> Path:
    """Returns the absolute path of a directory that is to be written.

    Raises:
      FileExistsError: if the path exists and is not an empty directory, or cannot be replaced.
    """
    directory = Path(directory).resolve()
    if os.path.ismount(directory) or directory == Path.cwd():
        raise FileExistsError(
            f"{directory}: is a mount point or the working directory and cannot be replaced; "
            "name a directory inside it"
        )
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(
            f"{directory}: exists and is not an empty directory; choose another output or remove it"
        )
    return directory


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yields a fresh directory beside ``directory``, which takes its name when the block succeeds.

    If the block raises, the fresh directory is removed.

    Raises:
      FileExistsError: if the destination is not free; see `check_destination`.
    """
    directory = check_destination(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield stage
        sync(stage)
        stage.chmod(0o777 & ~_umask())  # mkdtemp creates it with mode 700
        publish(stage, directory)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def sync(stage: Path) -> None:
    """Syncs all files below a directory to disk, and sets their modes by the umask."""
    for file in stage.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~_umask())  # safetensors creates files with mode 600
            with file.open("r+b" if os.name == "nt" else "rb") as handle:
                os.fsync(handle.fileno())
    sync_directory(stage)


def publish(stage: Path, directory: Path) -> None:
    """Renames a complete directory to its final name.

    Raises:
      OSError: if the destination exists and is not an empty directory.
    """
    if directory.exists():
        directory.rmdir()
    stage.rename(directory)
    sync_directory(directory.parent)


def _umask() -> int:
    """Returns the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_room(directory: Path, need: int) -> None:
    """Checks that a disk has room for ``need`` bytes and 16 MiB.

    Args:
      directory: a path on the disk; need not exist.
      need: bytes that will be written.

    Raises:
      OSError: if there is not enough room; says how much is needed and how much is free.
    """
    there = next(p for p in [directory, *directory.absolute().parents] if p.exists())
    free = shutil.disk_usage(there).free
    if free < need + 2**24:
        raise OSError(
            f"{directory}: needs about {need / 1e6:.0f} MB of disk, but {free / 1e6:.0f} MB are "
            "free; make room or choose another output"
        )
