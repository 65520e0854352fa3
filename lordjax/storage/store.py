"""Where long work keeps what is finished, as entries under keys: in memory, or in a `workspace`."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol


class Store(Protocol):
    """What `Memory` and `Workspace` have in common."""

    durable: bool

    def __contains__(self, key: str) -> bool: ...
    def __getitem__(self, key: str) -> Any: ...
    def __setitem__(self, key: str, tree: Any) -> None: ...
    def below(self, prefix: str) -> list[str]:
        """Keys that begin like that, the oldest first."""
        ...

    def release(self, key: str) -> None:
        """This process will not read an entry again: frees the memory that it takes."""
        ...


class MemoryStore:
    """Entries in memory."""

    durable = False

    def __init__(self) -> None:
        self._entries: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __setitem__(self, key: str, tree: Any) -> None:
        self._entries[key] = tree

    def below(self, prefix: str) -> list[str]:
        """Keys that begin like that, the oldest first."""
        return [key for key in self._entries if key.startswith(prefix)]

    def release(self, key: str) -> None:
        """Forgets an entry."""
        self._entries.pop(key, None)


class Entries(Mapping[Any, Any]):
    """The entries below a prefix as a mapping: ``factors/layer_0/mlp`` at ``layer_0/mlp``.

    Args:
      store: where they are.
      prefix: of their keys.
      kind: what their keys are: text, or numbers.
    """

    def __init__(self, store: Store, prefix: str, kind: type[str] | type[int] = str):
        self._work, self._prefix, self._kind = store, prefix, kind

    def __getitem__(self, key: Any) -> Any:
        if key not in self:
            raise KeyError(key)
        return self._work[f"{self._prefix}/{key}"]

    def __contains__(self, key: object) -> bool:
        return f"{self._prefix}/{key}" in self._work

    def __iter__(self) -> Iterator[Any]:
        start = f"{self._prefix}/"
        keys = self._work.below(start)
        return (self._kind(key.removeprefix(start)) for key in keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def get_or_compute(store: Store, key: str, compute: Callable[[], Any]) -> Any:
    """An entry, computed if it is not there."""
    if key not in store:
        store[key] = compute()
    return store[key]


def digest(*values: Any) -> str:
    """A short name for what some JSON says, to tell apart entries made with other options."""
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"
