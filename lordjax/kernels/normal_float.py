"""NormalFloat: 2, 3, 4 and 8 bit codes with blockwise scales that are quantized themselves.

Arrays in, arrays out. Values are a flat vector; a block is a run of consecutive values. A kernel
``[in, out]`` is transposed and flattened, as a PyTorch weight is stored
(`lordjax.kernels.quantized.NFQuantized`).

A block of ``block`` values has the scale s = max|x|. A matrix has the offset o = min s. A block of
``scale_block`` scales has m = max(s - o), stored as ``scale_dtype``. Then::

    u = round((s - o)·(2^scale_bits - 1)/m)      ŝ = o + u·m/(2^scale_bits - 1)
    code = index of the level nearest to x/ŝ     x̂ = level[code]·ŝ

Difference from QLoRA: the offset is the smallest scale, not the mean, so that u is unsigned.

Source: Dettmers et al., arXiv 2305.14314; LQ-LoRA, arXiv 2311.12023; theory/lq_lora §1.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt
from scipy.special import ndtri

WORD = 32  # bits in a word of packed codes; also the number of codes that are packed together
BITS = (2, 3, 4, 8)
SCALE_DTYPES = ("bfloat16", "float16", "float32")
# The authors' constant: 1 - (1/30 + 1/32)/2, truncated; the same for every number of bits.
_TAIL = 0.9677083


@dataclasses.dataclass(frozen=True)
class Format:
    """A quantization format.

    Attributes:
      bits: bits of a code: 2, 3, 4 or 8.
      scale_bits: bits of a quantized block scale: 2, 3, 4 or 8.
      scale_dtype: dtype of the scales of scales: bfloat16, float16 or float32.
      block: number of values that share a scale.
      scale_block: number of scales that share a scale of scales.

    Raises:
      ValueError: if an attribute has another value.
    """

    bits: int = 4
    scale_bits: int = 8
    scale_dtype: str = "float32"
    block: int = 64
    scale_block: int = 256

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.scale_bits not in BITS:
            raise ValueError(f"{self}: bits and scale_bits must be among {BITS}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"{self}: scale_dtype must be one of {', '.join(SCALE_DTYPES)}")
        if self.block < 1 or self.scale_block < 1:
            raise ValueError(f"{self}: block and scale_block must be at least 1")

    def __str__(self) -> str:
        """The format's name, such as ``nf4-8-float32-64-256``; `parse` reads it."""
        return f"nf{'-'.join(str(value) for value in dataclasses.astuple(self))}"

    @classmethod
    def parse(cls, text: str) -> Format:
        """Returns the format with a name, such as ``nf4-8-float32-64-256``.

        Trailing parts may be left out: ``nf4`` has QLoRA's block sizes.

        Raises:
          ValueError: if the text is not the name of a format.
        """
        kinds = (int, int, str, int, int)
        parts = text.removeprefix("nf").split("-")
        try:
            if not text.startswith("nf") or len(parts) > len(kinds):
                raise ValueError(text)
            values: list[Any] = [kind(p) for kind, p in zip(kinds, parts, strict=False)]
            return cls(*values)
        except ValueError as error:
            raise ValueError(
                f"{text!r} is no format; expected nf<bits>[-<bits of scales>-<dtype>-<values per "
                f"scale>-<scales per scale>], such as {cls()} ({error})"
            ) from error

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included, for matrices that consist of whole blocks.

        The offset and the table of levels are not counted.
        """
        scale = 8 * jnp.dtype(self.scale_dtype).itemsize
        return self.bits + self.scale_bits / self.block + scale / (self.block * self.scale_block)

    def blocks(self, count: int) -> tuple[int, int]:
        """Returns the numbers of scales and of scales of scales for ``count`` values."""
        scales = math.ceil(count / self.block)
        return scales, math.ceil(scales / self.scale_block)

    def nbytes(self, count: int) -> int:
        """Returns the stored bytes of a matrix of ``count`` values, offset included."""
        scales, supers = self.blocks(count)
        words = words_for(count, self.bits) + words_for(scales, self.scale_bits)
        return 4 * words + supers * jnp.dtype(self.scale_dtype).itemsize + 4


def grid() -> list[Format]:
    """Returns the 432 formats that LQ-LoRA's published integer program chooses from."""
    axes = (BITS, BITS, SCALE_DTYPES, (16, 32, 64), (16, 64, 256))
    return [Format(*values) for values in itertools.product(*axes)]


class Codes(NamedTuple):
    """A quantized vector of n values, one code per byte.

    Attributes:
      codes: indices of levels, ``[n]`` uint8.
      scales: codes u of the block scales, ``[⌈n/block⌉]`` uint8.
      supers: scales m of the block scales, ``[⌈scales/scale_block⌉]`` in ``scale_dtype``.
      offset: smallest block scale o, ``[]`` float32.
    """

    codes: Any
    scales: Any
    supers: Any
    offset: Any


