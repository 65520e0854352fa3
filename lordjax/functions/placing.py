"""Where new arrays go: on the devices of the parameters that they belong to.

A parameter that is sharded by a `NamedSharding` says which axes of the mesh its inputs, its outputs
and its stack are split over. Factors and statistics are split over the same axes along the same
sides, where their sizes allow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lordjax.functions.equations.views import Matrix
from lordjax.kernels.base import Kernel
from lordjax.kernels.layout import Axes, dimensions
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.pruned import Pruned
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized

Entry = Any  # an axis of the mesh, several, or None


def placed_like(tree: Any, leaf: Any, matrix: Matrix | None = None) -> Any:
    """Returns arrays on the devices of a parameter.

    Args:
      tree: arrays on the host, or a kernel of them.
      leaf: the parameter that they replace; if it is a NumPy array, so are they.
      matrix: its axes as matrices; None: the arrays have the parameter's shape, or go everywhere.
    """
    if isinstance(leaf, np.ndarray):
        return jax.tree.map(np.asarray, tree)
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(jnp.asarray, tree)
    if matrix is None:
        same = getattr(tree, "shape", None) == leaf.shape and not isinstance(tree, Kernel)
        spec = sharding.spec if same else PartitionSpec()
        return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(sharding.mesh, spec)), tree)
    specs = _specs(tree, *sides(leaf, matrix))
    mesh = sharding.mesh
    return jax.tree.map(
        lambda a, spec: jax.device_put(a, fitting_sharding(mesh, a.shape, spec)),
        tree,
        jax.tree.unflatten(jax.tree.structure(tree), specs),
    )


def sides(leaf: Any, matrix: Matrix) -> tuple[tuple[Entry, ...], Entry, Entry]:
    """Returns the axes of the mesh that split a parameter's stack, its inputs and its outputs."""
    entries = [*leaf.sharding.spec, *[None] * leaf.ndim][: leaf.ndim]
    pairs = [
        (axes[0], entry)
        for axes, entry in zip(dimensions(leaf.shape), entries, strict=True)
        if axes and entry is not None
    ]

    def split(own: Axes) -> Entry:
        for axis, entry in pairs:  # the outermost part of the side
            if own and axis[0] * axis[1] == own[0][0] * own[0][1] and axis[1] >= own[0][1]:
                return entry
        return None

    stack = tuple(split((axis,)) for axis in matrix.stack)
    return stack, split(matrix.rows), split(matrix.cols)


def _specs(tree: Any, stack: tuple[Entry, ...], rows: Entry, cols: Entry) -> list[Any]:
    """Returns how each array of a kernel is split, in the order of its leaves."""
    match tree:
        case LowRank():
            left = _specs(tree.left, stack, rows, None)
            return [*left, *_specs(tree.right, stack, None, cols)]
        case LowRankPlusQuantized():
            base = _specs(tree.base, stack, rows, cols)
            return [*base, *_specs(tree.low_rank, stack, rows, cols)]
        case Pruned():
            return _specs(tree.kernel, stack, rows, cols)
        case NFQuantized():
            words = PartitionSpec(*stack, rows if cols is None else cols)
            return [words, words, words, PartitionSpec(*stack)]
    return [PartitionSpec(*stack, rows, cols)]


def fitting_sharding(mesh: Any, shape: Sequence[int], spec: PartitionSpec) -> NamedSharding:
    """Returns a sharding with those entries of a spec that divide the dimensions evenly."""

    def shards(entry: Entry) -> int:
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        return math.prod(mesh.shape[name] for name in names)

    entries = [e if n % shards(e) == 0 else None for n, e in zip(shape, spec, strict=False)]
    return NamedSharding(mesh, PartitionSpec(*entries))


def statistic_shardings(zeros: Any, leaf: Any, matrix: Matrix, fan_in: int) -> Any:
    """Returns the shardings of a site's statistics, or None if its parameter is on one device.

    Args:
      zeros: the statistics.
      leaf: the parameter.
      matrix: its axes as matrices.
      fan_in: number of inputs.
    """
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    stack, rows, cols = sides(leaf, matrix)

    def one(a: Any) -> NamedSharding:
        width = a.shape[len(stack)] if a.ndim > len(stack) else 0
        first, other = (rows, cols) if width == fan_in else (cols, rows)
        spec = PartitionSpec(*stack, first if first is not None else other)
        return fitting_sharding(sharding.mesh, a.shape, spec)

    return jax.tree.map(one, zeros)


def on_host(tree: Any) -> Any:
    """Returns arrays that several devices share as NumPy arrays; others as they are."""

    def local(a: Any) -> Any:
        sharding = getattr(a, "sharding", None)
        return np.asarray(a) if sharding is not None and len(sharding.device_set) > 1 else a

    return jax.tree.map(local, tree)
