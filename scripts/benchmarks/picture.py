"""Plot of perplexity against size for every method, the picture of the README.

::

    python -m lordjax.scripts.benchmarks.picture

The modules `lordjax.scripts.benchmarks.compress` and `lordjax.scripts.benchmarks.quantize` measured
the numbers. The data file also names the commit of each number and its table in the documentation.
The same data give the same file, byte for byte.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from pathlib import Path
from typing import Any

import click

from lordjax.data.record_files import read_text
from lordjax.runtime.input_files import reading
from lordjax.scripts.flags.types import InputPath, OutputPath
from lordjax.scripts.report.figures import check_picture, save_figure

FOLDER = Path("docs/pages/pictures")
DENSE, BITS = "dense", 16.0  # bits per bfloat16 weight
TOP = 1000.0  # larger perplexities are not drawn
MARKERS = "os^vD<>PXph*d8"
LINES = ("-", "--", "-.", ":")
MAIN = ("modegpt", "auto")  # methods drawn with thicker lines
SIZE = (9.4, 5.4)  # inches; a browser shows 96 px per inch
# The fixed salt makes the file reproducible. Text as text takes a third of the bytes of outlines.
STYLE: Any = {"svg.hashsalt": "lordjax", "svg.fonttype": "none", "font.size": 9}


@dataclasses.dataclass(frozen=True)
class Point:
    """Measured model.

    Attributes:
      method: name of the method, as in the tables.
      bits: bits stored for the blocks' matrices, per weight of the dense model. Unquantized numbers
        count as bfloat16.
      perplexity: perplexity of the model.
    """

    method: str
    bits: float
    perplexity: float


def read(path: Path) -> list[Point]:
    """Reads the points of a ``.csv`` file with columns method, bits_per_weight and perplexity.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if a row lacks a number, or no row is of the dense model.
    """
    points = []
    with reading(path, "not a table of results", "correct it"):
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
        for number, row in enumerate(rows, start=2):
            try:
                point = Point(
                    row["method"], float(row["bits_per_weight"]), float(row["perplexity"])
                )
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}: line {number}: expected method, bits_per_weight and perplexity, "
                    f"found {row} ({error!r})"
                ) from error
            points.append(point)
    if not any(point.method == DENSE for point in points):
        raise ValueError(
            f"{path}: no row of method {DENSE!r}; add one, which the others are compared with"
        )
    return points


def by_method(points: list[Point]) -> dict[str, list[Point]]:
    """Groups the points by method, without `DENSE`, and sorts each method's points by size.

    Methods whose largest model has at most half of the bits of bfloat16 come first. Within both
    groups the methods are sorted by mean perplexity.
    """
    points = [point for point in points if point.method != DENSE]
    points.sort(key=lambda point: (point.method, point.bits))
    found = {n: list(own) for n, own in itertools.groupby(points, lambda point: point.method)}
    order = sorted(found, key=lambda n: (found[n][-1].bits > BITS / 2, _mean(found[n])))
    return {name: found[name] for name in order}


def _mean(points: list[Point]) -> float:
    return sum(point.perplexity for point in points) / len(points)


def draw(points: list[Point], path: Path) -> None:
    """Writes the plot into a file; the suffix of the path selects the format."""
    import matplotlib
    from matplotlib.figure import Figure

    (dense,) = (point for point in points if point.method == DENSE)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.axhline(dense.perplexity, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(
            f"dense {dense.perplexity:.1f}",
            (BITS / 2 + 0.2, dense.perplexity),
            textcoords="offset points",
            xytext=(0, 3),
        )
        methods = by_method(points)
        least = {name: min(point.perplexity for point in own) for name, own in methods.items()}
        _curves(axes, {name: own for name, own in methods.items() if least[name] <= TOP})
        off = [f"{name} from {value:,.0f}" for name, value in least.items() if value > TOP]
        if off:
            text = "off the scale: " + ",\n".join(off)
            axes.text(0.02, 0.98, text, transform=axes.transAxes, va="top", fontsize=8)
        axes.set_yscale("log")
        axes.set(xlim=(2.5, 15), ylim=(dense.perplexity * 0.93, TOP))
        axes.set_yticks(ticks := [30, 40, 50, 70, 100, 200, 300, 500, 1000], map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_xlabel("bits per weight of the dense blocks (16: not compressed)")
        axes.set_ylabel("perplexity (log scale; lower is better)")
        axes.set_title("SmolLM2-135M on wikitext2, compressed without training", fontsize=10)
        share = axes.secondary_xaxis("top", functions=(_percent, _bits))
        share.set_xlabel("bytes of the blocks' matrices (% of bfloat16)")
        figure.legend(loc="outside right upper", fontsize=8, handlelength=3.2)
        save_figure(figure, path)


def _curves(axes: Any, methods: dict[str, list[Point]]) -> None:
    import matplotlib

    colours = itertools.cycle(matplotlib.color_sequences["tab10"])
    styles = zip(itertools.cycle(MARKERS), itertools.cycle(LINES), colours, strict=False)
    for (name, points), (marker, line, colour) in zip(methods.items(), styles, strict=False):
        x, y = [point.bits for point in points], [point.perplexity for point in points]
        look = {"marker": marker, "linestyle": line, "color": colour}
        look |= {"linewidth": 2.2, "zorder": 3} if name in MAIN else {"linewidth": 1.1}
        axes.plot(x, y, label=name, **look)


def _percent(bits: Any) -> Any:
    return 100 * bits / BITS


def _bits(percent: Any) -> Any:
    return percent * BITS / 100


@click.command()
@click.option(
    "--data",
    type=InputPath(),
    default=str(FOLDER / "results.csv"),
    show_default=True,
    help="Measured numbers: a .csv file with columns method, bits_per_weight and perplexity.",
)
@click.option(
    "--out",
    type=OutputPath(file=True),
    default=str(FOLDER / "perplexity.svg"),
    show_default=True,
    help="File for the plot; its suffix (.svg, .png) selects the format.",
)
def main(data: str, out: str) -> None:
    """Plots perplexity against size for every method, and prints the numbers."""
    path, points = check_picture(out), read(Path(data))
    for name, own in by_method(points).items():
        print(f"{name:20}", *(f"{point.bits:g}: {point.perplexity:g}" for point in own), sep="  ")
    draw(points, path)
    print(path)


if __name__ == "__main__":
    main()
