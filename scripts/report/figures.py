"""Figures as files and as text: what is drawn where, and how it is written."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lordjax.scripts.report.draw import (
    STYLE,
    draw_errors,
    draw_map,
    draw_spectra,
    map_size,
    wrapped,
)
from lordjax.scripts.report.grid import Grid
from lordjax.scripts.report.spectra import Spectra

FORMATS = (".png", ".svg", ".pdf")
# Of a file's metadata that holds the time, so that the same picture has the same bytes.
TIMELESS = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}
PAGE_WIDTH = 10.0  # inches
PANEL = 2.2  # inches in height
BESIDE = 6.4  # width of the spectra beside a map, inches


def check_picture(name: str) -> Path:
    """Where a picture is to be written. A file that is there will be replaced.

    Raises:
      ValueError: if the name does not end like a picture's.
      IsADirectoryError: if it is the name of a directory.
      PermissionError: if the file cannot be made.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{name}: a picture is a file that ends in {', '.join(FORMATS)}")
    if path.is_dir():
        raise IsADirectoryError(f"{name}: is a directory; name a file in it")
    there = next(p for p in path.absolute().parents if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise PermissionError(f"{name}: cannot be made, {there} is not a writable directory")
    return path


def write_picture(path: Path, title: str, grid: Grid, spectra: Spectra) -> None:
    """Writes the map with the spectra beside it; makes the directory if there is none.

    Args:
      path: see `check_picture`.
      title: above both.
      grid: the map.
      spectra: the curves.
    """
    with _figure() as new:
        width, height = map_size(grid)
        figure = new((width + BESIDE, max(height, 8.0) + 0.6))
        left, right = figure.subfigures(1, 2, width_ratios=[width, BESIDE])
        draw_map(left, grid)
        draw_spectra(right, spectra, across=2)
        right.supxlabel(wrapped(caption(spectra), BESIDE), fontsize=8)
        figure.suptitle(title)
        save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure atomically; makes the directory if there is none.

    Args:
      figure: the figure of Matplotlib.
      path: see `check_picture`.

    Raises:
      OSError: if the file cannot be written.
    """
    from lordjax.storage.tensor_files import write_bytes

    kind, file = path.suffix.lower(), io.BytesIO()
    figure.savefig(file, format=kind[1:], dpi=120, metadata=TIMELESS[kind])
    data = file.getvalue()
    if kind == ".svg":
        data = _renumbered(data.decode()).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)


def map_svg(grid: Grid) -> str:
    """The map as an ``<svg>`` element."""
    with _figure() as new:
        figure = new(map_size(grid))
        draw_map(figure, grid)
        return _svg(figure, "map")


def spectra_svg(spectra: Spectra) -> str:
    """The spectra as an ``<svg>`` element."""
    with _figure() as new:
        panels = len({curve.path.split("/", 1)[1] for curve in spectra.curves})
        across = 4 if panels > 6 else min(panels, 3)
        figure = new((PAGE_WIDTH, PANEL * -(-panels // across) + 0.3))
        draw_spectra(figure, spectra, across)
        return _svg(figure, "spectra")


def errors_svg(errors: Mapping[str, float], label: str) -> str:
    """The errors as an ``<svg>`` element."""
    with _figure() as new:
        figure = new((PAGE_WIDTH, 3.2))
        draw_errors(figure, errors, label)
        return _svg(figure, "errors")


def caption(spectra: Spectra) -> str:
    """What is shown, and how to read it."""
    dots = any(curve.chosen is not None for curve in spectra.curves)
    return spectra.about + (" Dots: the chosen ranks." if dots else "")


@contextlib.contextmanager
def _figure() -> Iterator[Any]:
    """Makes figures whose looks do not depend on anybody's settings."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield lambda size: Figure(figsize=size, layout="constrained")


def _renumbered(text: str) -> str:
    """Returns an SVG with its clip paths named in order; Matplotlib's own names vary."""
    found = dict.fromkeys(re.findall(r'<clipPath id="([^"]+)"', text))
    for number, name in enumerate(found):
        text = text.replace(name, f"clip{number}")
    return text


def _svg(figure: Any, name: str) -> str:
    """A figure as an element inside a page: no prologue, and ids that no other figure has."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None})
    text = _renumbered(file.getvalue())
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text).rstrip()
