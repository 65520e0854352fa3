"""Atomic, durable files: arrays as safetensors, text and JSON, checksums.

A file is written under a temporary name, synced to disk and renamed. A process that is killed
leaves the old file or the new one. Arrays are written one by one, and memory-mapped one by one when
they are read, so a file may be larger than memory.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.runtime import json_files
from lordjax.runtime.input_files import parse_json, reading, size_of
from lordjax.storage.room import no_room

# Supported dtypes by their names in safetensors.
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
FRESH = ".new"  # suffix of a file that is being written
PIECE = 2**24  # bytes of one call that reads or writes; systems limit them to 2 GiB


class Written(NamedTuple):
    """Size and checksum of a written file."""

    bytes: int
    sha256: str


class TensorWriter:
    """Writer of a safetensors file, array by array; `close` gives the file its name.

    Args:
      path: the file.
      shapes: an object with a shape and a dtype per name, in the order of the arrays.
      metadata: texts by name, stored in the file's header.

    Raises:
      ValueError: if a dtype is not supported.
      OSError: if the file cannot be written.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, Any], metadata: Mapping[str, str] | None = None
    ):
        self.path, self._fresh = path, path.with_name(path.name + FRESH)
        self._digest, self._size = hashlib.sha256(), 0
        self._left = [(n, tuple(a.shape), np.dtype(a.dtype)) for n, a in shapes.items()][::-1]
        header = _header(shapes, metadata or {})
        arrays = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self._left)
        self._need = 8 + len(header) + arrays
        self._fresh.unlink(missing_ok=True)  # never through a link that somebody has put there
        self._file = self._fresh.open("xb", buffering=0)
        self._write(len(header).to_bytes(8, "little") + header)

    def add(self, array: Any) -> None:
        """Writes the next array.

        Raises:
          ValueError: if its shape or dtype is not the announced one.
          OSError: if the disk is full; then the file is removed.
        """
        name, shape, dtype = self._left.pop()
        array = np.asarray(array, order="C")
        if (array.shape, array.dtype) != (shape, dtype):
            raise ValueError(
                f"{self.path}: {name} is {array.dtype} {array.shape}; expected {dtype} {shape}"
            )
        self._write(array.reshape(-1).view(np.uint8).data)

    def close(self) -> Written:
        """Syncs the file to disk and gives it its name; returns its size and checksum.

        Raises:
          ValueError: if announced arrays are missing.
          OSError: if the disk is full; then the file is removed.
        """
        if self._left:
            raise ValueError(f"{self.path}: {len(self._left)} announced arrays were not written")
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
            for start in range(0, len(data), PIECE):
                piece = data[start : start + PIECE]
                while piece:
                    piece = piece[self._file.write(piece) :]
        except OSError as error:
            self._fail(error)
        self._digest.update(data)
        self._size += len(data)

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._file.closed

    def abandon(self) -> None:
        """Removes the temporary file, unless `close` has renamed it."""
        if not self.closed:
            self._file.close()
            self._fresh.unlink(missing_ok=True)

    def _fail(self, error: OSError) -> None:
        self.abandon()
        raise no_room(self.path, error, self._need) from error


