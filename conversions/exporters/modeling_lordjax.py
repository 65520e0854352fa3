"""A compressed model for transformers, written by ``lordjax export --to factored``.

This file needs only torch and transformers; the export copies it with another base class. The model
is the stock class with some linear layers replaced, as ``config.lordjax_export`` describes. Weights
are ``[out, in]``. Quantized weights are NormalFloat (arXiv 2305.14314), packed into 32-bit words.
They and their scales are stored as integers, so that casting the model does not change them.
"""

import functools
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INTEGERS = {4: torch.int32, 2: torch.int16}  # bytes of a dtype -> integer dtype of the same size
TAIL = 0.9677083  # QLoRA's constant: the largest quantile of the code book


class Dense(nn.Module):
    """A dense matrix."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        fan_in, fan_out = spec["shape"]
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))

    def dense(self) -> torch.Tensor:
        """Returns the dense matrix ``[out, in]``."""
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies the matrix with ``x``."""
        return functional.linear(x, self.dense().to(x.dtype))


class LowRank(nn.Module):
    """A low-rank matrix, the product of the factors ``left`` and ``right``."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        self.left, self.right = kernel(spec["left"]), kernel(spec["right"])

    def dense(self) -> torch.Tensor:
        """Returns the dense matrix ``[out, in]``."""
        return self.right.dense() @ self.left.dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies the matrix with ``x``."""
        return self.right(self.left(x))


