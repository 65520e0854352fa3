"""Benchmark of how time and memory of a compression grow with width, depth and tokens.

Run::

    python -m lordjax.scripts.benchmarks.scale
    python -m lordjax.scripts.benchmarks.scale --shrinks 8,4,2 --depths 4,8,16 --windows 16,32,64

``lordjax compress`` compresses synthetic checkpoints with the shapes of a released model (see
`lordjax.scripts.make_checkpoint`), each time in a new process. One of width, depth and number of
calibration tokens varies; the other two stay at the middle of their lists. Growth is the exponent p
of ``c·x^p``, fitted by least squares to the logarithms. It is printed for all sizes and for the two
largest ones, because overhead dominates the small sizes.

Every size runs at least twice and starts with an empty compilation cache. The first run compiles
and has its own columns. Of the other runs the minimum of the seconds and of the peak memory (VmHWM)
counts. The growth of memory is computed after the memory of an idle process is subtracted.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from lordjax.scripts.benchmarks.protocol import environment
from lordjax.scripts.console import format_bytes, say
from lordjax.scripts.flags.types import COUNT, Listed
from lordjax.scripts.make_checkpoint import CONFIGS, config_like, make

AXES = ("width", "layers", "tokens")
CHILD = "from lordjax.scripts.cli import main; main()"
# An idle process: it imports what a compression needs, and initializes the device.
BARE = """
import jax, lordjax.compression
from lordjax.runtime.progress import peak_rss
jax.block_until_ready(jax.numpy.zeros(1))
print(peak_rss())
"""


def exponent(x: list[float], y: list[float]) -> float | None:
    """Fits p of ``y = c·x^p`` by least squares to the logarithms.

    Args:
      x: sizes.
      y: cost of each size, such as seconds or bytes.

    Returns:
      The exponent; None with fewer than two different sizes, or if a cost is not positive.
    """
    if len(set(x)) < 2 or min(y) <= 0:
        return None
    a, b = ([math.log(value) for value in values] for values in (x, y))
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    spread = sum((u - mean_a) ** 2 for u in a)
    return sum((u - mean_a) * (v - mean_b) for u, v in zip(a, b, strict=True)) / spread


def cases(
    shrinks: tuple[int, ...], depths: tuple[int, ...], windows: tuple[int, ...]
) -> dict[str, list[tuple[int, int, int]]]:
    """Cases (shrink, layers, windows) along each axis, sorted by size.

    Args:
      shrinks: divisors of the width.
      depths: numbers of blocks.
      windows: numbers of calibration sequences.
    """
    rising = [sorted(set(shrinks), reverse=True), sorted(set(depths)), sorted(set(windows))]
    middle = [values[len(values) // 2] for values in rising]
    found = {}
    for k, (axis, values) in enumerate(zip(AXES, rising, strict=True)):
        found[axis] = [(*middle[:k], value, *middle[k + 1 :]) for value in values]
    return found


def _alone(command: list[str], programs: Path) -> str:
    """Runs Python in a new process, and returns what it prints.

    Args:
      command: arguments of the Python interpreter.
      programs: directory of the compilation cache.

    Raises:
      RuntimeError: if the process fails; the message ends with its stderr.
    """
    own = {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    found = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=os.environ | own
    )
    if found.returncode:
        failed = " ".join(command[2:]) or "an idle process"
        raise RuntimeError(
            f"{failed}: exit code {found.returncode}, expected 0: {found.stderr.strip()[-2000:]}"
        )
    return found.stdout


def measure(
    case: tuple[int, int, int],
    folder: Path,
    *,
    like: str,
    length: int,
    vocabulary: int,
    repeats: int,
    options: list[str],
) -> dict[str, Any]:
    """Measures the seconds by stage and the peak memory of one compression.

    Args:
      case: divisor of the width, number of blocks, number of calibration sequences.
      folder: directory for models and compiled programs.
      like: name of the released model, see `lordjax.scripts.make_checkpoint`.
      length: tokens per calibration sequence.
      vocabulary: size of the model's vocabulary.
      repeats: runs after the first one, which compiles.
      options: further options of ``lordjax compress``.
    """
    import numpy as np

    (shrink, layers, windows), model, programs = case, folder / "model", folder / "programs"
    programs.mkdir()
    config = config_like(like, layers, shrink, vocabulary)
    nbytes = make(model, like, layers=layers, shrink=shrink, vocabulary=vocabulary)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (windows, length), np.int32)
    np.save(folder / "tokens.npy", tokens)
    command = ["-c", CHILD, "compress", str(model), str(folder / "out"), "--json"]
    command += ["--calibration", str(folder / "tokens.npy"), "--samples", str(windows), *options]
    runs, peaks = [], []
    for _ in range(repeats + 1):
        _alone(command, programs)
        report = json.loads((folder / "out" / "report.json").read_text("utf-8"))
        shutil.rmtree(folder / "out")
        runs.append(report["happened"]["seconds"])
        peaks.append(report["peak_rss_bytes"])
    shutil.rmtree(model)
    shutil.rmtree(programs)
    row = {
        "width": config.get("hidden_size") or config["n_embd"],
        "layers": layers,
        "tokens": windows * length,
        "model_bytes": nbytes,
        "seconds": min(runs[1:], key=lambda seconds: seconds["total"]),
        "peak_bytes": min(peaks[1:]),
        "first_seconds": runs[0]["total"],
        "first_peak_bytes": peaks[0],
    }
    say(f"{row['width']} wide, {layers} layers, {row['tokens']} tokens: {seconds_of(row):.1f} s")
    return row


def seconds_of(row: dict[str, Any], stage: str = "total") -> float:
    """Seconds of a stage in a row; 0 if the method has no such stage."""
    return row["seconds"].get(stage, 0.0)


def growth(rows: list[dict[str, Any]], axis: str, bare: int) -> dict[str, list[float | None]]:
    """Growth exponents of memory and of every stage's seconds along an axis.

    Args:
      rows: results of `measure`, sorted by size.
      axis: one of `AXES`.
      bare: peak memory of an idle process, in bytes.

    Returns:
      Two exponents by quantity: over all sizes, and over the two largest sizes.
    """
    what: dict[str, list[float]] = {"memory": [row["peak_bytes"] - bare for row in rows]}
    for stage in dict.fromkeys(stage for row in rows for stage in row["seconds"]):
        what[f"{stage} s"] = [seconds_of(row, stage) for row in rows]
    x = [float(row[axis]) for row in rows]
    return {name: [exponent(x, y), exponent(x[-2:], y[-2:])] for name, y in what.items()}


def markdown(found: dict[str, Any]) -> str:
    """Formats the results as two Markdown tables: the cases, and the growth exponents."""
    rows = found["cases"]
    stages = list(dict.fromkeys(stage for row in rows for stage in row["seconds"]))
    head = ["width", "layers", "tokens", "model", *(f"{stage} s" for stage in stages)]
    head += ["peak memory", "first run s", "its memory"]
    lines = [_line(head), _line(["---:"] * len(head))]
    for row in rows:
        cells = [f"{row[axis]:,}" for axis in AXES] + [format_bytes(row["model_bytes"])]
        cells += [f"{seconds_of(row, stage):.2f}" for stage in stages]
        cells += [format_bytes(row["peak_bytes"]), f"{row['first_seconds']:.1f}"]
        lines.append(_line([*cells, format_bytes(row["first_peak_bytes"])]))
    names = list(dict.fromkeys(name for axis in found["growth"].values() for name in axis))
    lines += ["", f"a process without work: {format_bytes(found['bare_bytes'])}", ""]
    lines += ["exponents, of all sizes / of the last two:", ""]
    lines += [_line(["growth with", *names]), _line(["---", *["---:"] * len(names)])]
    for axis, exponents in found["growth"].items():
        lines.append(_line([axis, *(_pair(exponents[name]) for name in names)]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _pair(exponents: list[float | None]) -> str:
    return " / ".join("-" if p is None else f"{p:.2f}" for p in exponents)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--like",
    type=click.Choice(list(CONFIGS)),
    default="llama-2-7b",
    show_default=True,
    help="Released model whose shapes are used.",
)
@click.option(
    "--shrinks",
    default="32,16,8",
    show_default=True,
    type=Listed(COUNT, "32,16,8"),
    help="Divisors of the model's widths, separated by commas.",
)
@click.option(
    "--depths",
    default="2,4,8",
    show_default=True,
    type=Listed(COUNT, "2,4,8"),
    help="Numbers of layers, separated by commas.",
)
@click.option(
    "--windows",
    default="8,16,32",
    show_default=True,
    type=Listed(COUNT, "8,16,32"),
    help="Numbers of calibration sequences, separated by commas.",
)
@click.option(
    "--length",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Tokens per calibration sequence.",
)
@click.option(
    "--vocabulary",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
    help="Size of the model's vocabulary.",
)
@click.option("--method", default="modegpt", show_default=True, help="Compression method.")
@click.option(
    "--keep",
    type=float,
    default=0.8,
    show_default=True,
    help="Fraction of the block weights to keep, for low-rank methods.",
)
@click.option(
    "--bits",
    type=float,
    default=3.0,
    show_default=True,
    help="Bits per block weight, for quantizing methods.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Timed runs after the first one, which compiles.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def main(
    shrinks: tuple[int, ...],
    depths: tuple[int, ...],
    windows: tuple[int, ...],
    method: str,
    keep: float,
    bits: float,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measures how time and memory of a compression grow with the size of the job."""
    from lordjax.allocation.candidates import QUANTIZERS
    from lordjax.methods import METHODS

    if method not in (*METHODS, *QUANTIZERS):
        names = ", ".join((*METHODS, *QUANTIZERS))
        raise click.BadParameter(f"{method!r} is none of {names}", param_hint="--method")
    budget = {"keep": keep} if method in METHODS else {"bits": bits}
    along = cases(shrinks, depths, windows)
    options, rows = ["--method", method], {}
    for name, value in budget.items():
        options += [f"--{name}", str(value)]
    try:
        for shrink in shrinks:  # fail before the first run
            config_like(settings["like"], 1, shrink)
        with tempfile.TemporaryDirectory() as folder:
            bare = int(_alone(["-c", BARE], Path(folder) / "bare"))
            for case in dict.fromkeys(itertools.chain(*along.values())):
                rows[case] = measure(case, Path(folder), options=options, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    found = {
        "cases": sorted(rows.values(), key=lambda row: [row[axis] for axis in AXES]),
        "bare_bytes": bare,
        "growth": {axis: growth([rows[c] for c in of], axis, bare) for axis, of in along.items()},
        "settings": {**settings, "method": method, **budget},
        "environment": environment(),
    }
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(", ".join(f"{key} {value}" for key, value in found["environment"].items()))
    click.echo(f"{' '.join(options)}, windows of {settings['length']} tokens\n")
    click.echo(markdown(found))


if __name__ == "__main__":
    main()
