"""What all commands share: checks of outputs, progress on stderr, and formatting.

Heavy modules are imported inside functions, so that ``lordjax --help`` is instant.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lordjax.runtime import json_files

if TYPE_CHECKING:
    from lordjax.runtime.progress import Progress

KEEP = 0.8  # fraction of the block linear weights that is kept, unless --keep gives one
# What is read unless --calibration says it, as that flag. A model's own text is most like what it
# will see; code is what such text has least of (docs/pages/results/quality.md).
CALIBRATION = "self:0.5,stdlib:0.5"


def check_output(directory: Path) -> None:
    """Checks that a model can be written into a directory.

    Raises:
      FileExistsError: if the directory exists and is not empty, or is a file.
      PermissionError: if it cannot be created.
    """
    from lordjax.storage.atomic_directory import check_destination

    check_destination(directory)
    parent = directory.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(
            f"{directory}: cannot be created, {parent} is not a writable directory"
        )


def check_file(name: str) -> None:
    """Checks that a new file can be written.

    Raises:
      FileExistsError: if the file exists.
      PermissionError: if it cannot be created.
    """
    if Path(name).expanduser().exists():
        raise FileExistsError(f"{name}: exists; choose another output or remove it")
    check_output(Path(name).expanduser())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a ``.jsonl`` file atomically, one line per row."""
    from lordjax.storage.tensor_files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json_files.dumps(row) + "\n" for row in rows))


def printable_streams() -> None:
    """Lets stdout and stderr print every text; a sign that they do not have becomes its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a program has replaced it
            stream.reconfigure(errors="backslashreplace")


def format_bytes(count: int | float | None) -> str:
    """Formats bytes for people: ``98.4 MB``; ``unknown`` for None."""
    if count is None:
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def say(text: str) -> None:
    """Prints a line on stderr; stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_report() -> Iterator[Progress]:
    """Shows progress on stderr: bars on a terminal, else one line per stage and every 10 s."""
    if not sys.stderr.isatty():
        yield _progress_lines()
        return
    from rich import progress as rich
    from rich.console import Console

    columns = [rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()]
    columns += [rich.TimeElapsedColumn(), rich.TimeRemainingColumn()]
    with rich.Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks or done < bars.tasks[tasks[stage]].completed:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _progress_lines() -> Progress:
    last: dict[str, float] = {}

    def report(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - last.get(stage, -10.0) >= 10:
            last[stage] = now
            say(f"{stage}: {done}/{total}")

    return report
