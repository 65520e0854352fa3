"""Stores of finished results under keys, in memory or on disk (`disk_store`)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from lordjax.runtime import json_files


class Store(Protocol):
    """The interface that `MemoryStore` and `DiskStore` implement.

    Attributes:
      durable: whether entries survive the process.
    """

    durable: bool

    def __contains__(self, key: str) -> bool: ...
    def __getitem__(self, key: str) -> Any: ...
    def __setitem__(self, key: str, tree: Any) -> None: ...
    def below(self, prefix: str) -> list[str]:
        """Returns the keys with a prefix, oldest first."""
        ...

    def release(self, key: str) -> None:
        """Frees the memory of an entry that this process will not read again."""
        ...


class MemoryStore:
    """A store in memory."""

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
        """Returns the keys with a prefix, oldest first."""
        return [key for key in self._entries if key.startswith(prefix)]

    def release(self, key: str) -> None:
        """Removes an entry."""
        self._entries.pop(key, None)


class Entries(Mapping[Any, Any]):
    """A mapping of the entries below a prefix: key ``layer_0/mlp`` reads ``factors/layer_0/mlp``.

    Args:
      store: the store of the entries.
      prefix: first part of their keys, here ``factors``.
      kind: type of the mapping's keys, text or numbers.
    """

    def __init__(self, store: Store, prefix: str, kind: type[str] | type[int] = str):
        self._store, self._prefix, self._kind = store, prefix, kind

    def __getitem__(self, key: Any) -> Any:
        if key not in self:
            raise KeyError(key)
        return self._store[f"{self._prefix}/{key}"]

    def __contains__(self, key: object) -> bool:
        return f"{self._prefix}/{key}" in self._store

    def __iter__(self) -> Iterator[Any]:
        start = f"{self._prefix}/"
        keys = self._store.below(start)
        return (self._kind(key.removeprefix(start)) for key in keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def get_or_compute(store: Store, key: str, compute: Callable[[], Any]) -> Any:
    """Returns an entry; computes and stores it first if it is missing."""
    if key not in store:
        store[key] = compute()
    return store[key]


def digest(*values: Any) -> str:
    """Returns a short checksum of JSON values, to tell apart entries made with other options."""
    return f"{zlib.crc32(json_files.dumps(values, sort_keys=True).encode()):08x}"
