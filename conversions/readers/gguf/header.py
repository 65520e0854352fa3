"""Reads the header of a GGUF file: its metadata, and where its tensors are.

Every length is checked against the bytes that are left, so a damaged file ends in one error and
never in a long loop or a large allocation. The format is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # default of the key general.alignment
_MOST_AXES = 8
# Type numbers of metadata values.
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored.

    Attributes:
      name: name in the file.
      file: the file that holds it.
      shape: its shape, the outermost axis first.
      kind: name of its type, such as ``Q4_K``; the number of a type that gguf does not know.
      offset: first byte in the file.
      nbytes: number of bytes.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of one file: metadata, and tensors by name."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(file: Path) -> Header:
    """Reads the header of a GGUF file.

    Raises:
      ValueError: if the file is damaged, or of a version or byte order that is not supported.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            return _read(file, _Cursor(stream, size))
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{file}: not a complete GGUF file ({error}); its {size} bytes are truncated or "
            "corrupt, download it again"
        ) from error


class _Cursor:
    """Reads values from a file, and never beyond its end."""

    def __init__(self, stream: BinaryIO, size: int):
        self._stream, self._left = stream, size

    def take(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError(f"it ends {count - self._left} bytes too early")
        self._left -= count
        return self._stream.read(count)

    def number(self, code: str) -> Any:
        return np.frombuffer(self.take(np.dtype(code).itemsize), code)[0].item()

    def count(self, least: int) -> int:
        """Reads the number of items of at least ``least`` bytes that follow."""
        items = int.from_bytes(self.take(8), "little")
        if items * least > self._left:
            raise ValueError(f"it announces {items} items, but has {self._left} more bytes")
        return items

    def text(self) -> str:
        return self.take(self.count(1)).decode("utf-8")

    @property
    def position(self) -> int:
        return self._stream.tell()

    def value(self, kind: int) -> Any:
        """Reads a metadata value; single-precision numbers get their shortest decimals."""
        if kind == _STRING:
            return self.text()
        if kind == _BOOL:
            return bool(self.number("u1"))
        if kind == _ARRAY:
            return self._array()
        if kind not in _NUMBERS:
            raise ValueError(f"a metadata value has the unknown type {kind}")
        value = self.number(code := _NUMBERS[kind])
        # 1e-5 is stored in single precision and would otherwise become 9.99999974738e-06.
        return float(str(np.float32(value))) if code == "<f4" else value

    def _array(self) -> list[Any]:
        kind = self.number("<u4")
        if kind in (_BOOL, *_NUMBERS):
            code = np.dtype(_NUMBERS.get(kind, "?"))
            items = self.count(code.itemsize)
            return np.frombuffer(self.take(items * code.itemsize), code).tolist()
        if kind != _STRING:
            raise ValueError(f"an array of metadata has items of type {kind}, which is unknown")
        return [self.text() for _ in range(self.count(8))]


def _read(file: Path, cursor: _Cursor) -> Header:
    if (magic := cursor.take(4)) != MAGIC:
        raise ValueError(f"it begins with {magic!r}, expected {MAGIC!r}")
    version = cursor.number("<u4")
    if version not in _VERSIONS:
        swapped = struct.unpack(">I", struct.pack("<I", version))[0] in _VERSIONS
        other = ", in the other byte order; convert it with gguf-convert-endian" if swapped else ""
        raise ValueError(f"its version is {version}{other}; supported: 2 and 3")
    tensors, entries = cursor.count(24), cursor.count(13)
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"metadata {key} is there twice")
        metadata[key] = cursor.value(cursor.number("<u4"))
    infos = [_info(cursor) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"metadata general.alignment = {alignment!r}: expected a positive integer")
    start = -(-cursor.position // alignment) * alignment
    return Header(file, metadata, _placed(file, infos, start))


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Reads name, shape, type number and relative offset of a tensor."""
    name, axes = cursor.text(), cursor.number("<u4")
    if axes > _MOST_AXES:
        raise ValueError(f"tensor {name} has {axes} axes")
    shape = tuple(cursor.number("<u8") for _ in range(axes))[::-1]
    return name, shape, cursor.number("<u4"), cursor.number("<u8")


def _placed(
    file: Path, infos: list[tuple[str, tuple[int, ...], int, int]], start: int
) -> dict[str, StoredTensor]:
    """Returns the tensors with their places, which must be inside the file and apart."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    placed: dict[str, StoredTensor] = {}
    for name, shape, number, offset in infos:
        if name in placed:
            raise ValueError(f"tensor {name} is there twice")
        known = number in set(GGMLQuantizationType)
        kind = GGMLQuantizationType(number).name if known else str(number)
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(number)] if known else (1, 0)
        if shape and shape[-1] % weights:
            raise ValueError(
                f"tensor {name} has rows of {shape[-1]} numbers, which are no whole blocks of "
                f"{weights} of type {kind}"
            )
        nbytes = math.prod(shape) // weights * size
        placed[name] = StoredTensor(name, file, shape, kind, start + offset, nbytes)
    end, total, before = start, file.stat().st_size, None
    for tensor in sorted(placed.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            raise ValueError(f"tensors {before} and {tensor.name} overlap")
        end, before = tensor.offset + tensor.nbytes, tensor.name
        if end > total:
            raise ValueError(f"tensor {tensor.name} ends at byte {end}")
    return placed
