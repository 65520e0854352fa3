"""Devices: meshes, and where arrays lie on them. The only module that knows devices.

Training is data parallel and fully sharded: one axis of devices, over which the rows of a batch are
shared out and, on their longest axis that divides, the arrays of the model and of the optimiser.
The compiler inserts what is sent between devices.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def make_mesh(count: int) -> Mesh:
    """The first ``count`` devices as one axis.

    Raises:
      ValueError: if there are not so many.
    """
    devices = jax.devices()
    if not 1 <= count <= len(devices):
        raise ValueError(f"{count} devices asked for; there are {len(devices)}")
    # Explicit axes, the default of jax, refuse products over a sharded axis.
    return Mesh(np.array(devices[:count]), (AXIS,), axis_types=(AxisType.Auto,))


def fully_sharded(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every array: along its longest axis that divides, else a copy everywhere."""

    def sharding(array: Any) -> NamedSharding:
        sizes = [size if size % mesh.size == 0 else 0 for size in array.shape]
        spec: list[str | None] = [None] * len(sizes)
        if any(sizes):
            spec[int(np.argmax(sizes))] = AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, tree)


def rows_sharded(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """A sharding for every array of a batch: its rows, on ``axis``, shared out.

    Raises:
      ValueError: if the number of rows is no multiple of the number of devices.
    """

    def sharding(array: Any) -> NamedSharding:
        if array.shape[axis] % mesh.size:
            raise ValueError(
                f"{array.shape[axis]} rows for {mesh.size} devices; expected a multiple"
            )
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))

    return jax.tree.map(sharding, tree)


def put(tree: Any, shardings: Any) -> Any:
    """Every array where its sharding says."""
    return jax.tree.map(jax.device_put, tree, shardings)
