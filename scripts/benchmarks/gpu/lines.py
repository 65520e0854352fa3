"""Lines of a benchmark with a time limit: each knows what it needs, and every result is kept.

A line runs if what it needs is left of the time; else it is skipped, and the result says so. The
file of results is written after every line. A line that takes longer than expected is ended by a
timer at the limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from lordjax.runtime.json_files import dumps_measured
from lordjax.scripts.console import say

Row = dict[str, Any]  # what was measured, its value and unit, and a note
ENDING = 5.0  # seconds that are kept back to write and print the results


class Deadline:
    """The time that a benchmark has.

    Args:
      seconds: the limit, from now on.
    """

    def __init__(self, seconds: float):
        self.seconds, self._start = seconds, time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds until the limit, without those that writing the results takes."""
        return self.seconds - ENDING - self.spent


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a benchmark.

    Attributes:
      name: what it measures.
      needs: seconds that it takes at most on an H200, compilation included.
      run: function of the seconds that are left; returns what it measured.
    """

    name: str
    needs: float
    run: Callable[[float], list[Row]]


def row(what: str, value: float, unit: str, note: str = "") -> Row:
    """Returns a measurement."""
    return {"what": what, "value": float(value), "unit": unit, "note": note}


def median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Returns the median seconds of ``run``, after one run that compiles.

    Args:
      run: a function whose arrays are waited for.
      repeats: number of timed runs.
    """
    import jax

    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def run_lines(
    lines: Sequence[Line], deadline: Deadline, facts: dict[str, Any], out: Path, show: Any
) -> dict[str, Any]:
    """Runs lines in order until the time is over; returns and writes what they found.

    Args:
      lines: the lines, the most valuable first.
      deadline: the time that they have.
      facts: what else is written: settings and the environment.
      out: JSON file, replaced after every line.
      show: prints the results, if the timer ends the process.
    """
    found = {**facts, "lines": []}
    with _ended_at(deadline, found, out, show):
        for line in lines:
            entry: dict[str, Any] = {"name": line.name, "needs": line.needs, "rows": []}
            found["lines"].append(entry)
            if line.needs > deadline.left:
                left = max(0.0, deadline.left)
                entry["status"] = f"skipped: needs {line.needs:.0f} s, {left:.0f} s are left"
            else:
                entry["status"] = "cut by the time limit"
                write(found, out)
                say(f"{deadline.spent:5.0f} s  {line.name}")
                _measure(line, entry, deadline)
            write(found, out)
    return found


def _measure(line: Line, entry: dict[str, Any], deadline: Deadline) -> None:
    """Runs a line. One that fails is named, and the others go on: the machine is rented."""
    start = deadline.spent
    try:
        entry["rows"] = line.run(deadline.left)
        entry["status"] = "measured"
    except Exception as error:
        entry["status"] = f"failed: {type(error).__name__}: {str(error)[:500]}"
        say(f"{line.name}: {entry['status']}")
    entry["seconds"] = deadline.spent - start


@contextlib.contextmanager
def _ended_at(deadline: Deadline, found: dict[str, Any], out: Path, show: Any) -> Iterator[None]:
    """Ends the process at the limit, with what was found; a program of XLA cannot be stopped."""

    def end() -> None:
        write(found, out)
        show(found)
        os._exit(0)

    timer = threading.Timer(max(deadline.left, 0.0), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def write(found: dict[str, Any], out: Path) -> None:
    """Writes the results; a reader sees the old file or the new one."""
    staged = out.with_name(f"{out.name}.partial")
    staged.write_text(dumps_measured(found, indent=1) + "\n", "utf-8")
    staged.replace(out)


def markdown(found: dict[str, Any]) -> str:
    """Returns the results as a table, and what was not measured below it."""
    table = ["| measurement | | value | note |", "|---|---|---:|---|"]
    missing = []
    for line in found["lines"]:
        if line["status"] != "measured":
            missing.append(f"- {line['name']}: {line['status']}")
        for each in line["rows"]:
            number = each["value"]  # None where it was not finite
            value = "not finite" if number is None else f"{number:.4g} {each['unit']}".strip()
            table.append(f"| {line['name']} | {each['what']} | {value} | {each['note']} |")
    facts = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
    parts = [facts, "\n".join(table)]
    if missing:
        parts.append("Not measured:\n\n" + "\n".join(missing))
    return "\n\n".join(parts)


def show(found: dict[str, Any]) -> None:
    """Prints the results as markdown."""
    click.echo(markdown(found))