class Packed(NamedTuple):
    """`Codes` as they are stored: ``codes`` and ``scales`` are packed into uint32 words."""

    codes: Any
    scales: Any
    supers: Any
    offset: Any


@functools.cache
def levels(bits: int) -> np.ndarray:
    """Returns the code book ``[2^bits]``, float32, increasing from -1 to 1 with an exact 0.

    Levels are quantiles of the normal distribution: 2^(bits-1) - 1 below 0, 2^(bits-1) above 0.
    """
    half = 2 ** (bits - 1)
    left = np.linspace(1 - _TAIL, 0.5, half)
    right = np.linspace(0.5, _TAIL, half + 1)[1:]
    table = ndtri(np.concatenate([left, right])) / ndtri(_TAIL)
    table[[0, half - 1, -1]] = -1, 0, 1  # exact; rounding is off by a few ulp
    table = table.astype(np.float32)
    table.setflags(write=False)
    return table


def nearest(x: Float[Array, "..."], bits: int) -> UInt[Array, "..."]:
    """Returns the index of the level nearest to x; ties go to the lower level. Saturates."""
    table = levels(bits).astype(np.float64)
    middles = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    if bits == 8:  # too many levels to select among; `searchsorted` takes 2.5 times as long
        # The first step gathers nothing: XLA would fold that gather at compile time.
        code = jnp.where(x > middles[127], 128, 0)
        for step in (64, 32, 16, 8, 4, 2, 1):
            code = code + jnp.where(x > jnp.asarray(middles)[code + step - 1], step, 0)
        return code.astype(jnp.uint8)
    # Bisection from the highest bit to the lowest, in one fused pass over x. Gathering the middles
    # would be slow, so each bit selects among the remaining ones.
    left, code = [jnp.asarray(middle) for middle in middles], jnp.zeros(x.shape, jnp.uint8)
    while left:
        half = len(left) // 2
        high = x > left[half]
        code = code << 1 | high.astype(jnp.uint8)
        pairs = zip(left[:half], left[half + 1 :], strict=True)
        left = [jnp.where(high, upper, lower) for lower, upper in pairs]
    return code


def lookup(codes: UInt[Array, "..."], bits: int) -> Float[Array, "..."]:
    """Returns the levels of codes, ``levels(bits)[codes]``."""
    table = levels(bits)
    if bits == 8:
        return jnp.asarray(table)[codes]
    # Selection from the lowest bit to the highest: a gather is slow when fused with `nearest`.
    values = [jnp.asarray(value) for value in table]
    for bit in range(bits):
        high = (codes >> bit & 1) > 0
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(high, upper, lower) for lower, upper in pairs]
    return values[0]


def block_scales(x: Float[Array, "n"], block: int) -> Float[Array, "blocks"]:
    """Returns the largest magnitude of each block of values."""
    return jnp.max(runs(jnp.abs(x), block), axis=1)


def runs(x: Array, length: int, fill: Any = 0) -> Array:
    """Returns a vector as rows ``[⌈n/length⌉, length]``; pads the last row with ``fill``."""
    return jnp.pad(x, (0, -len(x) % length), constant_values=fill).reshape(-1, length)


def quantize_scales(
    scales: Float[Array, "blocks"], form: Format
) -> tuple[UInt[Array, "blocks"], Float[Array, "supers"], Float[Array, ""]]:
    """Quantizes block scales: returns u, m and o of the module's docstring."""
    offset = jnp.min(scales)
    above = runs(scales - offset, form.scale_block)
    supers = jnp.max(above, axis=1).astype(form.scale_dtype)
    steps = 2**form.scale_bits - 1
    wide = supers.astype(jnp.float32)[:, None]
    rate = jnp.where(wide > 0, steps / jnp.where(wide > 0, wide, 1), 0)
    codes = jnp.clip(jnp.round(above * rate), 0, steps)
    return codes.reshape(-1)[: len(scales)].astype(jnp.uint8), supers, offset


