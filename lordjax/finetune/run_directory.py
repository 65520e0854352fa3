"""The directory of a fine-tuning run: who works in it, and what the run is about."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lordjax.runtime import json_files, unfinished
from lordjax.runtime.input_files import check_no_links, read_json
from lordjax.storage.disk_store import differences
from lordjax.storage.lock import LOCK, lock_directory, remove_locked, unlock_directory
from lordjax.storage.room import check_room, naming_room
from lordjax.storage.tensor_files import write_json

RUN, CHECKPOINTS = "run.json", "checkpoints"


@contextlib.contextmanager
def claimed(directory: Path, resume: bool, about: dict[str, Any], need: int) -> Iterator[None]:
    """Locks a run's directory; removes a new one if the block fails before the first checkpoint.

    Args:
      directory: the run's directory; is created, or with ``resume`` holds a run of the same JSON.
      resume: whether a run that is there goes on.
      about: JSON that the run shares with the one that is there.
      need: bytes of the checkpoints, for which the disk must have room.

    Raises:
      BlockingIOError: if another process trains in the directory.
      FileExistsError: if the directory is not free.
      OSError: if the disk has not enough room.
      ValueError: if the directory holds a run of another JSON (says what differs), or a link.
    """
    _check_free(directory, resume)
    check_no_links(directory, "remove it, or choose another directory")
    check_room(directory, need)
    lock = lock_directory(directory)

    def leave() -> str | None:
        if _has_checkpoint(directory) or resume:
            unlock_directory(directory, lock)
            return f"the run is kept in {directory}"
        remove_locked(directory, lock)
        return None

    with unfinished.leaving(directory, leave), naming_room(directory, need):
        _check_same(directory / RUN, json_files.as_read(about))
        yield


def _has_checkpoint(directory: Path) -> bool:
    """Whether a run has a whole checkpoint; unfinished ones have other names."""
    return any(path.name.isdigit() for path in (directory / CHECKPOINTS).glob("*"))


def _check_free(directory: Path, resume: bool) -> None:
    """Raises FileExistsError if a directory can neither hold a new run nor go on with one."""
    there = directory.exists() and {path.name for path in directory.iterdir()} - {LOCK}
    if there and RUN not in there:
        raise FileExistsError(
            f"{directory}: not empty, and not a run (it has no {RUN}); choose another directory"
        )
    if there and not resume:
        raise FileExistsError(f"{directory}: a run is there; go on with --resume, or remove it")


def _check_same(path: Path, about: dict[str, Any]) -> None:
    """Writes what a run is about; raises ValueError if the run that is there is another one."""
    if not path.exists():
        write_json(path, about)
        return
    there = read_json(path, "remove the directory to start over")
    for run in (there, about):  # another version of lordjax may word the summary differently
        run.get("recipe", {}).pop("summary", None)
    changes = list(differences(there, about))
    if changes:
        raise ValueError(
            f"{path.parent}: this run was started with other settings (old -> new): "
            f"{'; '.join(changes)}; give the same settings again, or choose another directory"
        )
