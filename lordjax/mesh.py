"""Devices: meshes, and where arrays lie on them. The only module that knows devices.

Training is data parallel and fully sharded: one axis of devices, over which the rows of a batch are
shared out and, on their longest axis that divides, the arrays of the model and of the optimiser.

Calibration shares out rows over the axis ``data`` and, of a model too big for one device, a block's
matrices over the axis ``model``. Matrices are factored one on each device.

The compiler inserts what is sent between devices.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS, MODEL = "data", "model"
Job = TypeVar("Job")

# Which axis of a block's parameter is shared out over `MODEL`; the first match counts, others lie
# everywhere. Layers side by side are cut by their outputs, those behind them by their inputs, so
# that only the residual stream is summed over devices.
RULES = (
    (r"attention/[qkv]/kernel|mlp/(gate|up)/kernel", 1),
    (r"attention/[qkv]/bias|mlp/(gate|up)/bias", 0),
    (r"attention/o/kernel|mlp/down/kernel", 0),
)


def parse(text: str) -> dict[str, int]:
    """Sizes of axes, from text like ``data=4`` or ``data=2,model=2``.

    Raises:
      ValueError: if it is no such text.
    """
    axes = {}
    for item in text.split(","):
        found = re.fullmatch(r"(data|model)=([1-9]\d*)", item.strip())
        if found is None or found[1] in axes:
            raise ValueError(f"mesh {text!r}: expected data=N, model=N or both, such as data=4")
        axes[found[1]] = int(found[2])
    return axes


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """The first devices, as many as the axes take; ``{"data": 4}``: four in a row.

    Raises:
      ValueError: if there are not so many.
    """
    devices, count = jax.devices(), int(np.prod(list(axes.values())))
    if not 1 <= count <= len(devices):
        raise ValueError(f"{count} devices asked for; there are {len(devices)}")
    grid = np.array(devices[:count]).reshape(tuple(axes.values()))
    # Explicit axes, the default of jax, refuse products over a sharded axis.
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def share_rows(x: Any, mesh: Mesh | None) -> Any:
    """A batch with its rows shared out over `AXIS`, if they divide; else on all devices.

    Without a mesh, as it is.
    """
    if mesh is None:
        return x
    even = AXIS in mesh.shape and x.shape[0] % mesh.shape[AXIS] == 0
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(AXIS if even else None)))


def share_block(arrays: Mapping[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """A block's parameters by path, laid out by `RULES` if there is an axis `MODEL`."""
    if mesh is None or MODEL not in mesh.shape:
        return dict(arrays)  # the compiler copies them where they are needed

    def sharding(path: str, a: Any) -> NamedSharding:
        axis = next((axis for rule, axis in RULES if re.fullmatch(rule, path)), None)
        spec: list[str | None] = [None] * a.ndim
        if axis is not None and a.shape[axis] % mesh.shape[MODEL] == 0:
            spec[axis] = MODEL
        return NamedSharding(mesh, PartitionSpec(*spec))

    return {path: jax.device_put(a, sharding(path, a)) for path, a in arrays.items()}


def gathered(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that lie on several devices, on the host, from where any device takes them."""
    return tree if mesh is None else jax.tree.map(np.asarray, tree)


def map_kernels(
    run: Callable[[Job], Any], jobs: Iterable[Job], mesh: Mesh | None
) -> Iterator[tuple[Job, Any]]:
    """``(job, run(job))`` for every job, in order; as many at a time as the mesh has devices.

    Args:
      run: starts a job on the default device, with arguments that no device holds fast.
      jobs: anything, such as a site to factor.
      mesh: whose devices take turns; None: one job after the other where it is.
    """
    if mesh is None:
        yield from ((job, run(job)) for job in jobs)
        return
    devices, jobs = list(mesh.devices.flat), iter(jobs)
    while started := list(zip(itertools.islice(jobs, len(devices)), devices, strict=False)):
        running = []
        for job, device in started:
            with jax.default_device(device):
                running.append((job, run(job)))  # returns before it is finished
        yield from running


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