def scale_steps(
    supers: Float[Array, "..."], form: Format
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns m/(2^scale_bits - 1) as a sum of two terms: ŝ = (o + u·first) + u·second."""
    # A product instead of m / steps, because compilers make it one anyway. The terms have 16 and 7
    # bits: their products with u are exact, so a fused multiply-add gives the same rounding.
    step = supers.astype(jnp.float32) * np.float32(1 / (2**form.scale_bits - 1))
    step = lax.reduce_precision(step, exponent_bits=8, mantissa_bits=22)
    high = lax.reduce_precision(step, exponent_bits=8, mantissa_bits=15)
    return high, step - high


def dequantize_scales(
    codes: UInt[Array, "blocks"],
    supers: Float[Array, "supers"],
    offset: Float[Array, ""],
    form: Format,
) -> Float[Array, "blocks"]:
    """Returns the decoded scales ŝ, bit-identical however the compiler fuses operations.

    So every program sees exactly the scales that the codes were chosen for.
    """
    high, low = scale_steps(supers[:, None], form)
    wide = runs(codes.astype(jnp.float32), form.scale_block)
    scales = offset + wide * high + wide * low
    scales = scales.reshape(-1)[: len(codes)]
    # An exact division by 1. XLA's CPU backend fuses across barriers and would compute a scale
    # again for each of its values. It does not repeat a division.
    return scales / jnp.maximum(codes.astype(jnp.float32) / 256, 1)


def quantize(x: Float[Array, "n"], form: Format) -> Codes:
    """Quantizes a vector, computed in float32."""
    x = x.astype(jnp.float32)
    scales, supers, offset = quantize_scales(block_scales(x, form.block), form)
    return round_to(x, Codes(None, scales, supers, offset), form)


def round_to(x: Float[Array, "n"], scaled: Codes, form: Format) -> Codes:
    """Returns the `Codes` of a vector for given scales.

    Args:
      x: the vector.
      scaled: the scales; its ``codes`` are not read.
      form: the format.
    """
    scales = dequantize_scales(scaled.scales, scaled.supers, scaled.offset, form)
    shares = runs(x, form.block) / jnp.where(scales > 0, scales, 1)[:, None]
    return scaled._replace(codes=nearest(shares, form.bits).reshape(-1)[: len(x)])


def dequantize(quantized: Codes, form: Format) -> Float[Array, "n"]:
    """Returns the decoded values ``[n]``, float32."""
    scales = dequantize_scales(quantized.scales, quantized.supers, quantized.offset, form)
    values = lookup(quantized.codes, form.bits)
    return (runs(values, form.block) * scales[:, None]).reshape(-1)[: len(values)]


def words_for(count: int, bits: int) -> int:
    """Returns the number of words for ``count`` codes, which are packed 32 at a time."""
    return math.ceil(count / WORD) * bits


def pack(codes: Int[Array, "n"], bits: int) -> UInt[Array, "words"]:
    """Packs codes below 2^bits into 32-bit words, 32 codes at a time; pads with zeros.

    With 2, 4 and 8 bits the first code is in the lowest bits of a word. With 3 bits, 32 codes take
    three words: bit i of the three words holds the three bits of code i, lowest first. This is the
    second of the LQ-LoRA authors' layouts.
    """
    chunks = runs(codes.astype(jnp.uint32), WORD)
    if bits == 3:
        places = jnp.arange(WORD, dtype=jnp.uint32)[None]
        planes = [(chunks >> plane & 1) << places for plane in range(3)]
        words = [jnp.sum(plane, axis=1, dtype=jnp.uint32) for plane in planes]
        return jnp.stack(words, axis=1).reshape(-1)
    per_word = WORD // bits
    shifts = bits * jnp.arange(per_word, dtype=jnp.uint32)[None]
    return jnp.sum(chunks.reshape(-1, per_word) << shifts, axis=1, dtype=jnp.uint32)


def unpack(words: UInt[Array, "words"], bits: int, count: int) -> UInt[Array, "n"]:
    """Returns the first ``count`` codes that `pack` packed, as uint8."""
    if bits == 3:
        places = jnp.arange(WORD, dtype=jnp.uint32)[None, None]
        planes = (words.reshape(-1, 3, 1) >> places) & 1
        codes = planes[:, 0] | planes[:, 1] << 1 | planes[:, 2] << 2
    elif bits == 8:  # codes are bytes already
        codes = lax.bitcast_convert_type(words, jnp.uint8)
    else:
        shifts = bits * jnp.arange(WORD // bits, dtype=jnp.uint32)[None]
        codes = (words[:, None] >> shifts) & (2**bits - 1)
    return codes.reshape(-1)[:count].astype(jnp.uint8)


def pack_codes(quantized: Codes, form: Format) -> Packed:
    """Packs a quantized vector into its stored form."""
    return Packed(
        pack(quantized.codes, form.bits),
        pack(quantized.scales, form.scale_bits),
        quantized.supers,
        quantized.offset,
    )


def unpack_codes(packed: Packed, form: Format, count: int) -> Codes:
    """Returns the codes of a packed vector of ``count`` values; the inverse of `pack_codes`."""
    return Codes(
        unpack(packed.codes, form.bits, count),
        unpack(packed.scales, form.scale_bits, form.blocks(count)[0]),
        packed.supers,
        packed.offset,
    )


def quantize_packed(x: Float[Array, "n"], form: Format) -> Packed:
    """Quantizes a vector and packs it."""
    return pack_codes(quantize(x, form), form)


def dequantize_packed(packed: Packed, form: Format, count: int) -> Float[Array, "n"]:
    """Returns the ``count`` decoded values of a packed vector, float32."""
    return dequantize(unpack_codes(packed, form, count), form)
