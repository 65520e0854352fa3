"""NormalFloat: 2, 3, 4 and 8 bit codes with blockwise scales that are quantised themselves.

Arrays in, arrays out. Values are a flat vector; blocks are runs of it. A kernel ``[in, out]`` is
flattened so that inputs run fastest (the rows of a PyTorch weight), see `kernels.NFQuantized`.

Per block of ``block`` values: scale s = max|x|. Per matrix: offset o = min s. Per group of
``scale_block`` scales: m = max(s - o), stored as ``scale_dtype``. Then::

    u = round((s - o)·(2^scale_bits - 1)/m)      ŝ = o + u·m/(2^scale_bits - 1)
    code = index of the level nearest to x/ŝ     x̂ = level[code]·ŝ

Differences from QLoRA: the offset is the least scale, not the mean, so that u is unsigned.

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

WORD = 32  # bits of a word of packed codes, and codes that are packed together
BITS = (2, 3, 4, 8)
SCALE_DTYPES = ("bfloat16", "float16", "float32")
# The authors' constant: a truncation of 1 - (1/30 + 1/32)/2, the same for every number of bits.
_TAIL = 0.9677083


@dataclasses.dataclass(frozen=True)
class Format:
    """How a matrix is quantised.

    Attributes:
      bits: of a code: 2, 3, 4 or 8.
      scale_bits: of a block's scale: 2, 3, 4 or 8.
      scale_dtype: of the scales' own scale: bfloat16, float16 or float32.
      block: values per scale.
      scale_block: scales per scale of scales.

    Raises:
      ValueError: if a value is not one of those.
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
        """Such as ``nf4-8-float32-64-256``; `parse` reads it."""
        return f"nf{'-'.join(str(value) for value in dataclasses.astuple(self))}"

    @classmethod
    def parse(cls, text: str) -> Format:
        """Reads what ``str`` wrote; trailing parts may be left out: ``nf4`` is QLoRA's.

        Raises:
          ValueError: if it is no such name.
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
        """Of shapes that all blocks divide; without the offset and the table of levels."""
        scale = 8 * jnp.dtype(self.scale_dtype).itemsize
        return self.bits + self.scale_bits / self.block + scale / (self.block * self.scale_block)

    def blocks(self, count: int) -> tuple[int, int]:
        """Numbers of scales, and of scales of scales, of a matrix of ``count`` values."""
        scales = math.ceil(count / self.block)
        return scales, math.ceil(scales / self.scale_block)

    def nbytes(self, count: int) -> int:
        """Bytes of a matrix of ``count`` values as it is stored, the offset included."""
        scales, supers = self.blocks(count)
        words = words_for(count, self.bits) + words_for(scales, self.scale_bits)
        return 4 * words + supers * jnp.dtype(self.scale_dtype).itemsize + 4


def grid() -> list[Format]:
    """All formats of the published integer programme's code: 432."""
    axes = (BITS, BITS, SCALE_DTYPES, (16, 32, 64), (16, 64, 256))
    return [Format(*values) for values in itertools.product(*axes)]


class Codes(NamedTuple):
    """A quantised vector of n values, codes one per byte.

    Attributes:
      codes: ``[n]`` uint8 indices of levels.
      scales: ``[⌈n/block⌉]`` uint8, u.
      supers: ``[⌈scales/scale_block⌉]``, m, in the format's ``scale_dtype``.
      offset: ``[]`` float32, o.
    """

    codes: Any
    scales: Any
    supers: Any
    offset: Any


class Packed(NamedTuple):
    """`Codes` as stored: ``codes`` and ``scales`` are uint32 words."""

    codes: Any
    scales: Any
    supers: Any
    offset: Any


@functools.cache
def levels(bits: int) -> np.ndarray:
    """The code book ``[2^bits]``, float32, rising from -1 to 1 through an exact 0.

    Quantiles of the normal distribution: 2^(bits-1) negative steps, one more positive.
    """
    half = 2 ** (bits - 1)
    left = np.linspace(1 - _TAIL, 0.5, half)
    right = np.linspace(0.5, _TAIL, half + 1)[1:]
    table = ndtri(np.concatenate([left, right])) / ndtri(_TAIL)
    table[[0, half - 1, -1]] = -1, 0, 1  # which rounding misses by a few ulp
    table = table.astype(np.float32)
    table.setflags(write=False)
    return table


def nearest(x: Float[Array, "..."], bits: int) -> UInt[Array, "..."]:
    """Index of the level nearest to x; the lower one of a tie. Saturates."""
    table = levels(bits).astype(np.float64)
    middles = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    if bits == 8:  # too many to select among; `searchsorted` takes 2.5 times as long
        code = jnp.where(x > middles[127], 128, 0)  # no gather: XLA would find it when compiling
        for step in (64, 32, 16, 8, 4, 2, 1):
            code = code + jnp.where(x > jnp.asarray(middles)[code + step - 1], step, 0)
        return code.astype(jnp.uint8)
    # Bisection, bit by bit from the highest, in one fused pass over x. Gathering the middles would
    # be slow, so each bit selects among those that are left.
    left, code = [jnp.asarray(middle) for middle in middles], jnp.zeros(x.shape, jnp.uint8)
    while left:
        half = len(left) // 2
        high = x > left[half]
        code = code << 1 | high.astype(jnp.uint8)
        pairs = zip(left[:half], left[half + 1 :], strict=True)
        left = [jnp.where(high, upper, lower) for lower, upper in pairs]
    return code


def lookup(codes: UInt[Array, "..."], bits: int) -> Float[Array, "..."]:
    """``levels(bits)[codes]``."""
    table = levels(bits)
    if bits == 8:
        return jnp.asarray(table)[codes]
    # Bit by bit, from the lowest: a gather that is fused with the search for codes is slow.
    values = [jnp.asarray(value) for value in table]
    for bit in range(bits):
        high = (codes >> bit & 1) > 0
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(high, upper, lower) for lower, upper in pairs]
    return values[0]


