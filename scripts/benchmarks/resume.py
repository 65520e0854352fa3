"""Test of resumption: kill a compression at random times, resume it, compare the files.

Run::

    python -m lordjax.scripts.benchmarks.resume MODEL [--kills 20] [-- OPTIONS OF COMPRESS]

The command first runs once without interruption. Then it runs again, and every process but the last
is killed with ``SIGKILL``. About one kill in four comes at a random time after the start of the
process; the others come at a random time after the process has stored a result, so that the
compression advances between kills. The program prints a Markdown table. Its exit code is 1 if a
file differs in any bit. In ``report.json`` and ``report.html`` times and peak memory may differ.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from lordjax.compression.resumable_output import partial
from lordjax.scripts.benchmarks.protocol import environment
from lordjax.scripts.console import say
from lordjax.scripts.report.page import PAGE, without_times
from lordjax.storage.checksums import MANIFEST
from lordjax.storage.disk_store import JOURNAL

# Keys of report.json that may differ.
TIMED = ("seconds", "peak_rss_bytes", "predicted", "happened")
POLL = 0.02  # seconds


def contents(directory: Path) -> dict[str, str]:
    """SHA-256 by file name, without the times and the peak memory in the reports."""
    found = {}
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        if file.name == "report.json":
            report = json.loads(data)
            data = json.dumps({k: v for k, v in report.items() if k not in TIMED}).encode()
        if file.name == MANIFEST:
            manifest = json.loads(data)
            manifest["files"].pop("report.json", None)
            data = json.dumps(manifest).encode()
        if file.name == PAGE:
            data = without_times(data.decode()).encode()
        found[file.name] = hashlib.sha256(data).hexdigest()
    return found


def _start(model: str, out: Path, options: tuple[str, ...]) -> subprocess.Popen[bytes]:
    code = "from lordjax.scripts.cli import main; main()"
    command = [sys.executable, "-c", code, "compress", model, str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _journal(out: Path) -> Path:
    return partial(out) / JOURNAL


def _finish(process: subprocess.Popen[bytes], out: Path) -> None:
    """Waits until a process ends; raises RuntimeError with its stderr if it has failed."""
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(
            f"{out}: lordjax compress ended with exit code {process.returncode}, expected 0: "
            f"{errors.decode(errors='replace')[-2000:]}"
        )


def _wait(process: subprocess.Popen[bytes], journal: Path, seconds: float, *, work: bool) -> bool:
    """Waits some seconds while a process runs.

    Args:
      process: the process.
      journal: file that grows with every stored result.
      seconds: time to wait.
      work: whether to wait first until the process stores a result.

    Returns:
      Whether the process still runs.
    """

    def length() -> int:
        return journal.stat().st_size if journal.exists() else 0

    before = length()
    while work and length() <= before and process.poll() is None:
        time.sleep(POLL)
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(POLL)
    return process.poll() is None


def interrupted(
    model: str, out: Path, options: tuple[str, ...], kills: int, seconds: float, seed: int
) -> list[int]:
    """Compresses a model in processes that are killed, until the last one finishes the work.

    Args:
      model: MODEL of ``lordjax compress``.
      out: output directory.
      options: options of ``lordjax compress``.
      kills: number of processes to kill. If the work ends early, fewer are killed, but at least
        one.
      seconds: seconds from the first stored result to the end of a run without interruption.
      seed: seed of the random times.

    Returns:
      Number of lines in the journal at each kill.
    """
    chance, lines = random.Random(seed), []
    journal = _journal(out)
    while len(lines) < kills:
        process, early = _start(model, out, options), chance.random() < 0.25
        pause = chance.uniform(0, seconds / kills)
        if ended := not _wait(process, journal, pause, work=not early):
            _finish(process, out)
        else:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        if ended or (out.exists() and not journal.parent.exists()):  # the result is complete
            if lines:
                return lines
            # The work ended before the first kill: start again, and kill earlier.
            shutil.rmtree(out)
            seconds /= 2
            continue
        lines.append(journal.read_bytes().count(b"\n") if journal.exists() else 0)
        say(f"kill {len(lines)} of {kills}: {lines[-1]} lines in the journal")
    _finish(_start(model, out, options), out)
    return lines


def measure(
    model: str, options: tuple[str, ...], kills: int, seed: int, folder: Path
) -> dict[str, Any]:
    """Compresses with and without kills, and compares the files.

    Returns:
      Seconds of both, number of kills, lines in the journal at each kill, and differing files.
    """
    start, process = time.monotonic(), _start(model, folder / "whole", options)
    _wait(process, _journal(folder / "whole"), 0, work=True)
    begun = time.monotonic()
    _finish(process, folder / "whole")
    whole, working = time.monotonic() - start, time.monotonic() - begun
    say(f"without interruption: {whole:.0f} s, the first {whole - working:.0f} s to begin with")
    start = time.monotonic()
    lines = interrupted(model, folder / "out", options, kills, working, seed)
    expected, found = contents(folder / "whole"), contents(folder / "out")
    names = sorted(expected.keys() | found.keys())
    return {
        "options": " ".join(options),
        "kills": len(lines),
        "journal": lines,
        "seconds": time.monotonic() - start,
        "whole_seconds": whole,
        "different": [name for name in names if expected.get(name) != found.get(name)],
        "files": len(names),
    }


@click.command()
@click.argument("model")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--kills",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Number of processes to kill.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the random times of the kills."
)
def main(model: str, options: tuple[str, ...], kills: int, seed: int) -> None:
    """Kills and resumes ``lordjax compress MODEL OPTIONS``, and compares the result."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(model, options, kills, seed, Path(folder))
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    print("| options | seconds | killed | seconds, all processes | files | different |")
    print("|---|---:|---:|---:|---:|---|")
    print(
        f"| {found['options']} | {found['whole_seconds']:.0f} | {found['kills']} | "
        f"{found['seconds']:.0f} | {found['files']} | {', '.join(found['different']) or 'none'} |"
    )
    print(f"lines in the journal at each kill: {', '.join(map(str, found['journal']))}")
    sys.exit(1 if found["different"] else 0)


if __name__ == "__main__":
    main()
