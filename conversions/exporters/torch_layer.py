"""A linear layer of theirs, made of matrices of ours, as `modeling_lordjax` reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from lordjax.kernels.base import Kernel, kernel_fields, materialize
from lordjax.kernels.kinds import kind_of
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized


@dataclasses.dataclass(frozen=True)
class Part:
    """One of our kernels in one of their layers.

    Attributes:
      kernel: array or `Kernel`.
      inputs: which inputs of their layer it has.
      outputs: which outputs.
    """

    kernel: Any
    inputs: np.ndarray
    outputs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Layer:
    """One of their linear layers, of our kernels; sizes are those that it has now."""

    parts: list[Part]
    shape: tuple[int, int]
    bias: np.ndarray | None

    def spec(self) -> dict[str, Any]:
        """What the code must know before it reads tensors."""
        inputs, outputs = self._places()
        return {
            "shape": list(self.shape),
            "bias": self.bias is not None,
            "inputs": None if inputs is None else len(inputs),
            "outputs": None if outputs is None else len(outputs),
            "parts": [spec_of(part.kernel) for part in self.parts],
        }

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Names below the layer's, and values."""
        for name, places in zip(("inputs", "outputs"), self._places(), strict=True):
            if places is not None:
                yield name, places.astype(np.int32)
        for i, part in enumerate(self.parts):
            for name, array in arrays_of(part.kernel):
                yield f"parts.{i}.{name}", array
        if self.bias is not None:
            yield "bias", self.bias

    def _places(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Inputs, and outputs of all parts one after the other; None where that is all in order."""
        both = self.parts[0].inputs, np.concatenate([part.outputs for part in self.parts])
        every = [np.arange(size) for size in self.shape]
        inputs, outputs = (
            None if np.array_equal(a, b) else a for a, b in zip(both, every, strict=True)
        )
        return inputs, outputs

    def without_products(self) -> Layer:
        """The layer without the products beside codes."""
        parts = [
            dataclasses.replace(part, kernel=part.kernel.base)
            if isinstance(part.kernel, LowRankPlusQuantized)
            else part
            for part in self.parts
        ]
        return dataclasses.replace(self, parts=parts)

    def adapter(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The products beside codes as one: A ``[rank, in]``, B ``[out, rank]``; None: no product.

        Of several parts, their products follow each other.
        """
        found = [part for part in self.parts if isinstance(part.kernel, LowRankPlusQuantized)]
        if not found:
            return None
        rank, first = sum(part.kernel.rank for part in found), 0
        dtype = found[0].kernel.low_rank.dtype
        a, b = np.zeros((rank, self.shape[0]), dtype), np.zeros((self.shape[1], rank), dtype)
        for part in found:
            pair = part.kernel.low_rank
            rows = np.arange(first, first + pair.rank)
            a[np.ix_(rows, part.inputs)] = np.asarray(materialize(pair.left)).T
            b[np.ix_(part.outputs, rows)] = np.asarray(materialize(pair.right)).T
            first += pair.rank
        return a, b


def spec_of(kernel: Any) -> dict[str, Any]:
    """Kind and sizes of a matrix."""
    spec: dict[str, Any] = {"kind": kind_of(kernel)}
    if not isinstance(kernel, Kernel):
        return {**spec, "shape": list(kernel.shape)}
    if isinstance(kernel, NFQuantized):
        return {**spec, "shape": list(kernel.shape), **dataclasses.asdict(kernel.format)}
    return {**spec, **{name: spec_of(getattr(kernel, name)) for name in kernel_fields(kernel)[0]}}


def arrays_of(kernel: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of a matrix; codes and their scales as integers of the same bits."""
    if not isinstance(kernel, Kernel):
        yield "weight", np.asarray(kernel).T
        return
    for name in kernel_fields(kernel)[0]:
        part = getattr(kernel, name)
        if isinstance(kernel, NFQuantized):
            array = np.asarray(part)
            yield name, array.view(f"int{8 * array.itemsize}")
            continue
        for below, array in arrays_of(part):
            yield f"{name}.{below}", array