def block_scales(x: Float[Array, "n"], block: int) -> Float[Array, "blocks"]:
    """Largest magnitude of each run of ``block`` values."""
    return jnp.max(runs(jnp.abs(x), block), axis=1)


def runs(x: Array, length: int, fill: Any = 0) -> Array:
    """``[n]`` as ``[⌈n/length⌉, length]``, the last run filled up."""
    return jnp.pad(x, (0, -len(x) % length), constant_values=fill).reshape(-1, length)


def quantize_scales(
    scales: Float[Array, "blocks"], form: Format
) -> tuple[UInt[Array, "blocks"], Float[Array, "supers"], Float[Array, ""]]:
    """u, m and o of the module's docstring."""
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
    """m/(2^scale_bits - 1) in two terms: ŝ = (o + u·first) + u·second."""
    # Not m / steps: compilers turn that into this product. In terms of 16 and 7 bits, whose
    # products with u are exact, so that a fused multiply-add rounds like the two operations.
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
    """ŝ, with the same bits however a compiler fuses: codes fit the scales they were made for."""
    high, low = scale_steps(supers[:, None], form)
    wide = runs(codes.astype(jnp.float32), form.scale_block)
    scales = offset + wide * high + wide * low
    scales = scales.reshape(-1)[: len(codes)]
    # Divided by 1, exactly: XLA on CPU, which fuses across barriers, would find a scale again for
    # each of its values; a division it does not repeat.
    return scales / jnp.maximum(codes.astype(jnp.float32) / 256, 1)


def quantize(x: Float[Array, "n"], form: Format) -> Codes:
    """Quantises a vector, computed in float32."""
    x = x.astype(jnp.float32)
    scales, supers, offset = quantize_scales(block_scales(x, form.block), form)
    return round_to(x, Codes(None, scales, supers, offset), form)


def round_to(x: Float[Array, "n"], scaled: Codes, form: Format) -> Codes:
    """`Codes` of a vector for scales that are given; those of ``scaled`` are not read."""
    scales = dequantize_scales(scaled.scales, scaled.supers, scaled.offset, form)
    shares = runs(x, form.block) / jnp.where(scales > 0, scales, 1)[:, None]
    return scaled._replace(codes=nearest(shares, form.bits).reshape(-1)[: len(x)])


def dequantize(quantized: Codes, form: Format) -> Float[Array, "n"]:
    """The values ``[n]``, float32."""
    scales = dequantize_scales(quantized.scales, quantized.supers, quantized.offset, form)
    values = lookup(quantized.codes, form.bits)
    return (runs(values, form.block) * scales[:, None]).reshape(-1)[: len(values)]


def words_for(count: int, bits: int) -> int:
    """Words that ``count`` codes are packed into: whole groups of 32 codes."""
    return math.ceil(count / WORD) * bits


def pack(codes: Int[Array, "n"], bits: int) -> UInt[Array, "words"]:
    """Packs codes below 2^bits into 32-bit words; the last group is filled with zeros.

    2, 4 and 8 bits: the first code in the lowest bits of a word. 3 bits: of 32 codes, bit i of
    the three words are the three bits of code i, the lowest first. The authors' second layout.
    """
    groups = runs(codes.astype(jnp.uint32), WORD)
    if bits == 3:
        places = jnp.arange(WORD, dtype=jnp.uint32)[None]
        planes = [(groups >> plane & 1) << places for plane in range(3)]
        words = [jnp.sum(plane, axis=1, dtype=jnp.uint32) for plane in planes]
        return jnp.stack(words, axis=1).reshape(-1)
    per_word = WORD // bits
    shifts = bits * jnp.arange(per_word, dtype=jnp.uint32)[None]
    return jnp.sum(groups.reshape(-1, per_word) << shifts, axis=1, dtype=jnp.uint32)


def unpack(words: UInt[Array, "words"], bits: int, count: int) -> UInt[Array, "n"]:
    """The first ``count`` codes of `pack`, as uint8."""
    if bits == 3:
        places = jnp.arange(WORD, dtype=jnp.uint32)[None, None]
        planes = (words.reshape(-1, 3, 1) >> places) & 1
        codes = planes[:, 0] | planes[:, 1] << 1 | planes[:, 2] << 2
    elif bits == 8:  # bytes are there: nothing to compute
        codes = lax.bitcast_convert_type(words, jnp.uint8)
    else:
        shifts = bits * jnp.arange(WORD // bits, dtype=jnp.uint32)[None]
        codes = (words[:, None] >> shifts) & (2**bits - 1)
    return codes.reshape(-1)[:count].astype(jnp.uint8)


def pack_codes(quantized: Codes, form: Format) -> Packed:
    """As it is stored."""
    return Packed(
        pack(quantized.codes, form.bits),
        pack(quantized.scales, form.scale_bits),
        quantized.supers,
        quantized.offset,
    )


def unpack_codes(packed: Packed, form: Format, count: int) -> Codes:
    """Inverse of `pack_codes` for ``count`` values."""
    return Codes(
        unpack(packed.codes, form.bits, count),
        unpack(packed.scales, form.scale_bits, form.blocks(count)[0]),
        packed.supers,
        packed.offset,
    )


def quantize_packed(x: Float[Array, "n"], form: Format) -> Packed:
    """Quantises a vector and packs it."""
    return pack_codes(quantize(x, form), form)


def dequantize_packed(packed: Packed, form: Format, count: int) -> Float[Array, "n"]:
    """The ``count`` values that `encode` stored, float32."""
    return dequantize(unpack_codes(packed, form, count), form)
