"""Draws the map, the spectra and the errors on matplotlib figures.

Colours come from ``cividis``: evenly spaced for the eye, for people who see no red or green, and
in grey. Every value can be read without them: cells have numbers, lines have markers or dashes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from lordjax.names import layer_index, layer_type
from lordjax.scripts.report.grid import Grid, in_order
from lordjax.scripts.report.spectra import Curve, Spectra

COLOURS = "cividis"
CELL = (0.92, 0.21)  # inches
DARK = 0.45  # of the colours: below it white letters have more contrast than black ones
LINES = 32  # layers whose curves one panel holds, at most
LIGHTEST = 0.8  # of the colours of lines: beyond it they vanish on white
FLOOR = 1e-5  # of shares that are drawn
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lordjax",  # the same picture has the same bytes
}
MARKERS = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("P", "--"), ("X", "-."))


def map_size(grid: Grid) -> tuple[float, float]:
    """Width and height of the map, in inches."""
    return CELL[0] * len(grid.columns) + 1.8, CELL[1] * grid.layers + 1.3


def draw_map(figure: Any, grid: Grid) -> None:
    """Draws layers × matrices, a number in every cell.

    Args:
      figure: a matplotlib figure or part of one.
      grid: what is drawn.
    """
    values = np.full((grid.layers, len(grid.columns)), np.nan)
    for (layer, column), cell in grid.cells.items():
        values[layer, grid.columns.index(column)] = cell.value
    axes, (least, most) = figure.subplots(), grid.extent
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values), cmap=COLOURS, vmin=least, vmax=most, edgecolors="white"
    )
    for (layer, column), cell in grid.cells.items():
        dark = (cell.value - least) / (most - least) < DARK
        axes.text(
            grid.columns.index(column) + 0.5,
            layer + 0.5,
            cell.text,
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else "black",
        )
    axes.set_xticks(np.arange(len(grid.columns)) + 0.5, grid.columns)
    axes.set_yticks(np.arange(grid.layers) + 0.5, [str(i) for i in range(grid.layers)])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("matrix", labelpad=8)
    axes.set_ylabel("layer")
    axes.invert_yaxis()
    figure.colorbar(mesh, ax=axes, label=grid.unit, aspect=40, pad=0.01)
    if grid.legend:
        figure.supxlabel(grid.legend, fontsize=8)


def draw_spectra(figure: Any, spectra: Spectra, across: int) -> None:
    """Draws a panel per matrix, a curve per layer, a dot at the chosen rank.

    Args:
      figure: a matplotlib figure or part of one.
      spectra: what is drawn.
      across: panels in a row.
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    panels: dict[str, list[Curve]] = {}
    for curve in spectra.curves:
        panels.setdefault(layer_type(curve.path), []).append(curve)
    panels = {name: panels[name] for name in in_order(panels)}
    colours = matplotlib.colormaps[COLOURS](np.linspace(0, LIGHTEST, 256))
    shade = ScalarMappable(Normalize(0, max(spectra.layers - 1, 1)), ListedColormap(colours))
    grid = figure.subplots(-(-len(panels) // across), across, squeeze=False, sharey=True)
    for axes, (name, curves) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, name, curves, shade)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("share left")
    figure.colorbar(shade, ax=grid, label="layer", aspect=40, pad=0.01)


def _panel(axes: Any, name: str, curves: list[Curve], shade: Any) -> None:
    """The curves of one matrix in all layers."""
    picked = np.unique(np.linspace(0, len(curves) - 1, LINES).round().astype(int))
    for curve in (curves[i] for i in picked):
        colour = shade.to_rgba(layer_index(curve.path))
        left = np.where(curve.left > 0, curve.left, np.nan)
        axes.plot(curve.ranks, left, color=colour, linewidth=0.8)
        if curve.chosen is not None:
            axes.plot(
                [curve.chosen],
                [max(curve.left_at_chosen or 0.0, FLOOR)],
                "o",
                color=colour,
                markersize=4,
                markeredgecolor="black",
                markeredgewidth=0.5,
            )
    axes.set_yscale("log")
    axes.set_ylim(FLOOR, 1.5)
    axes.grid(visible=True, linewidth=0.3)
    is_matrix = curves[0].path.endswith("/kernel")
    axes.set(title=name, xlabel="rank" if is_matrix else "width")


def draw_errors(figure: Any, errors: Mapping[str, float], label: str) -> None:
    """Draws the error of every site against its layer, a line per matrix.

    Args:
      figure: a matplotlib figure.
      errors: site path -> relative error; zeros (original matrices) are left out.
      label: of the vertical axis.
    """
    import matplotlib

    lines: dict[str, dict[int, float]] = {}
    for path, error in errors.items():
        lines.setdefault(layer_type(path), {})[layer_index(path)] = error
    lines = {name: lines[name] for name in in_order(lines)}
    axes = figure.subplots()
    shades = matplotlib.colormaps[COLOURS](np.linspace(0, LIGHTEST, max(len(lines), 2)))
    for k, (name, found) in enumerate(lines.items()):
        marker, dashes = MARKERS[k % len(MARKERS)]
        layers = range(max(found) + 1)
        axes.plot(
            layers,
            [found.get(layer) or np.nan for layer in layers],
            dashes,
            marker=marker,
            markersize=4,
            linewidth=0.8,
            color=shades[k],
            label=name,
        )
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=True, linewidth=0.3)
    axes.set(xlabel="layer", ylabel=label)
    figure.legend(loc="outside right upper", fontsize=8)


def wrapped(text: str, inches: float) -> str:
    """A caption in lines that fit a width, at the usual size of letters."""
    return "\n".join(textwrap.wrap(text, int(inches * 14)))
