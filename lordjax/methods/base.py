"""What a method is: statistics it needs, a rank-free factorisation, and a slice.

A method sees matrices and statistics; it knows no model, no file, no device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
from jaxtyping import Array, Float

from lordjax.kernels import LowRank
from lordjax.linalg import mm


@flax.struct.dataclass
class Factors:
    """A factorisation for all ranks at once; rank r is a slice.

    Attributes:
      left: ``[in, m]``, columns by falling importance.
      right: ``[m, out]``.
      spectrum: ``[m]``, non-increasing; the error at rank r is ``sum(spectrum[r:])`` in the
        method's own measure.
      mean_in: ``[m]`` mean of ``x @ left``, or None if the method keeps the bias as it is.
      mean_out: ``[out]`` mean of the layer's output without its bias, or None.
    """

    left: Any
    right: Any
    spectrum: Any
    mean_in: Any = None
    mean_out: Any = None


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of `METHODS`.

    Attributes:
      summary: one line for tables and ``--help``.
      factor: ``(kernel [in, out], stats) -> Factors``; pure, jittable, one compile per shape.
      needs: names of the statistics that ``factor`` reads: ``moments`` (of inputs or outputs,
        whichever is smaller), ``abs_mean``, ``gradients``, ``row_fisher``.
      bias: whether the result carries a bias correction.
      allocation: the default policy of `allocate`.
      prefix: ``dense``: statistics from the untouched model, in one pass; ``compressed``: block
        after block from the model compressed so far; ``corrective``: likewise, fitting the
        untouched model's outputs.
      exceptions: layer in the block (``attention/v``) -> name of the method used there instead;
        its ``needs`` are among this method's.
    """

    summary: str
    factor: Callable[[Array, Mapping[str, Any]], Factors]
    needs: tuple[str, ...] = ()
    bias: bool = False
    allocation: str = "uniform"
    prefix: str = "dense"
    exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)


def truncate(factors: Factors, rank: int) -> tuple[LowRank, Float[Array, "out"] | None]:
    """The kernel of one rank, and what to add to the layer's bias (None for most methods)."""
    left, right = factors.left[:, :rank], factors.right[:rank]
    kernel = LowRank(left, right)
    if factors.mean_out is None:
        return kernel, None
    return kernel, factors.mean_out - mm(factors.mean_in[None, :rank], right)[0]


def break_even(fan_in: int, fan_out: int) -> float:
    """Rank at which a factor pair has as many weights as the dense matrix."""
    return fan_in * fan_out / (fan_in + fan_out)
