"""A model that is written part by part: what is outside the blocks, and every block.

A part is one safetensors file (several, if it is larger than a limit). What reading it takes -
names, kinds of kernels - goes where finished work is kept, so that a run that was killed goes on
with the next part. The files get their last names when all are there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lordjax.allocation.plan import Plan
from lordjax.kernels import base, normal_float, trees
from lordjax.kernels.base import Kernel, nbytes
from lordjax.kernels.kinds import kind_of
from lordjax.storage.store import Store, get_or_compute
from lordjax.storage.tensor_files import Written, checksum, sync_directory, write_tensors

REST = "rest"  # the name of the part that is no block
SHARD_BYTES = 2 * 2**30


def split_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a model by name: `REST` first, then the blocks in their order."""
    blocks = [key for key in params if re.fullmatch(r"layer_\d+", key)]
    blocks.sort(key=lambda name: int(name.removeprefix("layer_")))
    rest = {key: value for key, value in params.items() if key not in blocks}
    return {REST: rest} | {name: params[name] for name in blocks}


def join_blocks(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `split`."""
    return {**parts[REST], **{name: part for name, part in parts.items() if name != REST}}


def _blocks_and_outer(params: Any) -> Iterator[tuple[str, Any]]:
    """All kernels and leaf arrays with their names on disk; kernels before their own parts."""
    todo = list(reversed(trees.flatten(params).items()))
    while todo:
        path, leaf = todo.pop()
        yield path, leaf
        if isinstance(leaf, Kernel):
            inner = base.kernel_fields(leaf)[0]
            todo += reversed([(f"{path}/{name}", getattr(leaf, name)) for name in inner])


def tensors(params: Any) -> dict[str, Any]:
    """All arrays by the names they have on disk; parts of kernels are below the kernels' paths."""
    return {name: part for name, part in _blocks_and_outer(params) if not isinstance(part, Kernel)}


def _constants(kernel: Kernel) -> dict[str, Any]:
    """The fields of a kernel that are no tensors, as JSON."""
    values = {name: getattr(kernel, name) for name in base.kernel_fields(kernel)[1]}
    return {k: str(v) if isinstance(v, normal_float.Format) else v for k, v in values.items()}


def describe(params: Any) -> dict[str, Any]:
    """What putting kernels together takes besides the tensors, as JSON: kinds, static fields."""
    inside = {path: part for path, part in _blocks_and_outer(params) if isinstance(part, Kernel)}
    constants = {path: _constants(kernel) for path, kernel in inside.items()}
    return {
        "kinds": {path: kind_of(kernel) for path, kernel in inside.items()},
        "constants": {path: values for path, values in constants.items() if values},
    }


def _shards(params: Any, limit: int) -> list[dict[str, Any]]:
    """Tensors in order, cut into groups of at most ``limit`` bytes (or one tensor)."""
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, array in tensors(params).items():
        if shards[-1] and size + nbytes(array) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += nbytes(array)
    return shards


class Shards:
    """Where the parts of a model go; asks for them by name, and knows which are there.

    Args:
      directory: of the files.
      store: knows what was written before.
      limit: most tensor bytes per file (or one tensor).
    """

    def __init__(self, directory: Path, store: Store, limit: int = SHARD_BYTES):
        self.directory, self._work, self._limit = directory, store, limit
        self._own: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return f"parts/{name}" in self._work

    def __setitem__(self, name: str, tree: Any) -> None:
        """Writes a part.

        Raises:
          OSError: if the disk is full.
        """
        tree = tree if name == REST else {name: tree}
        files = {}
        for k, shard in enumerate(_shards(tree, self._limit)):
            file = f"{name}-{k}.safetensors"
            written = write_tensors(self.directory / file, shard, {"format": "lordjax"})
            self._own.add(file)
            files[file] = {**written._asdict(), "tensors": list(shard)}
        row = {"files": files, **describe(tree), "nbytes": nbytes(tree)}
        self._work[f"parts/{name}"] = row

    def finish(self, names: Iterable[str]) -> dict[str, Any]:
        """Gives the files of all parts, in this order, their last names.

        Returns:
          ``index``: tensor -> file; ``kinds`` and ``constants``: see `describe`; ``nbytes`` of the
          tensors, ``file_bytes``.

        Raises:
          ValueError: if a file that an earlier process wrote is damaged; names it.
        """
        rows = [self._work[f"parts/{name}"] for name in names]
        count = sum(len(row["files"]) for row in rows)
        found: dict[str, Any] = {"index": {}, "kinds": {}, "constants": {}}
        found |= {"nbytes": sum(row["nbytes"] for row in rows), "file_bytes": 0}
        number = 0
        for row in rows:
            found["kinds"] |= row["kinds"]
            found["constants"] |= row["constants"]
            for file, facts in row["files"].items():
                number += 1
                last = f"model-{number:05d}-of-{count:05d}.safetensors"
                self._name(file, last, Written(facts["bytes"], facts["sha256"]))
                found["index"] |= dict.fromkeys(facts["tensors"], last)
                found["file_bytes"] += facts["bytes"]
        sync_directory(self.directory)
        return found

    def _name(self, file: str, last: str, written: Written) -> None:
        old, new = self.directory / file, self.directory / last
        path = old if old.exists() else new  # it may have been killed in the midst of this
        if file not in self._own and (not path.exists() or checksum(path) != written):
            raise ValueError(
                f"{path} is missing, or not what was written there (its checksum differs); remove "
                f"{self.directory.parent} to start over"
            )
        os.replace(path, new)


def open_shards(into: Any, store: Store, plan: Plan) -> Any:
    """Where the parts of a plan's model go: ``into``, or a dictionary.

    Raises:
      ValueError: if ``into`` has parts of another plan.
    """
    if into is None:
        return {}
    if get_or_compute(store, "applied", lambda: plan) != plan:
        raise ValueError("the output has parts of another plan; choose another one")
    return into


def write_shard_once(
    parts: Any, store: Store, name: str, make: Callable[[str], tuple[Any, dict[str, Any]]]
) -> dict[str, Any]:
    """Makes a part of a model, unless it is there, and puts it there; returns what to know of it.

    Args:
      parts: name -> part.
      store: keeps what to know of parts.
      name: of the part.
      make: the part of a name, and what to know of it.
    """
    if name in parts:
        return store[f"about/{name}"]
    part, about = make(name)
    store[f"about/{name}"] = about
    parts[name] = part
    return about
