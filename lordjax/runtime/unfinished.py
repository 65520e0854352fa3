"""Directories that this process is writing: what becomes of them if it has to end now.

Whoever writes a directory cleans up by itself when an exception passes. Two cases remain: an
exception between two of its lines, and a process that does not return from compiled code. Then
`leave_all` does the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

Leave = Callable[[], str | None]  # removes or keeps a directory; returns what to say if it is kept

_open: dict[Path, Leave] = {}


def begin(directory: Path, leave: Leave) -> None:
    """Notes a directory before it is created.

    Args:
      directory: the directory.
      leave: removes it, or keeps what can be resumed and returns a text that says so.
    """
    _open[directory] = leave


def end(directory: Path) -> None:
    """Forgets a directory, which is finished or cleaned up."""
    _open.pop(directory, None)


def leave_all() -> list[str]:
    """Leaves every directory that is still noted; returns what to say about those that are kept."""
    texts = []
    while _open:
        _, leave = _open.popitem()
        text = leave()
        texts += [] if text is None else [text]
    return texts


def tell(error: BaseException | None, text: str | None) -> None:
    """Adds a text to an exception that ends the process from outside; errors speak for themselves.

    Args:
      error: the exception that passes, if any.
      text: what to say about a directory that is kept, if anything.
    """
    if text is not None and error is not None and not isinstance(error, Exception):
        error.add_note(text)


@contextlib.contextmanager
def leaving(directory: Path, leave: Leave) -> Iterator[None]:
    """Leaves a directory when the block ends in any way; says what is kept if that is from outside.

    Args:
      directory: the directory, or a file that stands for it.
      leave: see `begin`.
    """
    begin(directory, leave)
    try:
        yield
    except BaseException as error:
        end(directory)
        tell(error, leave())
        raise
    end(directory)
    leave()


def telling(text: str, path: Path) -> contextlib.AbstractContextManager[None]:
    """Says what is kept if the block is ended from outside.

    Args:
      text: what to say.
      path: the text is said if this is there.
    """
    return leaving(path, lambda: text if path.exists() else None)
