"""Device meshes, and the placement of arrays and tasks on devices.

Training is fully sharded data parallelism (FSDP): batches are split over the axis ``data``. Every
parameter and optimizer array is sharded along its longest divisible axis.

Calibration splits batches over ``data``. For a model that is too large for one device it also
splits the matrices of a block over ``model``. With N devices the matrices of N blocks are factored
together, each matrix on one device.

XLA inserts the collectives. With several processes (`multihost`) there is one global mesh, and each
process holds the shards of its own devices.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lordjax.runtime import multihost

DATA_AXIS, MODEL_AXIS = "data", "model"
Task = TypeVar("Task")

# Axis along which a parameter of a block is sharded over `MODEL_AXIS`. The first match counts;
# other parameters are replicated. The first layers of attention and MLP are split by outputs and
# the last ones by inputs, so that only the residual stream is summed over devices.
RULES = (
    (r"attention/[qkv]/kernel|mlp/(gate|up)/kernel", 1),
    (r"attention/[qkv]/bias|mlp/(gate|up)/bias", 0),
    (r"attention/o/kernel|mlp/down/kernel", 0),
)


def parse(text: str) -> dict[str, int]:
    """Returns the sizes of a mesh's axes, from text like ``data=4`` or ``data=2,model=2``.

    Raises:
      ValueError: if the text has another form, an unknown axis, or one axis twice.
    """
    axes = {}
    for item in text.split(","):
        found = re.fullmatch(r"(data|model)=([1-9]\d*)", item.strip())
        if found is None or found[1] in axes:
            raise ValueError(f"mesh {text!r}: expected data=N, model=N or both, such as data=4")
        axes[found[1]] = int(found[2])
    return axes


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """Returns a mesh of the first devices: ``{"data": 4}`` gives a mesh of four.

    Args:
      axes: axis name (``data``, ``model``) -> number of devices along it.

    Raises:
      ValueError: if there are too few devices, or if with several processes the mesh leaves some
        devices out.
    """
    devices, count = jax.devices(), int(np.prod(list(axes.values())))
    if not 1 <= count <= len(devices):
        raise ValueError(
            f"{count} devices asked for; there are {len(devices)}: expected 1 to {len(devices)}"
        )
    if multihost.process_count() > 1 and count < len(devices):
        raise ValueError(
            f"{count} devices asked for; expected {len(devices)}, all devices of the "
            f"{multihost.process_count()} processes"
        )
    # Sorted by process, so that the rows of a batch in one process are contiguous.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(devices[:count]).reshape(tuple(axes.values()))
    # Explicit axes, JAX's default, refuse matrix products over a sharded axis.
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def _device_put(array: Any, sharding: NamedSharding) -> jax.Array:
    """Puts an array on the devices of a sharding.

    With several processes, each must have the whole array unless it is a global one.
    """
    spread = isinstance(array, jax.Array) and not array.is_fully_addressable
    if spread or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def num_shards(rows: int, mesh: Mesh | None) -> int:
    """Returns the number of shards that `shard_batch` makes of a batch: size of the axis, or 1."""
    count = 1 if mesh is None else mesh.shape.get(DATA_AXIS, 1)
    return 1 if rows % count else count


def _row_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    even = DATA_AXIS in mesh.shape and shape[0] % mesh.shape[DATA_AXIS] == 0
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS if even else None))


def shard_batch(x: Any, mesh: Mesh | None) -> Any:
    """Shards a batch along its rows over `DATA_AXIS`; replicates it if they do not divide evenly.

    Without a mesh the batch is returned unchanged.
    """
    return x if mesh is None else _device_put(x, _row_sharding(x.shape, mesh))


def shard_map_batch(run: Callable[..., Any], rows: int, mesh: Mesh | None) -> Callable[..., Any]:
    """Returns ``run(parameters, *batches)`` such that each device runs it on its own rows.

    It is meant for functions that loop over rows: the compiler does not partition a loop, so every
    device would loop over all rows.
    """
    if mesh is None or num_shards(rows, mesh) == 1:
        return run

    def each(parameters: Any, *batches: Any) -> Any:
        specs = (PartitionSpec(), *[PartitionSpec(DATA_AXIS)] * len(batches))
        out = PartitionSpec(DATA_AXIS)
        own = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        return own(parameters, *batches)

    return each


def local_rows(shape: tuple[int, ...], mesh: Mesh | None) -> slice:
    """Returns which rows of a batch from `shard_batch` lie in this process."""
    if mesh is None:
        return slice(0, shape[0])
    indices = _row_sharding(shape, mesh).addressable_devices_indices_map(shape).values()
    rows = [(index or (slice(None),))[0].indices(shape[0]) for index in indices]
    return slice(min(row[0] for row in rows), max(row[1] for row in rows))


def to_local_rows(x: Any, mesh: Mesh | None) -> Any:
    """Returns the rows of a sharded batch that lie in this process, on the host.

    Without a mesh the batch is returned unchanged.
    """
    if mesh is None:
        return x
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def from_local_rows(rows: Any, shape: tuple[int, ...], mesh: Mesh | None) -> Any:
    """Returns the global batch of a shape, from the rows of this process (`local_rows`)."""
    if mesh is None:
        return rows
    first = local_rows(shape, mesh).start

    def part(index: Any) -> Any:
        start, stop, _ = index[0].indices(shape[0])
        return rows[start - first : stop - first]

    return jax.make_array_from_callback(shape, _row_sharding(shape, mesh), part)


def is_model_sharded(mesh: Mesh | None) -> TypeGuard[Mesh]:
    """Returns whether blocks are sharded over `MODEL_AXIS`; otherwise they are replicated."""
    return mesh is not None and MODEL_AXIS in mesh.shape


def shard_params(arrays: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Shards a block's parameters, by path, over `MODEL_AXIS` as `RULES` say."""

    def sharding(path: str, a: Any) -> NamedSharding:
        axis = next((axis for rule, axis in RULES if re.fullmatch(rule, path)), None)
        spec: list[str | None] = [None] * a.ndim
        if axis is not None and a.shape[axis] % mesh.shape[MODEL_AXIS] == 0:
            spec[axis] = MODEL_AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return {path: _device_put(a, sharding(path, a)) for path, a in arrays.items()}