def _header(shapes: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Returns the header of a safetensors file as JSON, padded to a multiple of 8 bytes."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, a in shapes.items():
        if np.dtype(a.dtype) not in _NAMES:
            raise ValueError(
                f"{name}: dtype {a.dtype} is not supported; expected one of {', '.join(DTYPES)}"
            )
        end = start + int(np.prod(a.shape, dtype=np.int64)) * np.dtype(a.dtype).itemsize
        kind = _NAMES[np.dtype(a.dtype)]
        table[name] = {"dtype": kind, "shape": list(a.shape), "data_offsets": [start, end]}
        start = end
    text = json_files.dumps(table, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def header_bytes(path: str, count: int) -> int:
    """Returns a bound on what the arrays of a parameter take in the headers of their files.

    Args:
      path: path of the parameter.
      count: number of its arrays.
    """
    return count * (len(path) + 140)  # names of kernels' fields, shape, dtype and two offsets


def write_tensors(
    path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> Written:
    """Writes a safetensors file atomically.

    Args:
      path: the file.
      arrays: arrays by name.
      metadata: texts by name, stored in the file's header.

    Returns:
      The size and checksum of the file.

    Raises:
      ValueError: if a dtype is not supported.
      OSError: if the file cannot be written.
    """
    # Wide dtypes first, as safetensors itself does, so that all arrays are aligned.
    names = sorted(arrays, key=lambda name: (-np.dtype(arrays[name].dtype).itemsize, name))
    writer = TensorWriter(path, {name: arrays[name] for name in names}, metadata)
    try:
        for name in names:
            writer.add(arrays[name])
        return writer.close()
    finally:
        writer.abandon()


class TensorFile(Mapping[str, np.ndarray]):
    """A safetensors file as a mapping; each array is memory-mapped separately when it is read.

    Raises:
      ValueError: if the file is not a safetensors file; says what is wrong.
    """

    def __init__(self, path: Path):
        self.path = path
        with reading(path, "not a safetensors file"):
            size = size_of(path)
            with path.open("rb") as file:
                if (length := int.from_bytes(file.read(8), "little")) > size - 8:
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                table = parse_json(file.read(length).decode(), str(path), finite=True)
            self.metadata: dict[str, str] = table.pop("__metadata__", {})
            self._rows = {name: _row(name, row) for name, row in table.items()}
            self._start = 8 + length
            self._check_places(size - self._start)

    def _check_places(self, size: int) -> None:
        """Raises ValueError unless the arrays lie one behind the other, up to the file's end."""
        at = 0
        for name in sorted(self, key=lambda name: (self.start(name), self.nbytes(name))):
            if (start := self.start(name)) != at:
                raise ValueError(f"expected {name[:80]} at {at}, not {start}")
            at += self.nbytes(name)
        if at != size:
            raise ValueError(
                f"{self.path}: the arrays end at {at} of {size} bytes; is the file truncated?"
            )

    def shape(self, name: str) -> jax.ShapeDtypeStruct:
        """Returns shape and dtype of an array, without reading its values."""
        return self._rows[name][0]

    def start(self, name: str) -> int:
        """Returns where the values of an array begin, behind the header."""
        return self._rows[name][1]

    def nbytes(self, name: str) -> int:
        """Returns the number of bytes of an array."""
        shape = self.shape(name)
        return math.prod(shape.shape) * shape.dtype.itemsize

    def read(self, name: str) -> np.ndarray:
        """Reads an array into memory.

        Raises:
          ValueError: if the file has become shorter.
        """
        array = np.empty(self.nbytes(name), np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + self.start(name))
            done, view = 0, array.data
            while done < len(view):
                if not (count := file.readinto(view[done : done + PIECE])):
                    raise ValueError(f"{self.path}: ends within {name}; is it being written?")
                done += count
        return array.view(self.shape(name).dtype).reshape(self.shape(name).shape)

    def __getitem__(self, name: str) -> np.ndarray:
        shape, start = self._rows[name]
        if not self.nbytes(name):
            return np.zeros(shape.shape, shape.dtype)
        count = math.prod(shape.shape)
        flat = np.memmap(self.path, shape.dtype, "r", self._start + start, (count,))
        return np.asarray(flat).reshape(shape.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _row(name: str, row: Any) -> tuple[jax.ShapeDtypeStruct, int]:
    """Returns shape and start of an array by its row in the header; raises if they do not fit."""
    sizes, (start, end), kind = row["shape"], row["data_offsets"], row["dtype"]
    if kind not in DTYPES:
        raise ValueError(
            f"dtype {str(kind)[:80]} is not supported; expected one of {', '.join(DTYPES)}"
        )
    numbers = (*sizes, start, end)
    if len(sizes) > 32 or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"tensor {name[:80]} has a shape or a place that is none")
    dtype = np.dtype(DTYPES[kind])
    if end - start != (need := math.prod(sizes) * dtype.itemsize):
        raise ValueError(f"tensor {name[:80]} has bytes {start} to {end}, but needs {need}")
    return jax.ShapeDtypeStruct(tuple(sizes), dtype), start


def checksum(path: Path) -> Written:
    """Returns the size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Written(path.stat().st_size, digest)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; see `write_bytes`.

    Raises:
      OSError: if the file cannot be written.
      ValueError: if a number is not finite; names the file and the place of the number.
    """
    try:
        write_text(path, json_files.dumps(value, indent=1) + "\n")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically.

    The data go to a file beside ``path``, which is synced to disk and then renamed. A process
    that is killed leaves the old file or the new one, never a part of it.

    Args:
      path: the file; is replaced if it exists.
      data: the whole contents.

    Raises:
      OSError: if the file cannot be written; then nothing is left of it.
    """
    fresh = path.with_name(path.name + FRESH)
    fresh.unlink(missing_ok=True)  # never through a link that somebody has put there
    try:
        with fresh.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        sync_directory(path.parent)
    except OSError as error:
        raise no_room(path, error, len(data)) from error
    finally:
        fresh.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Syncs the entries of a directory (its file names) to disk; Windows has no way to."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems know no way
            raise
    finally:
        os.close(handle)
