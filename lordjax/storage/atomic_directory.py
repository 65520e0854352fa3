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
    """Where a model is to be written.

    Raises:
      FileExistsError: if something is there already (an empty directory is fine).
    """
    directory = Path(directory).resolve()
    if directory.is_mount() or directory == Path.cwd():
        raise FileExistsError(
            f"{directory}: is in use as a mount point or working directory and cannot be replaced; "
            "name a directory inside it"
        )
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(
            f"{directory}: exists and is not an empty directory; choose another output or remove it"
        )
    return directory


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A fresh directory beside ``directory`` that takes its name when the block succeeds.

    Raises:
      FileExistsError: if the destination is not free.
    """
    directory = check_destination(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield stage
        sync(stage)
        stage.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        publish(stage, directory)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def sync(stage: Path) -> None:
    """Brings all files below a directory to disk."""
    for file in stage.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~_umask())  # safetensors makes its files private
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    sync_directory(stage)


def publish(stage: Path, directory: Path) -> None:
    """Gives a complete directory its name, where nothing but an empty directory may be."""
    if directory.exists():
        directory.rmdir()
    stage.rename(directory)
    sync_directory(directory.parent)


def _umask() -> int:
    """The process' umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_room(directory: Path, need: int) -> None:
    """Raises OSError if the disk of ``directory`` has less than ``need`` bytes and 16 MiB."""
    there = next(p for p in [directory, *directory.absolute().parents] if p.exists())
    free = shutil.disk_usage(there).free
    if free < need + 2**24:
        raise OSError(
            f"{directory}: needs about {need / 1e6:.0f} MB of disk, {free / 1e6:.0f} MB are free; "
            "make room or choose another output"
        )
