"""Writes a model shard by shard: the non-block parameters first, then each block.

A shard is one safetensors file, or several if it exceeds a size limit. Metadata needed to read a
shard (tensor names, kernel kinds) is stored with the finished results, so a run that was killed
goes on with the next shard. The files get their final names when all shards exist.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lordjax.allocation.plan import Plan
from lordjax.kernels import base, normal_float, trees
from lordjax.kernels.base import Kernel, nbytes
from lordjax.kernels.kinds import kind_of
from lordjax.kernels.layout import Layout
from lordjax.models.config import ModelConfig
from lordjax.names import layer
from lordjax.runtime.input_files import reading
from lordjax.storage.assembly import assemble
from lordjax.storage.checksums import tensor_row
from lordjax.storage.store import Store, get_or_compute
from lordjax.storage.tensor_check import check_finite
from lordjax.storage.tensor_files import (
    TensorFile,
    Written,
    checksum,
    sync_directory,
    write_tensors,
)

REST = "rest"  # name of the shard with the parameters outside the blocks
SHARD_BYTES = 2 * 2**30


def names(config: ModelConfig) -> list[str]:
    """Returns the names of a model's shards: `REST`, then the blocks in their order."""
    return [REST, *(layer(i) for i in range(config.num_layers))]


def split_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Splits parameters by shard name: `REST` first, then the blocks in their order."""
    blocks = [key for key in params if re.fullmatch(r"layer_\d+", key)]
    blocks.sort(key=lambda name: int(name.removeprefix("layer_")))
    rest = {key: value for key, value in params.items() if key not in blocks}
    return {REST: rest} | {name: params[name] for name in blocks}


def join_blocks(shards: Mapping[str, Any]) -> dict[str, Any]:
    """Joins what `split_blocks` split."""
    return {**shards[REST], **{name: tree for name, tree in shards.items() if name != REST}}


def _kernels_and_arrays(params: Any) -> Iterator[tuple[str, Any]]:
    """Yields all kernels and arrays with their names on disk; a kernel before its own fields."""
    todo = list(reversed(trees.flatten(params).items()))
    while todo:
        path, leaf = todo.pop()
        yield path, leaf
        if isinstance(leaf, Kernel):
            inner = base.kernel_fields(leaf)[0]
            todo += reversed([(f"{path}/{name}", getattr(leaf, name)) for name in inner])


def tensors(params: Any) -> dict[str, Any]:
    """Returns all arrays by their names on disk; a kernel's arrays are below the kernel's path."""
    found = _kernels_and_arrays(params)
    return {name: array for name, array in found if not isinstance(array, Kernel)}


def _constants(kernel: Kernel) -> dict[str, Any]:
    """Returns the fields of a kernel that are no tensors, as JSON."""
    values = {name: getattr(kernel, name) for name in base.kernel_fields(kernel)[1]}
    return {name: _as_json(value) for name, value in values.items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, Layout):
        return dataclasses.asdict(value)
    return str(value) if isinstance(value, normal_float.Format) else value


def describe(params: Any) -> dict[str, Any]:
    """Returns the metadata of all kernels as JSON: ``kinds`` and ``constants``, by path."""
    found = _kernels_and_arrays(params)
    kernels = {path: kernel for path, kernel in found if isinstance(kernel, Kernel)}
    constants = {path: _constants(kernel) for path, kernel in kernels.items()}
    return {
        "kinds": {path: kind_of(kernel) for path, kernel in kernels.items()},
        "constants": {path: values for path, values in constants.items() if values},
    }


def _files(params: Any, limit: int) -> list[dict[str, Any]]:
    """Distributes tensors, in order, over files of at most ``limit`` bytes (or one tensor)."""
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
    """Writer of the shards of a model, by name; knows which shards are written.

    Args:
      directory: directory of the files.
      store: remembers the shards that earlier processes wrote.
      limit: largest number of tensor bytes per file; a larger tensor gets its own file.
      prefix: first part of the store's keys, so that it can remember two models.
    """

    def __init__(
        self, directory: Path, store: Store, limit: int = SHARD_BYTES, prefix: str = "parts"
    ):
        self.directory, self._store, self._limit, self._prefix = directory, store, limit, prefix
        self._own: set[str] = set()
        self._remedy = f"remove {directory.parent} to start over"

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self._store

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def __getitem__(self, name: str) -> Any:
        """Reads a shard that is not renamed yet.

        Raises:
          ValueError: if a file that an earlier process wrote is damaged.
        """
        entry, arrays = self._store[self._key(name)], {}
        with reading(self.directory.parent, "damaged results", self._remedy):
            for file, facts in entry["files"].items():
                self._check(self.directory / file, Written(facts["bytes"], facts["sha256"]))
                opened = TensorFile(self.directory / file)
                arrays |= {path: opened.read(path) for path in facts["tensors"]}
            tree = assemble(arrays, entry)
        return tree if name == REST else tree[name]

    def __setitem__(self, name: str, tree: Any) -> None:
        """Writes a shard.

        Args:
          name: name of the shard.
          tree: its parameters as a nested dict; leaves may be kernels of any kind.

        Raises:
          OSError: if the disk is full.
          ValueError: if a value is not finite, or a dtype is not supported; names the tensor.
        """
        tree = tree if name == REST else {name: tree}
        rows = {}
        for path, array in tensors(tree).items():
            check_finite(array := np.asarray(array), f"{self.directory}: {path} would hold")
            rows[path] = tensor_row(array)
        files = {}
        for k, arrays in enumerate(_files(tree, self._limit)):
            file = _file_name(name, k)
            written = write_tensors(self.directory / file, arrays, {"format": "lordjax"})
            self._own.add(file)
            files[file] = {**written._asdict(), "tensors": {path: rows[path] for path in arrays}}
        entry = {"files": files, **describe(tree), "nbytes": nbytes(tree)}
        self._store[self._key(name)] = entry

    def file_bytes(self) -> int:
        """Returns the bytes of the files that are written so far."""
        entries = [self._store[key] for key in self._store.below("parts/")]
        return sum(facts["bytes"] for entry in entries for facts in entry["files"].values())

    def finish(self, names: Iterable[str]) -> dict[str, Any]:
        """Renames the files of all shards to their final names.

        Args:
          names: names of the shards, in the order of the files.

        Returns:
          ``index`` (tensor -> file), ``tensors`` (see `checksums.tensor_row`), ``kinds`` and
          ``constants`` (see `describe`), ``nbytes`` of the tensors, and ``file_bytes`` of the
          files.

        Raises:
          ValueError: if a file that an earlier process wrote is damaged; names it.
        """
        with reading(self.directory.parent, "damaged results", self._remedy):
            return self._named(list(names))

    def _named(self, names: list[str]) -> dict[str, Any]:
        """Renames the files; returns what `finish` does."""
        entries = [self._store[self._key(name)] for name in names]
        count = sum(len(entry["files"]) for entry in entries)
        found: dict[str, Any] = {"index": {}, "tensors": {}, "kinds": {}, "constants": {}}
        found |= {"nbytes": sum(entry["nbytes"] for entry in entries), "file_bytes": 0}
        number = 0
        for name, entry in zip(names, entries, strict=True):
            found["kinds"] |= entry["kinds"]
            found["constants"] |= entry["constants"]
            for k, (file, facts) in enumerate(entry["files"].items()):
                number += 1
                if file != _file_name(name, k):
                    raise ValueError(f"{str(file)[:80]!r} is no file of a shard")
                final = f"model-{number:05d}-of-{count:05d}.safetensors"
                self._rename(file, final, Written(facts["bytes"], facts["sha256"]))
                found["index"] |= dict.fromkeys(facts["tensors"], final)
                found["tensors"] |= facts["tensors"]
                found["file_bytes"] += facts["bytes"]
        sync_directory(self.directory)
        return found

    def _rename(self, file: str, final: str, written: Written) -> None:
        """Renames a file to its final name; raises ValueError if it is damaged."""
        old, new = self.directory / file, self.directory / final
        path = old if old.exists() else new  # an earlier process may have renamed it already
        if file not in self._own:
            self._check(path, written)
        os.replace(path, new)

    def _check(self, path: Path, written: Written) -> None:
        """Raises ValueError if a file is not what was written."""
        if not path.exists() or checksum(path) != written:
            raise ValueError(f"{path} is missing or damaged (its checksum differs); {self._remedy}")


def _file_name(name: str, k: int) -> str:
    """Name of file ``k`` of a shard before all shards exist."""
    return f"{name}-{k}.safetensors"


def open_shards(into: Any, store: Store, plan: Plan) -> Any:
    """Returns the mapping that the shards of a plan's model are written to.

    Args:
      into: a `Shards`, or None for a new dict.
      store: remembers the plan whose shards ``into`` holds.
      plan: the plan.

    Raises:
      ValueError: if ``into`` holds shards of another plan.
    """
    if into is None:
        return {}
    if get_or_compute(store, "applied", lambda: plan) != plan:
        raise ValueError(
            "the output holds blocks of a model that another plan made; choose another output"
        )
    return into


def write_shard_once(
    shards: Any, store: Store, name: str, make: Callable[[str], tuple[Any, dict[str, Any]]]
) -> dict[str, Any]:
    """Computes and writes a shard, unless it is written already.

    Args:
      shards: mapping of shards that `open_shards` returned.
      store: keeps the facts about each shard.
      name: name of the shard.
      make: function that computes the shard of a name and the facts about it.

    Returns:
      The facts about the shard.
    """
    if name in shards:
        return store[f"about/{name}"]
    shard, about = make(name)
    store[f"about/{name}"] = about
    shards[name] = shard
    return about
