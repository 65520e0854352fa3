"""Files that are on disk when they are said to be: arrays as safetensors, JSON, checksums.

A file is written beside its name, synced and renamed, so that whoever is killed leaves the old file
or the new one. Arrays are written one by one, and mapped one by one when they are read: a file
larger than memory is no trouble.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# safetensors' names of dtypes.
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U32": np.uint32,
    "U8": np.uint8,
    "I8": np.int8,
}
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
FRESH = ".new"  # ends the name of a file that is being written


class Written(NamedTuple):
    """What a file must be when it is read again."""

    bytes: int
    sha256: str


class TensorWriter:
    """A safetensors file, written array by array; it has its name when `close` returns.

    Args:
      path: of the file.
      shapes: name -> anything with a shape and a dtype, in the order in which arrays will come.
      metadata: names and texts.

    Raises:
      ValueError: if safetensors has no such dtype.
      OSError: if the file cannot be written.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, Any], metadata: Mapping[str, str] | None = None
    ):
        self.path, self._fresh = path, path.with_name(path.name + FRESH)
        self._digest, self._size = hashlib.sha256(), 0
        self._left = [(n, tuple(a.shape), np.dtype(a.dtype)) for n, a in shapes.items()][::-1]
        header = _header(shapes, metadata or {})
        self._file = self._fresh.open("wb", buffering=0)
        self._write(len(header).to_bytes(8, "little") + header)

    def add(self, array: Any) -> None:
        """Writes the next array.

        Raises:
          ValueError: if it is not of the shape and dtype that were announced.
          OSError: if the disk is full; the file is gone then.
        """
        name, shape, dtype = self._left.pop()
        array = np.asarray(array, order="C")
        if (array.shape, array.dtype) != (shape, dtype):
            raise ValueError(
                f"{self.path}: {name} should be {dtype} {shape}, got {array.dtype} {array.shape}"
            )
        self._write(array.reshape(-1).view(np.uint8).data)

    def close(self) -> Written:
        """Brings the file to disk, under its name."""
        if self._left:
            raise ValueError(f"{self.path}: {len(self._left)} arrays are missing")
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._fresh, self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            self._fail(error)
        return Written(self._size, self._digest.hexdigest())

    def _write(self, data: Any) -> None:
        data = memoryview(data)
        try:
            for start in range(0, len(data), 2**24):  # one call writes at most 2 GiB
                piece = data[start : start + 2**24]
                while piece:
                    piece = piece[self._file.write(piece) :]
        except OSError as error:
            self._fail(error)
        self._digest.update(data)
        self._size += len(data)

    @property
    def closed(self) -> bool:
        """Whether nothing more can be written."""
        return self._file.closed

    def abandon(self) -> None:
        """Removes what was written, unless the file has its name."""
        if not self.closed:
            self._file.close()
            self._fresh.unlink(missing_ok=True)

    def _fail(self, error: OSError) -> None:
        self.abandon()
        raise OSError(f"{self.path}: cannot be written ({error}); is the disk full?") from error


def _header(shapes: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Safetensors' table of contents, filled up to 8 bytes."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, a in shapes.items():
        if np.dtype(a.dtype) not in _NAMES:
            raise ValueError(f"{name}: dtype {a.dtype}; known: {', '.join(DTYPES)}")
        end = start + int(np.prod(a.shape, dtype=np.int64)) * np.dtype(a.dtype).itemsize
        kind = _NAMES[np.dtype(a.dtype)]
        table[name] = {"dtype": kind, "shape": list(a.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(table, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write_tensors(
    path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> Written:
    """Writes a safetensors file; errors as of `TensorWriter`."""
    # As safetensors itself does it: wide dtypes first, so that all are aligned.
    names = sorted(arrays, key=lambda name: (-np.dtype(arrays[name].dtype).itemsize, name))
    writer = TensorWriter(path, {name: arrays[name] for name in names}, metadata)
    try:
        for name in names:
            writer.add(arrays[name])
        return writer.close()
    finally:
        writer.abandon()


class TensorFile(Mapping[str, np.ndarray]):
    """A safetensors file; every array is mapped on its own, and let go of with it.

    Raises:
      ValueError: if it is no such file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                table = json.loads(file.read(length))
            self.metadata: dict[str, str] = table.pop("__metadata__", {})
        except (OSError, ValueError, AttributeError, MemoryError, OverflowError) as error:
            raise ValueError(f"{path}: not a safetensors file ({error})") from error
        self._table, self._start = table, 8 + length

    def __getitem__(self, name: str) -> np.ndarray:
        row = self._table[name]
        dtype, (start, end) = np.dtype(DTYPES[row["dtype"]]), row["data_offsets"]
        if start == end:
            return np.zeros(row["shape"], dtype)
        count = (end - start) // dtype.itemsize
        flat = np.memmap(self.path, dtype, "r", self._start + start, (count,))
        return np.asarray(flat).reshape(row["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def checksum(path: Path) -> Written:
    """What a file is now."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Written(path.stat().st_size, digest)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file and brings it to disk."""
    fresh = path.with_name(path.name + FRESH)
    with fresh.open("w") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Brings the names in a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
