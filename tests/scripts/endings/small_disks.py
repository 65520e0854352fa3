"""Runs whole commands on disks that are too small, and on inputs that belong to somebody else.

Run as root, on Linux::

    python tests/scripts/endings/small_disks.py [--jobs compress,…] [--shares 0.05,0.3,0.6,0.9]

A disk is a file system in memory, in a mount namespace of this process. A job is asked to write on
disks of several shares of the bytes that its result has. First the room is asked for as always, so
that the job must be refused. Then the question for free bytes is answered with a lie, so that the
disk is full at some write. Both must end with exit code 2 and one line, with no result, and with
nothing left but what the same command goes on with. With more room it does, to the same bytes.

Then each job runs as a user who may read the inputs and write its own directory only.

The program prints a Markdown table, and its exit code is 1 if anything was wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from interruptions import OUT, Command, contents, prepare, wait

from lordjax.evaluate.isolation import kernel_calls
from lordjax.evaluate.isolation.kernel_calls import call, prctl, set_capabilities
from lordjax.storage import room

# Command line with M, the model; C, the same compressed; D, token ids; O, the output.
JOBS = {
    "compress": "compress M O --calibration D --keep 0.6",
    "elastic": "compress M O --calibration D --elastic",
    "convert": "convert M O --dtype bfloat16",
    "export": "export C O --to dense",
    "orbax": "export C O --to orbax",
    "finetune": "finetune M O --data D --recipe lora --rank 2 --steps 4 --every 2",
}
ENOUGH = 2**28  # bytes of a disk
KEPT = {f"{OUT}.partial", f"{OUT}.run"}
OWNER, READER = 65533, 65534
NEW_MOUNTS, RECURSIVE_PRIVATE, REMOUNT, DETACH = 1 << 17, 0x44000, 32, 2


def own_mounts() -> None:
    """Enters a mount namespace; raises OSError if that is not permitted."""
    call("unshare", NEW_MOUNTS)
    call("mount", None, b"/", None, RECURSIVE_PRIVATE, None)


@contextlib.contextmanager
def disk(at: Path, size: int) -> Iterator[Callable[[int], None]]:
    """Mounts a disk in memory; yields a function that changes its size."""

    def mount(size: int, flags: int = 0) -> None:
        call("mount", b"tmpfs", bytes(at), b"tmpfs", flags, f"size={size}".encode())

    at.mkdir()
    mount(size)
    try:
        yield lambda size: mount(size, REMOUNT)
    finally:
        call("umount2", bytes(at), DETACH)
        at.rmdir()


def again(command: Command) -> Command:
    """Returns the command that goes on."""
    resume = (command.folder / f"{OUT}.run" / "run.json").exists()
    return dataclasses.replace(command, arguments=command.arguments + ("--resume",) * resume)


def refusal(command: Command, code: int | None) -> list[str]:
    """Returns what is wrong with the end of a command for which there was no room."""
    lines = [line for line in command.error().splitlines() if line.startswith("error: ")]
    wrong = [] if code == 2 else [f"exit code {code}"]
    if len(lines) != 1 or " free" not in lines[0] or "Traceback" in command.error():
        wrong.append(f"stderr {command.error()[-500:]!r}")
    if left := {path.name for path in command.folder.iterdir()} - KEPT:
        wrong.append(f"left: {sorted(left)}")
    return wrong


def result(command: Command, code: int | None, expected: dict[str, str]) -> list[str]:
    """Returns what is wrong with a result."""
    if code != 0:
        return [f"exit code {code}: {command.error()[-500:]!r}"]
    wrong = []
    if not (command.folder / OUT / "params").is_dir():  # Orbax gives its files random names
        found = contents(command.folder / OUT)
        names = sorted(found.keys() | expected.keys())
        wrong = [f"{name} differs" for name in names if found.get(name) != expected.get(name)]
    if left := {path.name for path in command.folder.iterdir()} - {OUT, f"{OUT}.run"}:
        wrong.append(f"left at the end: {sorted(left)}")
    return wrong


def on_small_disk(command: Command, size: int, expected: dict[str, str]) -> list[str]:
    """Runs a command on a disk of a size, with and without asking, and then with more room."""
    asked = room.free_bytes
    with disk(command.folder, size) as resize:
        wrong = refusal(command, wait(command.start()))
        room.free_bytes = lambda path: 2**40
        try:
            wrong += refusal(command, wait(again(command).start()))
        finally:
            room.free_bytes = asked
        resize(ENOUGH)
        return wrong + result(command, wait(again(command).start()), expected)


def become_reader() -> None:
    """Becomes a user who may read everything, because Python may belong to root."""
    prctl(kernel_calls.KEEP_CAPABILITIES, 1)
    os.setgroups([])
    os.setresgid(READER, READER, READER)
    os.setresuid(READER, READER, READER)
    set_capabilities(kernel_calls.READ_EVERYTHING)
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        os.environ.pop(name, None)


def as_reader(command: Command, inputs: list[Path], expected: dict[str, str]) -> list[str]:
    """Runs a command whose inputs are read-only and belong to somebody else."""
    command.folder.mkdir()
    os.chown(command.folder, READER, READER)
    before = [facts(path) for path in inputs]
    command = dataclasses.replace(command, before=become_reader)
    wrong = result(command, wait(command.start()), expected)
    return wrong + ["the inputs have changed"] * (before != [facts(path) for path in inputs])


def facts(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Returns size, mode and time of change of everything in a directory."""
    paths = sorted([directory, *directory.rglob("*")])
    found = {str(path): path.stat() for path in paths}
    return {name: (s.st_size, s.st_mode, s.st_mtime_ns) for name, s in found.items()}


