"""How fast the error falls with the rank: from a method's factors, or from stored matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lordjax.kernels import trees
from lordjax.kernels.base import materialize
from lordjax.models.config import ModelConfig
from lordjax.models.source import Source
from lordjax.names import is_block_linear, layer
from lordjax.runtime.progress import Progress

POINTS = 48  # of a curve, at most: more would not be seen
DIGITS = 4  # of a share that is left: what a picture shows, and no rounding error
OF_METHOD = (
    "Share of the predicted error that is left at every rank, in the measure of the method. "
    "Zero error means the original matrix."
)
OF_STORED = (
    "Share of the squared singular values of the stored matrices that is left beyond every rank."
)


@dataclasses.dataclass(frozen=True)
class Curve:
    """What is left of one site's error, or of one matrix, at every rank.

    Attributes:
      path: of the site.
      ranks: some ranks (widths of a module) from 0 up.
      left: the share that is left at each of them; from 1 down.
      chosen: the rank that the plan gives the site; None if it is left as it is.
    """

    path: str
    ranks: np.ndarray
    left: np.ndarray
    chosen: int | None = None

    @property
    def left_at_chosen(self) -> float | None:
        """The share that is left at the chosen rank."""
        if self.chosen is None:
            return None
        return float(np.interp(self.chosen, self.ranks, self.left))


@dataclasses.dataclass(frozen=True)
class Spectra:
    """Curves of many sites.

    Attributes:
      curves: by site, in the order of the layers.
      about: a sentence: what is shown.
      layers: how many the model has.
    """

    curves: tuple[Curve, ...]
    about: str
    layers: int


def curve_of(path: str, energies: Any, chosen: int | None = None) -> Curve:
    """The curve of a spectrum.

    Args:
      path: of the site.
      energies: ``[m]``, what each rank takes off the error, non-increasing.
      chosen: see `Curve`.
    """
    energies = np.maximum(np.asarray(energies, float), 0.0)
    tails = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    left = tails / tails[0] if tails[0] > 0 else tails
    last = len(energies)
    some = np.geomspace(1, max(last, 2), POINTS // 2), np.linspace(0, last, POINTS // 2)
    ranks = np.unique(np.concatenate([*some, [chosen or 0]]).round().astype(int))
    ranks = ranks[ranks <= last]
    return Curve(path, ranks, _rounded(left[ranks]), chosen)


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.array([float(f"{value:.{DIGITS}g}") for value in values])


def of_factors(factors: Mapping[str, Any], ranks: Mapping[str, int | None], layers: int) -> Spectra:
    """The errors that a method predicts, from its factors at all ranks.

    Args:
      factors: site path -> factors; only their spectra are read.
      ranks: site path -> the chosen rank.
      layers: number of layers of the model.
    """
    curves = [
        curve_of(path, factors[path].spectrum, rank)
        for path, rank in ranks.items()
        if path in factors
    ]
    return Spectra(tuple(curves), OF_METHOD, layers)


def of_stored(source: Source, layers: Iterable[int], progress: Progress | None = None) -> Spectra:
    """The singular values of the stored matrices of some layers.

    Args:
      source: the model.
      layers: their numbers.
      progress: called with (stage, done, total).
    """
    curves, layers, count = [], list(layers), source.config.num_layers
    for k, i in enumerate(layers):
        block = {layer(i): source.block(i)}
        for path, kernel in trees.flatten(block).items():
            if is_block_linear(path):
                curves.append(curve_of(path, _squared_singular_values(kernel)))
        if progress is not None:
            progress("singular values", k + 1, len(layers))
    some = "" if len(layers) == count else f" Computed for layers {_listed(layers)} of {count}."
    return Spectra(tuple(curves), OF_STORED + some, count)


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


def _squared_singular_values(kernel: Any) -> np.ndarray:
    """Largest first; from the smaller Gram matrix, which is enough for a picture."""
    matrix = np.asarray(_materialized(kernel), np.float64)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return np.linalg.eigvalsh(wide @ wide.T)[::-1]


# Compiled once for a shape and format: decoding operation by operation takes longer.
_materialized = jax.jit(materialize)


def affordable(
    config: ModelConfig, leaves: Mapping[str, Any], operations: float, most: int | None = None
) -> list[int]:
    """Layers whose singular values can be had for so many operations, spread evenly.

    Args:
      config: the architecture.
      leaves: parameter path -> anything with a shape.
      operations: multiplications and additions that may be spent.
      most: layers at most.
    """
    count = config.num_layers
    spent = 0.0
    for path, leaf in leaves.items():
        if is_block_linear(path):
            least, largest = sorted(leaf.shape[-2:])
            spent += 2 * least**2 * largest + 4 * least**3
    number = min(count, int(operations * count / spent), count if most is None else most)
    if number < 1:
        return []
    middle = [count // 2] if number == 1 else np.linspace(0, count - 1, number).round()
    return sorted({int(i) for i in middle})
