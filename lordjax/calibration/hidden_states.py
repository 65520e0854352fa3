"""Hidden states: the residual stream between two blocks, batch by batch, in memory or on disk.

On disk, one batch at a time is in memory. The states before block ``i + 1`` are written beside
those before block ``i``. When they are complete they become an entry of the store, and the old ones
are deleted. So a run that was killed resumes at the first block that it did not finish.

A pass over the blocks::

    states = open_states(store, "statistics", shapes)
    if states.at is None: ...          # states[j] = ... for all j, states.commit(0)
    for i in range(states.at, layers):
        ...                            # read states[j], then states[j] = output of block i
        states.commit(i + 1)
    states.close()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lordjax.runtime import multihost
from lordjax.runtime.mesh import Mesh, from_local_rows, local_rows, to_local_rows
from lordjax.storage.disk_store import DiskStore, Stream
from lordjax.storage.store import Store


class States(Protocol):
    """Hidden states before one block, one array per batch.

    Attributes:
      at: number of that block; None before the first `commit`.
    """

    at: int | None

    def __getitem__(self, j: int) -> Any: ...
    def __setitem__(self, j: int, x: Any) -> None: ...
    def commit(self, at: int, *, keep: bool = False) -> None:
        """Makes the arrays that were set the states before block ``at``.

        Args:
          at: number of the block.
          keep: whether to keep the states before earlier blocks; else they are deleted.
        """
        ...

    def back(self, at: int) -> None:
        """Returns to the last kept states before block ``at`` or earlier; deletes later ones."""
        ...

    def close(self) -> None:
        """Deletes all states."""
        ...


class MemoryStates:
    """Hidden states in memory; setting a batch replaces it at once."""

    def __init__(self) -> None:
        self.at: int | None = None
        self._now: dict[int, Any] = {}
        self._kept: dict[int, dict[int, Any]] = {}

    def __getitem__(self, j: int) -> Any:
        return self._now[j]

    def __setitem__(self, j: int, x: Any) -> None:
        self._now[j] = x

    def commit(self, at: int, *, keep: bool = False) -> None:
        """Makes the arrays that were set the states before block ``at``."""
        self.at = at
        self._kept = {**self._kept, at: dict(self._now)} if keep else {}

    def back(self, at: int) -> None:
        """Returns to the last kept states before block ``at`` or earlier; deletes later ones."""
        self._kept = {kept: states for kept, states in self._kept.items() if kept <= at}
        self.at = max(self._kept)
        self._now = dict(self._kept[self.at])

    def close(self) -> None:
        """Deletes all states."""
        self._now, self._kept = {}, {}


class DiskStates:
    """Hidden states on disk; batches are set in their order, all of them before `commit`.

    Each of several processes stores the rows of its own devices. States are deleted only when all
    processes have the next ones, so that at any time all processes have some states in common.
    """

    def __init__(
        self, store: DiskStore, name: str, shapes: list[tuple[int, ...]], mesh: Mesh | None = None
    ):
        self._store, self._name, self._shapes, self._mesh = store, name, shapes, mesh
        self._stream: Stream | None = None
        self._arrays: Mapping[str, Any] = {}
        self.at: int | None = None
        found = self._all()
        if found:  # there may be two, if the process was killed before it deleted the older one
            self._open(found[-1])

    def __getitem__(self, j: int) -> Any:
        # The file is mapped only when it is read, because mapped pages count as used memory.
        rows = self._arrays[str(j)]
        if self._mesh is None:
            return jnp.asarray(rows)
        return from_local_rows(rows, self._shapes[j], self._mesh)

    def __setitem__(self, j: int, x: Any) -> None:
        if self._stream is None:
            own = [local_rows(shape, self._mesh) for shape in self._shapes]
            shapes = [
                jax.ShapeDtypeStruct((rows.stop - rows.start, *shape[1:]), jnp.float32)
                for rows, shape in zip(own, self._shapes, strict=True)
            ]
            self._stream = self._store.stream(f"{self._name}/writing", shapes)
        self._stream.add(to_local_rows(x, self._mesh))

    def commit(self, at: int, *, keep: bool = False) -> None:
        """Makes the arrays that were set the states before block ``at``."""
        if self._stream is not None:
            self._stream.close(f"{self._name}/{at}")
            self._stream = None
        multihost.barrier()
        if not keep:
            self._discard(lambda kept: kept != at)
        self._open(at)

    def back(self, at: int) -> None:
        """Returns to the last kept states before block ``at`` or earlier; deletes later ones."""
        self._discard(lambda kept: kept > at)
        self._open(max(self._all()))

    def close(self) -> None:
        """Deletes all states."""
        self._discard(lambda _: True)

    def _all(self) -> list[int]:
        """Blocks before which there are states, the oldest first."""
        return [int(key.rsplit("/", 1)[1]) for key in self._store.below(f"{self._name}/")]

    def _discard(self, which: Callable[[int], bool]) -> None:
        self._store.discard(*(f"{self._name}/{at}" for at in self._all() if which(at)))

    def _open(self, at: int) -> None:
        self.at, self._arrays = at, self._store.arrays(f"{self._name}/{at}")


class Shifted:
    """One of several residual streams: batches of `States` from ``start`` on, counted from 0."""

    def __init__(self, states: States, start: int):
        self._states, self._start = states, start

    def __getitem__(self, j: int) -> Any:
        return self._states[self._start + j]

    def __setitem__(self, j: int, x: Any) -> None:
        self._states[self._start + j] = x


def open_states(
    store: Store, name: str, shapes: list[tuple[int, ...]], mesh: Mesh | None = None
) -> States:
    """Opens the hidden states of a pass, where it stopped; on disk if the store is.

    Args:
      store: finished results of this and earlier processes.
      name: name of the pass in the store.
      shapes: shape of every batch.
      mesh: devices that split the batches; batches have to be laid out by `mesh.shard_batch`.
    """
    return DiskStates(store, name, shapes, mesh) if isinstance(store, DiskStore) else MemoryStates()
