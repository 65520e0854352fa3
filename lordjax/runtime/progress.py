"""Time per stage, progress reports, and peak memory."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Progress = Callable[[str, int, int], None]  # stage, done, total


class Clock:
    """Adds up the seconds that each stage takes, and reports progress."""

    def __init__(self, progress: Progress | None = None):
        self.seconds: dict[str, float] = {}
        self._progress = progress

    def run(self, stage: str, items: range, done: int = 0, left: int = 0) -> Iterator[int]:
        """Yields the items of a stage, and adds the time of the loop's body to the stage.

        Args:
          stage: name of the stage.
          items: the items that this loop processes.
          done: number of items of the stage that were processed before this loop.
          left: number of items of the stage that follow after this loop.
        """
        total = done + len(items) + left
        for count, item in enumerate(items, done):
            self._report(stage, count, total)
            with self.part(stage):
                yield item
        self._report(stage, total - left, total)

    @contextlib.contextmanager
    def part(self, stage: str) -> Iterator[None]:
        """Adds the seconds of a ``with`` body to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def _report(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(stage, done, total)


def peak_rss() -> int | None:
    """Returns the peak resident memory of this process so far, in bytes; None on Windows."""
    # On Linux, ru_maxrss starts at the value of the parent process; VmHWM does not.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text("utf-8")) if status.exists() else None
    if found is not None:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