def hand_over(directory: Path) -> None:
    """Gives a directory to another user, who may not write it either."""
    for path in [*directory.rglob("*"), directory]:
        os.chown(path, OWNER, OWNER)
        path.chmod(0o555 if path.is_dir() else 0o444)


def run(name: str, folder: Path, inputs: dict[str, Path], shares: list[float]) -> list[str]:
    """Runs a job in all ways; prints a row of the table and returns what was wrong."""

    def command(number: int) -> Command:
        at = folder / f"{name}-{number}"
        places = {**{key: str(path) for key, path in inputs.items()}, "O": str(at / OUT)}
        return Command(tuple(places.get(word, word) for word in JOBS[name].split()), at, 1)

    first = command(0)
    if code := wait(first.start()):
        sys.exit(f"{name}: exit code {code}: {first.error()[-2000:]}")
    expected = contents(first.folder / OUT)
    files = [path for path in (first.folder / OUT).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    wrong = []
    for number, share in enumerate(shares, 1):
        found = on_small_disk(command(number), int(size * share), expected)
        wrong += [f"{share:g} of the bytes: {text}" for text in found]
    folders = [path if path.is_dir() else path.parent for path in inputs.values()]
    wrong += [f"read-only: {text}" for text in as_reader(command(-1), folders, expected)]
    shown = "; ".join(wrong) or "none"
    print(f"| {name} | {size} | {len(shares)} | {shown} |", flush=True)
    return wrong


@click.command()
@click.option("--jobs", default=",".join(JOBS), show_default=True)
@click.option("--shares", default="0.05,0.3,0.6,0.9", show_default=True)
def main(jobs: str, shares: str) -> None:
    """Runs commands without room, and with inputs of somebody else."""
    own_mounts()
    folder = Path(tempfile.mkdtemp(prefix="lordjax-disks-"))
    folder.chmod(0o755)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    (folder / "inputs").mkdir()
    model, tokens = prepare(folder / "inputs")
    import lordjax.compression.low_rank
    import lordjax.scripts.verbs.compress
    import lordjax.scripts.verbs.convert
    import lordjax.scripts.verbs.export
    import lordjax.scripts.verbs.finetune  # noqa: F401 - so that forked processes start at once

    words = ("compress", str(model), str(folder / "inputs" / "small"), "--keep", "0.6")
    made = Command((*words, "--calibration", str(tokens)), folder / "made", 1)
    if code := wait(made.start()):
        sys.exit(f"exit code {code}: {made.error()[-2000:]}")
    hand_over(folder / "inputs")
    inputs = {"M": model, "C": folder / "inputs" / "small", "D": tokens}
    print("| job | bytes | sizes of disks | wrong |\n|---|---:|---:|---|", flush=True)
    sizes = [float(share) for share in shares.split(",")]
    wrong = [text for name in jobs.split(",") for text in run(name, folder, inputs, sizes)]
    shutil.rmtree(folder)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
