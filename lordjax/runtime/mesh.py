"""Devices: meshes, and where arrays lie on them. The only module that knows devices.

Training is data parallel and fully sharded: one axis of devices, over which the rows of a batch are
shared out and, on their longest axis that divides, the arrays of the model and of the optimiser.

Calibration shares out rows over the axis ``data`` and, of a model too big for one device, a block's
matrices over the axis ``model``. Matrices of as many blocks as there are devices are factored
together, each on one device.

The compiler inserts what is sent between devices. Those of several processes (`hosts`) form one
mesh: of an array every process holds what lies on its own devices.
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

AXIS, MODEL = "data", "model"
Task = TypeVar("Task")

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
      ValueError: if there are not so many, or they leave out some of other processes.
    """
    devices, count = jax.devices(), int(np.prod(list(axes.values())))
    if not 1 <= count <= len(devices):
        raise ValueError(f"{count} devices asked for; there are {len(devices)}")
    if multihost.count() > 1 and count < len(devices):
        raise ValueError(
            f"{count} devices asked for; the {multihost.count()} processes have {len(devices)}, "
            "all of which must take part"
        )
    # The rows of a process lie side by side.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(devices[:count]).reshape(tuple(axes.values()))
    # Explicit axes, the default of jax, refuse products over a sharded axis.
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def _place(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array that lies on the devices of a sharding, or of which every process has all."""
    spread = isinstance(array, jax.Array) and not array.is_fully_addressable
    if spread or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def shares(rows: int, mesh: Mesh | None) -> int:
    """Into how many parts `share_rows` cuts a batch: as many as `AXIS` has, or one."""
    count = 1 if mesh is None else mesh.shape.get(AXIS, 1)
    return 1 if rows % count else count


def _row_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    even = AXIS in mesh.shape and shape[0] % mesh.shape[AXIS] == 0
    return NamedSharding(mesh, PartitionSpec(AXIS if even else None))


def shard_batch(x: Any, mesh: Mesh | None) -> Any:
    """A batch with its rows shared out over `AXIS`, if they divide; else on all devices.

    Without a mesh, as it is.
    """
    return x if mesh is None else _place(x, _row_sharding(x.shape, mesh))


def shard_map_batch(run: Callable[..., Any], rows: int, mesh: Mesh | None) -> Callable[..., Any]:
    """``run(parameters, *batches)``, each device on its own rows: for loops over rows.

    The compiler would have every device run such a loop over all of them.
    """
    if mesh is None or shares(rows, mesh) == 1:
        return run

    def each(parameters: Any, *batches: Any) -> Any:
        specs = (PartitionSpec(), *[PartitionSpec(AXIS)] * len(batches))
        out = PartitionSpec(AXIS)
        own = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        return own(parameters, *batches)

    return each


def own_rows(shape: tuple[int, ...], mesh: Mesh | None) -> slice:
    """Which rows of a batch of `share_rows` lie in this process."""
    if mesh is None:
        return slice(0, shape[0])
    indices = _row_sharding(shape, mesh).addressable_devices_indices_map(shape).values()
    rows = [(index or (slice(None),))[0].indices(shape[0]) for index in indices]
    return slice(min(row[0] for row in rows), max(row[1] for row in rows))


def take_rows(x: Any, mesh: Mesh | None) -> Any:
    """`own_rows` of a batch of `share_rows`, on the host; without a mesh all, where they are."""
    if mesh is None:
        return x
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def give_rows(rows: Any, shape: tuple[int, ...], mesh: Mesh | None) -> Any:
    """The batch of a shape of which every process has `own_rows`."""
    if mesh is None:
        return rows
    first = own_rows(shape, mesh).start

    def part(index: Any) -> Any:
        start, stop, _ = index[0].indices(shape[0])
        return rows[start - first : stop - first]

    return jax.make_array_from_callback(shape, _row_sharding(shape, mesh), part)


def is_model_sharded(mesh: Mesh | None) -> TypeGuard[Mesh]:
    """Whether blocks are cut into parts; else the compiler copies them where they are needed."""
    return mesh is not None and MODEL in mesh.shape


def shard_params(arrays: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """A block's parameters by path, laid out by `RULES` over the axis `MODEL`."""

    def sharding(path: str, a: Any) -> NamedSharding:
        axis = next((axis for rule, axis in RULES if re.fullmatch(rule, path)), None)
        spec: list[str | None] = [None] * a.ndim
        if axis is not None and a.shape[axis] % mesh.shape[MODEL] == 0:
            spec[axis] = MODEL
        return NamedSharding(mesh, PartitionSpec(*spec))

    return {path: _place(a, sharding(path, a)) for path, a in arrays.items()}


def gathered(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that lie on several devices, on the host, from where any device takes them."""
    if mesh is None:
        return tree

    def whole(a: Any) -> np.ndarray:
        spread = isinstance(a, jax.Array) and not (a.is_fully_addressable or a.is_fully_replicated)
        return np.asarray(_place(a, NamedSharding(mesh, PartitionSpec())) if spread else a)

    return jax.tree.map(whole, tree)


def share_tasks(costs: Mapping[Task, float], count: int) -> list[list[Task]]:
    """The jobs of each of so many devices, in the order in which it does them.

    The largest job that is left goes to the device with the least work so far, of equal ones the
    first: at most 4/3 of the best that is possible (Graham 1969), the same in every process.

    Args:
      costs: job -> its work.
      count: of devices.
    """
    shares: list[list[Task]] = [[] for _ in range(count)]
    sums = [0.0] * count
    for job in sorted(costs, key=lambda job: -costs[job]):
        k = sums.index(min(sums))
        shares[k].append(job)
        sums[k] += costs[job]
    return shares


def own_tasks(shares: Sequence[Sequence[Task]], mesh: Mesh) -> set[Task]:
    """Those of `share_jobs` that devices of this process do."""
    pairs = zip(shares, mesh.devices.flat, strict=True)
    return {
        j for jobs, device in pairs if device.process_index == multihost.process() for j in jobs
    }


def map_kernels(
    run: Callable[[Task], Any], shares: Sequence[Sequence[Task]], mesh: Mesh | None
) -> Iterator[tuple[Task, Any]]:
    """``(job, run(job))`` for every job; as many at a time as the mesh has devices, on CPU one.

    Args:
      run: starts a job on the default device, with arguments that no device holds fast; returns a
        tree of arrays. Of jobs of other processes it is only traced.
      shares: what each device does, in order (`share_jobs`), such as sites to factor.
      mesh: the devices; None: one job after the other where it is. With several processes, each
        runs those of its devices, and all get all results.
    """
    if mesh is None:
        yield from ((job, run(job)) for share in shares for job in share)
        return
    devices = list(mesh.devices.flat)
    for turn in range(max(map(len, shares))):
        pairs = zip(shares, devices, strict=True)
        started = [(share[turn], device) for share, device in pairs if turn < len(share)]
        running = []
        for job, device in started:
            if device.process_index == multihost.process():
                with jax.default_device(device):
                    running.append(run(job))  # returns before it is finished
                if device.platform == "cpu":
                    # Its devices share cores, and of programs with loops and large products that
                    # run at once a product lacks a part now and then (docs/pages/tried.md).
                    jax.block_until_ready(running[-1])
            else:
                running.append(jax.eval_shape(functools.partial(run, job)))
        owners = [device.process_index for _, device in started]
        yield from zip((job for job, _ in started), _exchanged(running, owners), strict=True)


def _exchanged(trees: list[Any], owners: list[int]) -> list[Any]:
    """Trees of arrays, on the host where there are several processes.

    Args:
      trees: arrays of this process, shapes and dtypes of others.
      owners: which process has the arrays.
    """
    if multihost.count() == 1:
        return trees
    own = [tree for tree, owner in zip(trees, owners, strict=True) if owner == jax.process_index()]
    data = multihost.gather(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(own)))
    at = [0] * len(data)

    def read(a: Any, owner: int) -> np.ndarray:
        array = np.frombuffer(data[owner], a.dtype, int(np.prod(a.shape)), at[owner])
        at[owner] += array.nbytes
        return array.reshape(a.shape)

    return [
        jax.tree.map(functools.partial(read, owner=owner), tree)
        for tree, owner in zip(trees, owners, strict=True)
    ]


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
