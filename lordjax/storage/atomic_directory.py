"""Directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lordjax.runtime import unfinished
from lordjax.storage.lock import lock_directory, remove_locked
from lordjax.storage.room import naming_room, remove_tree
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
def staged(directory: Path, need: int = 0) -> Iterator[Path]:
    """Yields a fresh directory beside ``directory``, which takes its name when the block succeeds.

    If the block raises, the fresh directory is removed. What a killed process has left there is
    removed by the next one.

    Args:
      directory: the destination.
      need: about how many bytes are written, for the error about a full disk.

    Raises:
      BlockingIOError: if another process is writing the same directory.
      FileExistsError: if the destination is not free; see `check_destination`.
      NoRoomError: if the disk is full.
    """
    directory = check_destination(directory)
    place = directory.with_name(f".{directory.name}.writing")
    stage = place / "stage"

    def leave() -> None:
        remove_tree(place)

    unfinished.begin(place, leave)
    lock = lock_directory(place)
    try:
        remove_tree(stage)
        stage.mkdir()
        with naming_room(directory, need):
            yield stage
            sync(stage)
        publish(stage, directory)
    finally:
        remove_locked(place, lock)
        unfinished.end(place)


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
