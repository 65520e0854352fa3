"""Reads the values of a tensor of a GGUF file, of every type that the package gguf decodes."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from lordjax.conversions.readers.gguf.header import StoredTensor

FLOATS = ("F32", "F16", "BF16")  # types that are not quantised
ROW_BYTES = 2**13  # bytes of a joined row: the temporaries of 16 rows fit into the CPU's cache

_PIECE = 2**24  # bytes that are compared at a time
_SAMPLE = 256  # rows that are compared


@functools.cache
def decodable() -> tuple[str, ...]:
    """Returns the names of the types that the installed package gguf decodes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    found = []
    for kind in GGMLQuantizationType:
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind.name)
    return tuple(found)


def read_values(tensor: StoredTensor) -> np.ndarray:
    """Reads a tensor in float32.

    The file is read and not mapped, because mapped pages count as memory until a file is closed.

    Raises:
      ValueError: if the file has become shorter since its header was read.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    stored = np.fromfile(tensor.file, np.uint8, tensor.nbytes, offset=tensor.offset)
    if stored.size < tensor.nbytes:
        raise ValueError(
            f"{tensor.file}: tensor {tensor.name} has {stored.size} of {tensor.nbytes} bytes; the "
            "file was changed while it was open"
        )
    if not stored.size:
        return np.zeros(tensor.shape, np.float32)
    if len(tensor.shape) > 1:
        stored = longer_rows(stored.reshape(math.prod(tensor.shape[:-1]), -1))
    with np.errstate(all="ignore"):  # who reads parameters names values that are not finite
        values = dequantize(stored, GGMLQuantizationType[tensor.kind])
    return np.asarray(values, np.float32).reshape(tensor.shape)


def longer_rows(data: np.ndarray) -> np.ndarray:
    """Joins stored rows into rows of about `ROW_BYTES`; gguf dequantises 16 rows per call."""
    rows, width = data.shape
    joined = max(n for n in range(1, max(1, ROW_BYTES // width) + 1) if rows % n == 0)
    return data.reshape(rows // joined, -1)


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Returns whether two tensors hold the same values of the same type."""
    if (one.kind, one.shape) != (other.kind, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        left = one.nbytes
        while left:
            count = min(_PIECE, left)
            if first.read(count) != second.read(count):
                return False
            left -= count
    return True


def difference(one: StoredTensor, other: StoredTensor) -> float:
    """Returns the relative difference of two matrices in their first rows; infinite by shape."""
    if one.shape != other.shape or len(one.shape) != 2 or not one.nbytes:
        return math.inf
    with np.errstate(all="ignore"):
        first, second = (_first_rows(tensor).astype(np.float64) for tensor in (one, other))
        found = float(np.linalg.norm(first - second) / np.linalg.norm(first))
    return found if math.isfinite(found) else math.inf


def _first_rows(tensor: StoredTensor) -> np.ndarray:
    count = min(tensor.shape[0], _SAMPLE)
    shape, nbytes = (count, *tensor.shape[1:]), tensor.nbytes // tensor.shape[0] * count
    return read_values(dataclasses.replace(tensor, shape=shape, nbytes=nbytes))
