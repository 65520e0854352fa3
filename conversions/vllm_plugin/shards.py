"""What a rank keeps of a compressed linear layer under tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lordjax.conversions.exporters.modeling_lordjax import (
    CompressedLinear,
    Dense,
    LowRank,
    LowRankPlusQuantized,
)


class View(nn.Module):
    """Some outputs and inputs of a matrix, all of which is decoded at every use.

    Args:
      kernel: the matrix.
      rows: its outputs.
      columns: its inputs.
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def __init__(self, kernel: Any, rows: torch.Tensor, columns: torch.Tensor):
        super().__init__()
        self.kernel = kernel
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def dense(self) -> torch.Tensor:
        """Returns the matrix ``[rows, columns]``."""
        return self.kernel.dense()[self.rows][:, self.columns]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies the matrix with ``x``."""
        return functional.linear(x, self.dense().to(x.dtype))


def cut(
    linear: CompressedLinear, spec: Mapping[str, Any], inputs: range, outputs: range
) -> CompressedLinear:
    """Keeps some inputs and outputs of a layer, in place.

    Args:
      linear: the layer. Inputs and outputs that it has no weights for count as zeros.
      spec: its description, with its original sizes ``whole``.
      inputs: inputs to keep, of the original ones.
      outputs: outputs to keep, of the original ones.

    Returns:
      The layer.
    """
    columns, linear.inputs = _within(linear.inputs, linear.in_features, inputs)
    rows, linear.outputs = _within(linear.outputs, linear.out_features, outputs)
    whole = (len(inputs), len(outputs)) == tuple(spec["whole"])
    if not whole:
        first, parts = 0, []
        for part, own in zip(linear.parts, spec["parts"], strict=True):
            size = outputs_of(own)
            mine = rows[(rows >= first) & (rows < first + size)] - first
            parts.append(kept(part, mine, columns))
            first += size
        linear.parts = nn.ModuleList(parts)
    linear.in_features, linear.out_features = len(inputs), len(outputs)
    return linear


def _within(
    places: torch.Tensor | None, size: int, chosen: range
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns which entries of an axis lie in a range, and where there; None: they fill it.

    Args:
      places: the original place of every entry; None: 0, 1, 2 …
      size: number of places that the layer was made with.
      chosen: the range, of original places.
    """
    places = torch.arange(size) if places is None else places.long()
    mine = torch.nonzero((places >= chosen.start) & (places < chosen.stop))[:, 0]
    at = places[mine] - chosen.start
    fills = len(at) == len(chosen) and bool((at == torch.arange(len(at), device=at.device)).all())
    return mine, None if fills else at.to(torch.int32)


def outputs_of(spec: Mapping[str, Any]) -> int:
    """Returns the number of outputs of a matrix, by its description."""
    if "shape" in spec:
        return spec["shape"][1]
    return outputs_of(spec["right"] if "right" in spec else spec["base"])


def kept(kernel: Any, rows: torch.Tensor, columns: torch.Tensor) -> Any:
    """Returns some outputs and inputs of a matrix, of its kind where it can be cut."""
    if isinstance(kernel, Dense):
        kernel.weight = nn.Parameter(kernel.weight[rows][:, columns], requires_grad=False)
        return kernel
    if isinstance(kernel, LowRank):
        rank = torch.arange(kernel.left.dense().shape[0], device=rows.device)
        kernel.left = kept(kernel.left, rank, columns)
        kernel.right = kept(kernel.right, rows, rank)
        return kernel
    if isinstance(kernel, LowRankPlusQuantized):
        kernel.base = kept(kernel.base, rows, columns)
        kernel.low_rank = kept(kernel.low_rank, rows, columns)
        return kernel
    return View(kernel, rows, columns)
