"""A Hugging Face linear layer made of lordjax kernels, in the format of `modeling_lordjax`."""

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
    """One lordjax kernel in a Hugging Face layer.

    Attributes:
      kernel: matrix ``[in, out]``, an array or a `Kernel`.
      inputs: indices of the layer's inputs that the kernel reads.
      outputs: indices of the layer's outputs that the kernel computes.
    """

    kernel: Any
    inputs: np.ndarray
    outputs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Layer:
    """A Hugging Face linear layer made of lordjax kernels.

    Attributes:
      parts: kernels of the layer; a fused layer has several.
      shape: numbers of inputs and outputs of the Hugging Face layer, with its present MLP width.
      bias: bias ``[out]``; None if the layer has none.
    """

    parts: list[Part]
    shape: tuple[int, int]
    bias: np.ndarray | None

    def spec(self) -> dict[str, Any]:
        """Returns the description from which `modeling_lordjax` creates the layer."""
        inputs, outputs = self._places()
        return {
            "shape": list(self.shape),
            "bias": self.bias is not None,
            "inputs": None if inputs is None else len(inputs),
            "outputs": None if outputs is None else len(outputs),
            "parts": [spec_of(part.kernel) for part in self.parts],
        }

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors of the layer; names are relative to the layer's name."""
        for name, places in zip(("inputs", "outputs"), self._places(), strict=True):
            if places is not None:
                yield name, places.astype(np.int32)
        for i, part in enumerate(self.parts):
            for name, array in arrays_of(part.kernel):
                yield f"parts.{i}.{name}", array
        if self.bias is not None:
            yield "bias", self.bias

    def _places(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Returns the indices of the inputs and of all parts' outputs; None means 0, 1, 2 ..."""
        both = self.parts[0].inputs, np.concatenate([part.outputs for part in self.parts])
        every = [np.arange(size) for size in self.shape]
        inputs, outputs = (
            None if np.array_equal(a, b) else a for a, b in zip(both, every, strict=True)
        )
        return inputs, outputs

    def without_products(self) -> Layer:
        """Returns the layer without the low-rank terms of its quantized kernels."""
        parts = [
            dataclasses.replace(part, kernel=part.kernel.base)
            if isinstance(part.kernel, LowRankPlusQuantized)
            else part
            for part in self.parts
        ]
        return dataclasses.replace(self, parts=parts)

    def adapter(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns the low-rank terms of all quantized kernels as one LoRA pair.

        Returns:
          A ``[rank, in]`` and B ``[out, rank]``, where rank is the sum of the kernels' ranks; None
          if no kernel has a low-rank term.
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
    """Returns the kind and sizes of a kernel, as `modeling_lordjax` reads them."""
    spec: dict[str, Any] = {"kind": kind_of(kernel)}
    if not isinstance(kernel, Kernel):
        return {**spec, "shape": list(kernel.shape)}
    if isinstance(kernel, NFQuantized):
        return {**spec, "shape": list(kernel.shape), **dataclasses.asdict(kernel.format)}
    return {**spec, **{name: spec_of(getattr(kernel, name)) for name in kernel_fields(kernel)[0]}}


def arrays_of(kernel: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the names and arrays of a kernel.

    Quantized weights and their scales are viewed as integers, so that no cast changes them.
    """
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