class Quantized(nn.Module):
    """A quantized matrix with quantized blockwise scales, dequantized on every use."""

    codes: torch.Tensor
    scales: torch.Tensor
    supers: torch.Tensor
    offset: torch.Tensor

    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        self.spec, self.count = spec, math.prod(spec["shape"])
        self.scale_dtype = DTYPES[spec["scale_dtype"]]
        self.scale_count = math.ceil(self.count / spec["block"])
        supers = math.ceil(self.scale_count / spec["scale_block"])
        words = math.ceil(self.count / 32) * spec["bits"]
        scale_words = math.ceil(self.scale_count / 32) * spec["scale_bits"]
        bits = INTEGERS[self.scale_dtype.itemsize]
        self.register_buffer("codes", torch.zeros(words, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(scale_words, dtype=torch.int32))
        self.register_buffer("supers", torch.zeros(supers, dtype=bits))
        self.register_buffer("offset", torch.zeros((), dtype=torch.int32))

    def dense(self) -> torch.Tensor:
        """Returns the dense matrix ``[out, in]``."""
        spec = self.spec
        ladder = torch.arange(2.0 ** spec["scale_bits"], device=self.codes.device)
        steps = decode(self.scales, spec["scale_bits"], ladder)[: self.scale_count]
        step = self.supers.view(self.scale_dtype).float() / (2 ** spec["scale_bits"] - 1)
        scales = runs(steps, spec["scale_block"]) * step[:, None] + self.offset.view(torch.float32)
        table = torch.tensor(levels(spec["bits"]), dtype=step.dtype, device=step.device)
        values = decode(self.codes, spec["bits"], table)[: self.count]
        scales = scales.reshape(-1)[: self.scale_count, None]
        values = (runs(values, spec["block"]) * scales).reshape(-1)[: self.count]
        return values.view(*reversed(spec["shape"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies the matrix with ``x``."""
        return functional.linear(x, self.dense().to(x.dtype))


class LowRankPlusQuantized(nn.Module):
    """A quantized matrix plus a low-rank term that approximates the quantization error."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__()
        self.base, self.low_rank = kernel(spec["base"]), kernel(spec["low_rank"])

    def dense(self) -> torch.Tensor:
        """Returns the dense matrix ``[out, in]``."""
        return self.base.dense() + self.low_rank.dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies the matrix with ``x``."""
        return self.base(x) + self.low_rank(x)


KINDS = {
    "dense": Dense,
    "low_rank": LowRank,
    "nf_quantized": Quantized,
    "low_rank_plus_quantized": LowRankPlusQuantized,
}


def kernel(spec: dict[str, Any]) -> Any:
    """Creates a matrix of the kind in ``spec``."""
    return KINDS[spec["kind"]](spec)


def decode(words: torch.Tensor, bits: int, table: torch.Tensor) -> torch.Tensor:
    """Returns ``table[code]`` for all packed codes; a look-up decodes all codes of a byte."""
    data = words.view(torch.uint8).int()
    every = torch.arange(256, device=words.device)
    if bits == 3:  # bit planes of 32 codes each
        places = torch.arange(8, device=words.device)
        ones = ((every[:, None] >> places) & 1).to(torch.int32)
        low, middle, high = (ones[part] for part in data.view(-1, 3, 4).unbind(1))
        return table.index_select(0, (low + 2 * middle + 4 * high).view(-1))
    places = torch.arange(0, 8, bits, device=words.device)
    values = table[(every[:, None] >> places) & (2**bits - 1)]  # [256, codes in a byte]
    return values.index_select(0, data).view(-1)


def runs(x: torch.Tensor, length: int) -> torch.Tensor:
    """Reshapes ``[n]`` to ``[ceil(n / length), length]``, zero-padded at the end."""
    return functional.pad(x, (0, -len(x) % length)).view(-1, length)


@functools.cache
def levels(bits: int) -> list[float]:
    """Returns the code book: quantiles of the normal distribution, with an exact 0."""
    half, double = 2 ** (bits - 1), {"dtype": torch.float64, "device": "cpu"}
    left = torch.linspace(1 - TAIL, 0.5, half, **double)
    right = torch.linspace(0.5, TAIL, half + 1, **double)[1:]
    table = torch.special.ndtri(torch.cat([left, right]))
    table = table / table[-1]
    table[0], table[half - 1], table[-1] = -1, 0, 1
    return table.float().tolist()


class CompressedLinear(nn.Linear):
    """A linear layer of one or several matrices that may cover only some inputs and outputs.

    Outputs without a matrix are 0, plus the bias. The class derives from ``nn.Linear`` because PEFT
    checks for it; ``weight`` is computed on every access.
    """

    parts: Any
    inputs: torch.Tensor | None
    outputs: torch.Tensor | None

    def __init__(self, spec: dict[str, Any]):
        nn.Module.__init__(self)
        self.in_features, self.out_features = spec["shape"]
        self.parts = nn.ModuleList([kernel(part) for part in spec["parts"]])
        for name in ("inputs", "outputs"):
            count = spec[name]
            places = None if count is None else torch.zeros(count, dtype=torch.int32)
            self.register_buffer(name, places)
        bias = nn.Parameter(torch.empty(self.out_features)) if spec["bias"] else None
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:  # pyright: ignore
        """The dense matrix of the whole layer, ``[out, in]``."""
        weight = torch.cat([part.dense() for part in self.parts])
        weight = spread(weight, self.inputs, self.in_features)
        return spread(weight.T, self.outputs, self.out_features).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layer."""
        x = x if self.inputs is None else x.index_select(-1, self.inputs)
        y = torch.cat([part(x) for part in self.parts], dim=-1)
        y = spread(y, self.outputs, self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def spread(y: torch.Tensor, places: torch.Tensor | None, size: int) -> torch.Tensor:
    """Scatters the last axis of ``y`` to the indices ``places`` among ``size`` zeros."""
    if places is None:
        return y
    return y.new_zeros(*y.shape[:-1], size).index_copy(-1, places.long(), y)


class LordjaxLlamaForCausalLM(LlamaForCausalLM):
    """The stock model with compressed linear layers."""

    def __init__(self, config: Any):
        super().__init__(config)
        for name, spec in config.lordjax_export["linears"].items():
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, CompressedLinear(spec))

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, CompressedLinear):
            super()._init_weights(module)
