"""The numbers of the map: for every layer and matrix, the share kept or the bits per weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lordjax.kernels.base import Kernel, kernel_fields
from lordjax.kernels.quantized import NFQuantized
from lordjax.models.config import ModelConfig
from lordjax.models.sites import LINEAR_SITES, MODULE_SITES
from lordjax.names import is_block_linear, layer_index, layer_type
from lordjax.scripts.report.parameters import original_shapes, parameter_rows

SHARE, BITS = "share of the weights kept", "bits per original weight"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One matrix of one layer.

    Attributes:
      path: of the parameter.
      value: share kept in (0, 1], or bits per original weight.
      note: what the matrix has become: ``r32`` (rank), ``w1104`` (width), ``nf3`` (bits of the
        quantized weights); empty if nothing was done.
    """

    path: str
    value: float
    note: str

    @property
    def text(self) -> str:
        """Value and note, as the map shows them."""
        return f"{self.value:.2f} {self.note}".strip()


@dataclasses.dataclass(frozen=True)
class Grid:
    """A map of layers × matrices.

    Attributes:
      layers: how many there are.
      columns: the matrices of a layer, such as ``attention/q``, in the order in which they run.
      unit: of the values: `SHARE` or `BITS`.
      cells: (layer, column) -> cell; a layer may lack a matrix.
    """

    layers: int
    columns: tuple[str, ...]
    unit: str
    cells: Mapping[tuple[int, str], Cell]

    @property
    def extent(self) -> tuple[float, float]:
        """Where the colours begin and end: 0 to 1, or whole numbers of bits."""
        if self.unit == SHARE:
            return 0.0, 1.0
        values = [cell.value for cell in self.cells.values()]
        least = int(min(values))
        return float(least), float(max(least + 1, int(-(-max(values) // 1))))

    @property
    def legend(self) -> str:
        """What the notes in the cells mean."""
        notes = " ".join(cell.note for cell in self.cells.values()).split()
        known = {
            "r": "r: rank of the factor pair",
            "w": "w: width that is left of a narrower layer",
            "nf": "nf: NormalFloat quantized weights, with their bits",
        }
        kinds = {note.rstrip("0123456789") for note in notes}
        return "; ".join(text for kind, text in known.items() if kind in kinds)

    def summary(self, linear: Mapping[str, Any]) -> str:
        """What the block linear weights have become, in words.

        Args:
          linear: of `parameters.block_linear`.
        """
        if self.unit == BITS:
            bits = linear["bits_per_weight"]
            return f"the block linear weights take {bits:.2f} bits per original weight"
        return f"{linear['kept']:.1%} of the block linear weights are kept"


def grid_of(config: ModelConfig, leaves: Mapping[str, Any]) -> Grid:
    """The map of a model.

    Args:
      config: the architecture.
      leaves: parameter path -> array, kernel, or shapes of them.
    """
    linear = {path: leaf for path, leaf in leaves.items() if is_block_linear(path)}
    rows, original = parameter_rows(config, linear), original_shapes(config)
    forms = {path: _formats(leaf) for path, leaf in linear.items()}
    unit, key = (BITS, "bits") if any(forms.values()) else (SHARE, "kept")
    columns = in_order(layer_type(path) for path in linear)
    cells = {
        (layer_index(path), layer_type(path)): Cell(
            path, rows[path][key], _note(leaf, forms[path], original[path])
        )
        for path, leaf in linear.items()
    }
    return Grid(config.num_layers, tuple(columns), unit, cells)


def in_order(names: Iterable[str]) -> list[str]:
    """Matrices and modules of a layer in the order in which they run; others at the end."""
    usual = [site.layer for site in (*LINEAR_SITES, *MODULE_SITES)]
    there = list(dict.fromkeys(names))
    return sorted(there, key=lambda name: usual.index(name) if name in usual else len(usual))


def _formats(leaf: Any) -> list[str]:
    """The formats of the quantized weights inside a kernel: ``nf3``; that of the base first."""
    if isinstance(leaf, NFQuantized):
        return [f"nf{leaf.format.bits}"]
    if not isinstance(leaf, Kernel):
        return []
    inner = [_formats(getattr(leaf, name)) for name in kernel_fields(leaf)[0]]
    return list(dict.fromkeys(form for forms in inner for form in forms))


def _note(leaf: Any, forms: list[str], original: Any) -> str:
    """What a matrix has become, in a word or two."""
    rank = getattr(leaf, "rank", None)
    if rank is not None:
        return " ".join([*forms[:1], f"r{rank}"])
    if forms:
        return forms[0]
    sides = zip(leaf.shape, original.shape, strict=True)
    return next((f"w{new}" for new, old in sides if new != old), "")
