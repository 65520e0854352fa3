"""The residual stream between two blocks, batch by batch: in memory, or on disk.

On disk one batch at a time is in memory. The states before block ``i + 1`` are written beside those
before block ``i``; once they are complete they are an entry of the workspace, and the old ones
go. So a run that was killed goes on before the first block that it did not finish.

A pass over the blocks::

    states = open_states(work, "statistics", shapes)
    if states.at is None: ...          # states[j] = ... for all j, states.commit(0)
    for i in range(states.at, layers):
        ...                            # read states[j], then states[j] = block's output
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
    """Hidden states before one block, an array per batch.

    Attributes:
      at: number of the block; None before the first `commit`.
    """

    at: int | None

    def __getitem__(self, j: int) -> Any: ...
    def __setitem__(self, j: int, x: Any) -> None: ...
    def commit(self, at: int, *, keep: bool = False) -> None:
        """What was set are the states before block ``at``; the others go, unless kept."""
        ...

    def back(self, at: int) -> None:
        """Goes back to the last states that were kept up to block ``at``; later ones go."""
        ...

    def close(self) -> None:
        """Removes all of them."""
        ...


class MemoryStates:
    """In memory; setting a batch replaces it at once."""

    def __init__(self) -> None:
        self.at: int | None = None
        self._now: dict[int, Any] = {}
        self._kept: dict[int, dict[int, Any]] = {}

    def __getitem__(self, j: int) -> Any:
        return self._now[j]

    def __setitem__(self, j: int, x: Any) -> None:
        self._now[j] = x

    def commit(self, at: int, *, keep: bool = False) -> None:
        """See `States`."""
        self.at = at
        self._kept = {**self._kept, at: dict(self._now)} if keep else {}

    def back(self, at: int) -> None:
        """See `States`."""
        self._kept = {kept: states for kept, states in self._kept.items() if kept <= at}
        self.at = max(self._kept)
        self._now = dict(self._kept[self.at])

    def close(self) -> None:
        """See `States`."""
        self._now, self._kept = {}, {}


class DiskStates:
    """On disk; batches are set in their order, all of them before `commit`.

    Each of several processes keeps the rows that lie on its devices. States go only when all of
    them have the next ones, so that there are always some that all have.
    """

    def __init__(
        self, store: DiskStore, name: str, shapes: list[tuple[int, ...]], mesh: Mesh | None = None
    ):
        self._work, self._name, self._shapes, self._mesh = store, name, shapes, mesh
        self._stream: Stream | None = None
        self._file: Mapping[str, Any] = {}
        self.at: int | None = None
        found = self._all()
        if found:  # the last one, if it was killed before the one before could go
            self._open(found[-1])

    def __getitem__(self, j: int) -> Any:
        # Mapped when it is asked for: what stays mapped counts as memory.
        rows = self._file[str(j)]
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
            self._stream = self._work.stream(f"{self._name}/writing", shapes)
        self._stream.add(to_local_rows(x, self._mesh))

    def commit(self, at: int, *, keep: bool = False) -> None:
        """See `States`."""
        if self._stream is not None:
            self._stream.close(f"{self._name}/{at}")
            self._stream = None
        multihost.barrier()
        if not keep:
            self._discard(lambda kept: kept != at)
        self._open(at)

    def back(self, at: int) -> None:
        """See `States`."""
        self._discard(lambda kept: kept > at)
        self._open(max(self._all()))

    def close(self) -> None:
        """See `States`."""
        self._discard(lambda _: True)

    def _all(self) -> list[int]:
        """The blocks before which there are states, the oldest first."""
        return [int(key.rsplit("/", 1)[1]) for key in self._work.below(f"{self._name}/")]

    def _discard(self, which: Callable[[int], bool]) -> None:
        self._work.discard(*(f"{self._name}/{at}" for at in self._all() if which(at)))

    def _open(self, at: int) -> None:
        self.at, self._file = at, self._work.arrays(f"{self._name}/{at}")


class Shifted:
    """A part of the batches of some states, counted from 0: one of several streams."""

    def __init__(self, states: States, start: int):
        self._states, self._start = states, start

    def __getitem__(self, j: int) -> Any:
        return self._states[self._start + j]

    def __setitem__(self, j: int, x: Any) -> None:
        self._states[self._start + j] = x


def open_states(
    store: Store, name: str, shapes: list[tuple[int, ...]], mesh: Mesh | None = None
) -> States:
    """The states of one pass, where it was left; on disk if that is where the work is.

    Args:
      store: what is kept so far.
      name: of the pass.
      shapes: of the batches.
      mesh: devices that share their rows; batches are to be set as `mesh.share_rows` lays them out.
    """
    return DiskStates(store, name, shapes, mesh) if isinstance(store, DiskStore) else MemoryStates()