def to_host(tree: Any, mesh: Mesh | None) -> Any:
    """Copies arrays that lie on several devices to the host, where any device can read them."""
    if mesh is None:
        return tree

    def whole(a: Any) -> np.ndarray:
        spread = isinstance(a, jax.Array) and not (a.is_fully_addressable or a.is_fully_replicated)
        return np.asarray(_device_put(a, NamedSharding(mesh, PartitionSpec())) if spread else a)

    return jax.tree.map(whole, tree)


def assign_tasks(costs: Mapping[Task, float], count: int) -> list[list[Task]]:
    """Assigns tasks to devices: the largest remaining task goes to the least loaded device.

    The largest load is at most 4/3 of the optimum (Graham 1969). Ties go to the first device, so
    every process computes the same assignment.

    Args:
      costs: task -> its cost, in any unit.
      count: number of devices.

    Returns:
      For every device its tasks, in the order in which it runs them.
    """
    shares: list[list[Task]] = [[] for _ in range(count)]
    sums = [0.0] * count
    for task in sorted(costs, key=lambda task: -costs[task]):
        k = sums.index(min(sums))
        shares[k].append(task)
        sums[k] += costs[task]
    return shares


def local_tasks(shares: Sequence[Sequence[Task]], mesh: Mesh) -> set[Task]:
    """Returns the tasks that `assign_tasks` gave to devices of this process."""
    pairs = zip(shares, mesh.devices.flat, strict=True)
    return {
        j
        for tasks, device in pairs
        if device.process_index == multihost.process_index()
        for j in tasks
    }


def run_tasks(
    run: Callable[[Task], Any], shares: Sequence[Sequence[Task]], mesh: Mesh | None
) -> Iterator[tuple[Task, Any]]:
    """Yields ``(task, run(task))`` for every task; on accelerators all devices work at once.

    With several processes, each runs the tasks of its own devices and receives all results.

    Args:
      run: starts a task on the default device and returns a tree of arrays. Its arguments must not
        be committed to a device. For tasks of other processes it is only traced.
      shares: tasks of each device, in order, from `assign_tasks`; for example sites to factor.
      mesh: the devices; None runs one task after the other on the current device.
    """
    if mesh is None:
        yield from ((task, run(task)) for share in shares for task in share)
        return
    devices = list(mesh.devices.flat)
    for turn in range(max(map(len, shares))):
        pairs = zip(shares, devices, strict=True)
        started = [(share[turn], device) for share, device in pairs if turn < len(share)]
        running = []
        for task, device in started:
            if device.process_index == multihost.process_index():
                with jax.default_device(device):
                    running.append(run(task))  # returns before the results are computed
                if device.platform == "cpu":
                    # CPU devices share cores. Programs with loops and large matrix products that
                    # run at the same time sometimes give wrong products (docs/pages/tried.md).
                    jax.block_until_ready(running[-1])
            else:
                running.append(jax.eval_shape(functools.partial(run, task)))
        owners = [device.process_index for _, device in started]
        yield from zip(
            (task for task, _ in started), _all_gather_trees(running, owners), strict=True
        )


def _all_gather_trees(trees: list[Any], owners: list[int]) -> list[Any]:
    """Returns trees of arrays from all processes; on the host if there are several.

    Args:
      trees: arrays of this process, and ``ShapeDtypeStruct`` in place of those of others.
      owners: for every tree the index of the process that has its arrays.
    """
    if multihost.process_count() == 1:
        return trees
    own = [tree for tree, owner in zip(trees, owners, strict=True) if owner == jax.process_index()]
    data = multihost.all_gather_bytes(
        b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(own))
    )
    at = [0] * len(data)

    def read(a: Any, owner: int) -> np.ndarray:
        array = np.frombuffer(data[owner], a.dtype, int(np.prod(a.shape)), at[owner])
        at[owner] += array.nbytes
        return array.reshape(a.shape)

    return [
        jax.tree.map(functools.partial(read, owner=owner), tree)
        for tree, owner in zip(trees, owners, strict=True)
    ]


def fsdp_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns FSDP shardings: along the longest divisible axis of every array, else replicated."""

    def sharding(array: Any) -> NamedSharding:
        sizes = [size if size % mesh.size == 0 else 0 for size in array.shape]
        spec: list[str | None] = [None] * len(sizes)
        if any(sizes):
            spec[int(np.argmax(sizes))] = DATA_AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, tree)


def batch_shardings(tree: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Returns a sharding for every array of a batch: along its rows, which are on ``axis``.

    Raises:
      ValueError: if the number of rows is not a multiple of the number of devices.
    """

    def sharding(array: Any) -> NamedSharding:
        if array.shape[axis] % mesh.size:
            raise ValueError(
                f"a batch of {array.shape[axis]} rows for {mesh.size} devices; expected a multiple "
                f"of {mesh.size}"
            )
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA_AXIS))

    return jax.tree.map(sharding, tree)


def put(tree: Any, shardings: Any) -> Any:
    """Moves every array to its sharding."""
    return jax.tree.map(jax.device_put, tree, shardings)
