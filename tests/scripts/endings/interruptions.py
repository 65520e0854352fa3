"""Ends jobs at random moments with SIGKILL and SIGTERM, goes on, and compares every file.

Run::

    python tests/scripts/endings/interruptions.py [--kills 100] [--terms 50] [--jobs modegpt,…]

The jobs are ``compress`` (modegpt, lq, with distillation, elastic, two emulated devices),
``finetune`` and ``convert`` on a tiny random model; the signals are shared out over them. A job
runs once without interruption. Then it is started again and again, and ended at a random moment of
its time, until its signals are used up; whenever it finishes, its files are compared and it begins
anew. Times may differ, nothing else. After SIGTERM the exit code must be 143, one line must say
what is kept, and no other directory may be left; after the last run only the result may be there.
The program prints a Markdown table, and its exit code is 1 if anything was wrong. Linux only: a
process is forked from one that has imported JAX, so that a start takes no seconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lordjax.scripts.console import say

OUT = "out"
# Command line between MODEL OUT and DATA; and devices.
JOBS: dict[str, tuple[str, int]] = {
    "modegpt": ("compress M O --calibration D --keep 0.6", 1),
    "lq": ("compress M O --calibration D --method lq --bits 4.5 --rank 4 --weighting both", 1),
    "distill": ("compress M O --calibration D --method nf --format nf3 --distill 320", 1),
    "elastic": ("compress M O --calibration D --elastic", 1),
    "two devices": ("compress M O --calibration D --keep 0.6 --mesh data=2", 2),
    "finetune": ("finetune M O --data D --recipe lora --rank 2 --steps 12 --every 3", 1),
    "convert": ("convert M O --dtype bfloat16", 1),
}
TIMED = ("seconds", "peak_rss_bytes", "predicted", "happened", "targets_per_second")


@dataclasses.dataclass
class Outcome:
    """What happened to a job; ``before`` is what lay there when the last process was started."""

    seconds: float = 0.0
    before: set[str] = dataclasses.field(default_factory=set)
    signals: dict[int, int] = dataclasses.field(default_factory=dict)
    finished: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line, the directory it writes into, its number of devices, and what runs before."""

    arguments: tuple[str, ...]
    folder: Path
    devices: int
    before: Callable[[], None] = lambda: None

    def start(self) -> int:
        """Starts the command in a forked process; returns its number."""
        self.folder.mkdir(exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX warns of forks; it has started no threads here
            process = os.fork()
        if process:
            return process
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(self.log(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        flag = f"--xla_force_host_platform_device_count={self.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
        sys.argv, code = ["lordjax", *self.arguments], 1
        try:
            self.before()
            from lordjax.scripts.cli import main

            main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:  # nothing of the caller runs in this process
            sys.stdout.flush()
            os._exit(code)

    def log(self, name: str) -> Path:
        """Returns the file of a stream."""
        return self.folder.with_name(f"{self.folder.name}.{name}")

    def error(self) -> str:
        """Returns what the last process has printed on stderr."""
        return self.log("stderr").read_text("utf-8", "replace")

    def whole(self) -> bool:
        """Returns whether the result is there and nothing is left to do."""
        partial = self.folder / f"{OUT}.partial" / "journal.jsonl"
        return (self.folder / OUT).exists() and not partial.exists()


def wait(process: int, seconds: float | None = None) -> int | None:
    """Waits for a process; returns its exit code, or None if it still runs after some seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, 0 if end is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() > end:
            return None
        time.sleep(0.005)


def contents(directory: Path) -> dict[str, str]:
    """Returns SHA-256 by file name, without times."""
    from lordjax.scripts.report.page import PAGE, without_times
    from lordjax.storage.archive import DIRECTORY, FACTS, INDEX
    from lordjax.storage.checksums import MANIFEST
    from lordjax.storage.entry_reader import file_name

    found = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        data = file.read_bytes()
        if file.suffix == ".json":
            value = untimed(json.loads(data))
            if file.name == MANIFEST:  # checksums of files with times, which are compared without
                value["files"] = sorted(value["files"])
            if file.name == INDEX and file.parent.name == DIRECTORY:  # checksum of one with times
                value["entries"][FACTS] = value["entries"][FACTS]["file"]
            data = json.dumps(value).encode()
        elif file.suffix == ".jsonl":
            data = json.dumps([untimed(json.loads(row)) for row in data.splitlines()]).encode()
        elif file.name.endswith(f"-{file_name(FACTS)}"):
            data = without_times_of_facts(data)
        elif file.name == PAGE:
            data = without_times(data.decode()).encode()
        found[str(file.relative_to(directory))] = hashlib.sha256(data).hexdigest()
    return found


def without_times_of_facts(data: bytes) -> bytes:
    """Returns a file of tensors without the times in the tree of its header."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            pairs = value["dict"] if "dict" in value else value.items()
            return {key: plain(inner) for key, inner in pairs}
        return [plain(each) for each in value] if isinstance(value, list) else value

    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"]["tree"] = untimed(plain(json.loads(header["__metadata__"]["tree"])))
    return json.dumps(header).encode() + data[end:]


def untimed(value: Any) -> Any:
    """Returns JSON without times and peak memory."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMED}
    return [untimed(each) for each in value] if isinstance(value, list) else value


def check_end(command: Command, number: int, code: int, outcome: Outcome) -> None:
    """Notes what is wrong after a process was ended by a signal."""
    names = {path.name for path in command.folder.iterdir()}
    if number == signal.SIGKILL:
        return
    lines = [line for line in command.error().splitlines() if line.startswith("interrupted (")]
    early = code == -number  # the handlers were not there yet
    if code != 128 + number and not early:
        outcome.wrong.append(f"exit code {code} after signal {number}")
    if len(lines) != (not early) or "Traceback" in command.error():
        outcome.wrong.append(f"stderr after signal {number}: {command.error()[-300:]!r}")
    kept = {name for name in names if lines and f"/{name}" in lines[0].split("; go on")[0]}
    if OUT in names:  # it had just finished, and a finished result has its run beside it
        kept.add(f"{OUT}.run")
    # An earlier SIGKILL may have left a directory that this process did not come to.
    if left := names - kept - {OUT, *outcome.before}:
        outcome.wrong.append(f"left after signal {number}: {sorted(left)}")


def measure(command: Command, expected: dict[str, str], signals: list[int], seed: int) -> Outcome:
    """Ends a command with signals until they are used up; compares every finished result."""
    chance, outcome = random.Random(seed), Outcome()
    chance.shuffle(signals)
    seconds, resumable = 0.0, "finetune" in command.arguments
    while signals or not command.whole():
        outcome.before = {path.name for path in command.folder.glob("*")}
        resume = resumable and (command.folder / f"{OUT}.run" / "run.json").exists()
        own = dataclasses.replace(command, arguments=command.arguments + ("--resume",) * resume)
        start, process = time.monotonic(), own.start()
        pause = chance.uniform(0, seconds) if signals and seconds else None
        code = wait(process, pause)
        if code is None:
            number = signals.pop()
            os.kill(process, number)
            code = wait(process)
            if code != 0:
                outcome.signals[number] = outcome.signals.get(number, 0) + 1
                say(f"signal {number} after {pause or 0.0:.1f} s, {len(signals)} to come")
                check_end(command, number, int(code or 0), outcome)
            else:
                signals.append(number)  # it had just ended
        elif code != 0 and not command.whole():
            outcome.wrong.append(f"exit code {code}: {own.error()[-300:]!r}")
            break
        if command.whole():
            seconds = seconds or time.monotonic() - start
            finish(command, expected, outcome, last=not signals)
            if not signals:
                break
    outcome.seconds = seconds
    return outcome


def finish(command: Command, expected: dict[str, str], outcome: Outcome, *, last: bool) -> None:
    """Compares a finished result and what lies beside it, and removes both."""
    found = contents(command.folder / OUT)
    names = sorted(found.keys() | expected.keys())
    outcome.finished += 1
    outcome.wrong += [f"{n} differs" for n in names if found.get(n) != expected.get(n)]
    left = {path.name for path in command.folder.iterdir()} - {OUT, f"{OUT}.run"}
    if last and left:
        outcome.wrong.append(f"left at the end: {sorted(left)}")
    shutil.rmtree(command.folder)
    command.folder.mkdir()


def prepare(folder: Path) -> tuple[Path, Path]:
    """Writes the tiny model and its token ids; returns their paths."""
    import numpy as np

    from lordjax.scripts.make_checkpoint import make

    make(folder / "model", "llama-2-7b", layers=2, shrink=32, vocabulary=256, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, 256, (24, 32), np.int32)
    np.save(folder / "tokens.npy", tokens)
    return folder / "model", folder / "tokens.npy"


@click.command()
@click.option("--kills", type=click.IntRange(0, 10**6), default=100, show_default=True)
@click.option("--terms", type=click.IntRange(0, 10**6), default=50, show_default=True)
@click.option("--jobs", default=",".join(JOBS), show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
def main(kills: int, terms: int, jobs: str, seed: int) -> None:
    """Ends jobs with signals, goes on, and compares the results."""
    folder = Path(tempfile.mkdtemp(prefix="lordjax-interruptions-"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    model, tokens = prepare(folder)
    import lordjax.compression.low_rank
    import lordjax.scripts.verbs.compress
    import lordjax.scripts.verbs.convert
    import lordjax.scripts.verbs.finetune  # noqa: F401 - so that forked processes start at once

    names, bad = jobs.split(","), False
    print("| job | seconds | SIGKILL | SIGTERM | finished and equal | wrong |")
    print("|---|---:|---:|---:|---:|---|", flush=True)
    for i, name in enumerate(names):
        text, devices = JOBS[name]
        shares = [[k for k in range(total) if k % len(names) == i] for total in (kills, terms)]
        signals = [signal.SIGKILL] * len(shares[0]) + [signal.SIGTERM] * len(shares[1])
        places = {"M": str(model), "D": str(tokens), "O": str(folder / str(i) / OUT)}
        words = tuple(places.get(word, word) for word in text.split())
        command = Command(words, folder / str(i), devices)
        if code := wait(command.start()):
            sys.exit(f"{name}: exit code {code}: {command.error()[-2000:]}")
        expected = contents(command.folder / OUT)
        shutil.rmtree(command.folder)
        found = measure(command, expected, signals, seed + i)
        counts = " | ".join(str(found.signals.get(n, 0)) for n in (signal.SIGKILL, signal.SIGTERM))
        wrong = "; ".join(dict.fromkeys(found.wrong)) or "none"
        print(
            f"| {name} | {found.seconds:.1f} | {counts} | {found.finished} | {wrong} |", flush=True
        )
        bad |= bool(found.wrong)
    shutil.rmtree(folder)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
