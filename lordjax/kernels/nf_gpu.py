"""Dequantise and multiply in one GPU kernel (Pallas, Triton): W never exists outside a tile.

``y = x @ W + (x @ left) @ right``, W being `kernels.NFQuantized`. A *group* is what is unpacked at
once: a word of 16, 8 or 4 codes (2, 4, 8 bits), three words of 32 codes (3 bits). The codes at one
place of all word_groups are a *plane*; x is put into the same order, so that nothing is shuffled::

    y[m, n] = Σ_places Σ_groups  x[m, place, group] · level[code[n, group, place]] · scale

A program owns a tile of rows and columns and walks along the word_groups. Shapes in the kernel: N
columns, M rows, G word_groups of a step; products are taken as ``[N, G] @ [G, M]``, the decoded side
first, which a tensor core may read from registers. Scales are decoded to the bits of `nf`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from lordjax.kernels import normal_float

DTYPES = ("bfloat16", "float16", "float32")
UNROLL = 8  # codes_per_group that are written out; all of them would take long to compile
LEAST = 16  # a tensor core's shortest side, in rows, columns and products


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program does, and how it is compiled. Sizes are powers of 2.

    Attributes:
      rows: 1 multiplies and adds up; 16 and more use tensor cores.
      columns: at least 16.
      word_groups: of a column, per step; at least 16.
      splits: parts of the inputs that are summed apart, for more programs than there are tiles.
      gather: levels are read from a table, else selected; 8 bits are always read.
      warps: of 32 threads, per program.
      stages: steps whose loads are under way.
    """

    rows: int
    columns: int
    word_groups: int = 32
    splits: int = 1
    gather: bool = True
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        sizes = (self.rows, self.columns, self.word_groups, self.splits, self.warps)
        small = min(self.columns, self.word_groups) < LEAST or 1 < self.rows < LEAST
        if small or any(size < 1 or size & (size - 1) for size in sizes):
            raise ValueError(
                f"{self}: expected powers of 2, columns and word_groups of at least {LEAST}, "
                f"and 1 row or at least {LEAST}"
            )


def default_tile(rows: int) -> Tile:
    """A tile for a number of rows of x, where nothing was measured."""
    if rows <= 4:
        return Tile(rows=1, columns=16, splits=2)
    if rows <= 64:
        return Tile(rows=max(LEAST, 2 ** (rows - 1).bit_length()), columns=32)
    return Tile(rows=64, columns=64, word_groups=16)


def codes_per_group(bits: int) -> int:
    """Codes of a group."""
    return normal_float.WORD if bits == 3 else normal_float.WORD // bits


def unsupported(x: Any, quantized: Any, low_rank: Any = None) -> str:
    """Why the kernel cannot be used for these, or nothing.

    Args:
      x: ``[..., in]``; shape and dtype are read.
      quantized: `kernels.NFQuantized`.
      low_rank: `kernels.LowRank` or None.
    """
    if len(quantized.shape) != 2:
        return f"quantised matrices are stacked: {quantized.shape}; expected [in, out]"
    fan_in, fan_out = quantized.shape
    if x.shape[-1:] != (fan_in,) or 0 in x.shape:
        return f"x is {x.shape}; expected [..., {fan_in}] that is not empty"
    if x.dtype.name not in DTYPES:
        return f"x is {x.dtype}; expected one of {', '.join(DTYPES)}"
    if fan_in % codes_per_group(quantized.format.bits):
        return (
            f"{fan_in} inputs; {quantized.format.bits} bits are unpacked "
            f"{codes_per_group(quantized.format.bits)} at a time"
        )
    # Indices are 32-bit; padding at most doubles x.
    if max(fan_in * fan_out, 2 * math.prod(x.shape), 2 * fan_out * math.prod(x.shape[:-1])) > 2**31:
        return f"x {x.shape} or the matrix {quantized.shape} is too large for 32-bit indices"
    for factor in () if low_rank is None else (low_rank.left, low_rank.right):
        if not isinstance(factor, (jax.Array, np.ndarray)) or factor.ndim != 2:
            return f"a factor is {type(factor).__name__}; expected a matrix that is an array"
    if low_rank is not None and low_rank.shape != quantized.shape:
        return f"low_rank is {low_rank.shape}, the quantised matrix {quantized.shape}"
    return ""


def matmul(
    x: Float[Array, "... in"],
    quantized: Any,
    low_rank: Any = None,
    *,
    tile: Tile | None = None,
    interpret: bool | None = None,
) -> Float[Array, "... out"]:
    """``x @ quantized + x @ low_rank`` in the dtype of ``x``, summed in float32.

    Differentiable in ``x`` and the low-rank factors; the derivative decodes the whole matrix, and
    so does ``vmap``.

    Args:
      x: bfloat16, float16 or float32.
      quantized: `kernels.NFQuantized`.
      low_rank: `kernels.LowRank` of two arrays, or None.
      tile: None chooses by the number of rows.
      interpret: None runs the kernel where it is compiled for CUDA, and elsewhere decodes the whole
        matrix; False always runs the kernel; True interprets it, which works anywhere.

    Raises:
      ValueError: if `unsupported` says why.
    """
    if reason := unsupported(x, quantized, low_rank):
        raise ValueError(f"no kernel for this product: {reason}")
    rows = x.reshape(-1, x.shape[-1])
    inner = right = None
    if low_rank is not None:
        inner, right = jnp.matmul(rows, low_rank.left.astype(x.dtype)), low_rank.right
    mode = (tile or default_tile(len(rows)), interpret)
    y = _product(mode, rows, inner, right, quantized)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(mode: Any, x: Array, inner: Any, right: Any, quantized: Any) -> Array:
    """``x @ W + inner @ right``; inner ``[rows, rank]`` and right may be None."""
    return _choose(mode, x, inner, right, quantized)


def _forwards(mode: Any, x: Array, inner: Any, right: Any, quantized: Any) -> tuple[Array, Any]:
    return _choose(mode, x, inner, right, quantized), (inner, right, quantized)


def _backwards(mode: Any, kept: Any, g: Array) -> tuple[Array, Any, Any, None]:
    del mode
    inner, right, quantized = kept
    of_x = jnp.matmul(g, quantized.materialize_after(g).T)
    if inner is None:
        return of_x, None, None, None
    of_inner = jnp.matmul(g, right.astype(g.dtype).T)
    return of_x, of_inner, jnp.matmul(inner.T, g).astype(right.dtype), None


_product.defvjp(_forwards, _backwards)


def decoded(x: Array, quantized: Any, low_rank: Any = None) -> Array:
    """`matmul` without the kernel: the whole matrix is decoded."""
    if low_rank is None:
        return _decoded(x, None, None, quantized)
    return _decoded(x, jnp.matmul(x, low_rank.left.astype(x.dtype)), low_rank.right, quantized)


def _decoded(x: Array, inner: Any, right: Any, quantized: Any) -> Array:
    y = jnp.matmul(x, quantized.materialize_after(x))
    return y if inner is None else y + jnp.matmul(inner, right.astype(x.dtype))


@functools.partial(jax.jit, static_argnums=0)
def _choose(mode: Any, *operands: Any) -> Array:
    tile, interpret = mode
    kernel = jax.custom_batching.custom_vmap(functools.partial(_launch, tile, bool(interpret)))

    @kernel.def_vmap
    def _(size: int, batched: Any, *operands: Any) -> tuple[Array, bool]:
        axes = jax.tree.map(lambda mapped: 0 if mapped else None, tuple(batched))
        return jax.vmap(_decoded, in_axes=axes, axis_size=size)(*operands), True

    if interpret is None:
        return lax.platform_dependent(*operands, cuda=kernel, default=_decoded)
    return kernel(*operands)


def _launch(tile: Tile, interpret: bool, x: Array, inner: Any, right: Any, quantized: Any) -> Array:
    """Puts x in order, pads, runs the kernel, cuts."""
    form, rows = quantized.format, len(x)
    fan_in, fan_out = quantized.shape
    size = codes_per_group(form.bits)
    steps = math.ceil(fan_in // size / (tile.word_groups * tile.splits))
    word_groups = steps * tile.word_groups * tile.splits
    tiles = (math.ceil(rows / tile.rows), math.ceil(fan_out / tile.columns))
    more = tiles[0] * tile.rows - rows
    planes = jnp.pad(
        x.reshape(rows, -1, size), ((0, more), (0, word_groups - fan_in // size), (0, 0))
    )
    planes = planes.transpose(0, 2, 1)
    high, low = normal_float.scale_steps(quantized.supers, form)
    # A reference of one dimension: also the offset, and a format of 8 bits reads 256 levels.
    operands = [planes, quantized.codes, quantized.scales, high, low, quantized.offset.reshape(1)]
    operands.append(jnp.asarray(normal_float.levels(form.bits)))
    whole = [pl.BlockSpec()] * 6
    specs = [pl.BlockSpec((tile.rows, size, word_groups), lambda i, j, k: (i, 0, 0)), *whole]
    if inner is not None:
        rank = math.ceil(inner.shape[1] / LEAST) * LEAST
        operands += [jnp.pad(inner, ((0, more), (0, rank - inner.shape[1]))), right]
        specs += [pl.BlockSpec((tile.rows, rank), lambda i, j, k: (i, 0)), pl.BlockSpec()]
    shape = (tile.splits, tiles[0] * tile.rows, tiles[1] * tile.columns)
    y = pl.pallas_call(
        functools.partial(_kernel, tile, form, (fan_in // size, fan_out), steps),
        grid=(*tiles, tile.splits),
        in_specs=specs,
        out_specs=pl.BlockSpec((1, tile.rows, tile.columns), lambda i, j, k: (k, i, j)),
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype if tile.splits == 1 else jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="nf_matmul",
    )(*operands)
    y = y[0] if tile.splits == 1 else jnp.sum(y, axis=0).astype(x.dtype)
    return y[:rows, :fan_out]


def _kernel(
    tile: Tile, form: normal_float.Format, sizes: tuple[int, int], steps: int, *refs: Any
) -> None:
    """One program; ``sizes`` are the word_groups of a column and the columns."""
    x_ref, codes_ref, *scale_refs, table_ref = refs[:7]
    low_rank_refs, y_ref = refs[7:-1], refs[-1]
    per_column, fan_out = sizes
    size, words = codes_per_group(form.bits), 3 if form.bits == 3 else 1
    ragged = per_column % (tile.word_groups * tile.splits) > 0
    split = pl.program_id(2)
    columns = pl.program_id(1) * tile.columns + _count(tile.columns)
    columns = jnp.minimum(columns, fan_out - 1)  # beyond the last one: computed again, cut off

    def step(i: Array, total: Array) -> Array:
        first = (split * steps + i) * tile.word_groups
        word_groups = first + _count(tile.word_groups)
        index = columns[:, None] * per_column + word_groups[None]
        # Groups beyond the column's last meet zeros of x.
        mask = jnp.broadcast_to(word_groups[None] < per_column, index.shape) if ragged else None
        packed = [_load(codes_ref, index * words + i, mask) for i in range(words)]
        read_scale = functools.partial(_scale, scale_refs, form=form, mask=mask)
        scale = read_scale(index * size)  # of a whole group, where blocks hold whole word_groups

        def some(turn: Any, total: Array) -> Array:
            for place in range(min(size, UNROLL)):
                place = turn * UNROLL + place
                own = read_scale(index * size + place) if form.block % size else scale
                codes = _code(packed, place, form.bits)
                weights = own * _levels(table_ref, codes, form.bits, tile.gather)
                x = x_ref[:, place, pl.ds(first, tile.word_groups)]
                total += _weighted(weights, x)
            return total

        turns = size // UNROLL
        return some(0, total) if turns < 2 else lax.fori_loop(0, turns, some, total)

    wide = tile.word_groups if tile.rows == 1 else tile.rows
    y = lax.fori_loop(0, steps, step, jnp.zeros((tile.columns, wide), jnp.float32))
    if tile.rows == 1:
        y = jnp.sum(y, axis=1, keepdims=True)
    if low_rank_refs:
        first = (split == 0).astype(jnp.float32)
        inner_ref, right_ref = low_rank_refs
        y += first * _low_rank(inner_ref, right_ref, columns)
    y_ref[0] = y.T.astype(y_ref.dtype)


def _count(length: int) -> Array:
    return jnp.arange(length, dtype=jnp.int32)


def _load(ref: Any, index: Array, mask: Array | None) -> Array:
    if mask is None:
        return ref[index]
    return triton.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def _code(words: list[Array], place: Any, bits: int) -> Array:
    """Codes at a place of word_groups, uint32; ``words`` are those of a group."""
    place = jnp.asarray(place, jnp.uint32)
    if bits == 3:
        planes = [(word >> place & 1) << i for i, word in enumerate(words)]
        return planes[0] | planes[1] | planes[2]
    return words[0] >> (place * bits) & (2**bits - 1)


def _levels(ref: Any, codes: Array, bits: int, gather: bool) -> Array:
    if gather or bits == 8:
        return ref[codes.astype(jnp.int32)]
    return normal_float.lookup(codes, bits)


def _scale(refs: Any, index: Array, *, form: normal_float.Format, mask: Array | None) -> Array:
    """Scales of the values at flat indices, as `nf.dequantize_scales`."""
    scales_ref, high_ref, low_ref, offset_ref = refs
    size, words = codes_per_group(form.scale_bits), 3 if form.scale_bits == 3 else 1
    block = lax.div(index, jnp.int32(form.block))
    group, place = lax.div(block, jnp.int32(size)), lax.rem(block, jnp.int32(size))
    packed = [_load(scales_ref, group * words + i, mask) for i in range(words)]
    steps = _code(packed, place, form.scale_bits).astype(jnp.float32)
    parent = lax.div(block, jnp.int32(form.scale_block))
    high, low = (_load(ref, parent, mask) for ref in (high_ref, low_ref))
    return offset_ref[0] + steps * high + steps * low


def _weighted(weights: Array, x: Array) -> Array:
    """``weights [N, G]`` times ``x [M, G]``: ``[N, M]``, or a term per group of a single row."""
    if len(x) == 1:
        return weights.astype(jnp.float32) * x.astype(jnp.float32)
    contract = (((1,), (1,)), ((), ()))
    weights = weights.astype(x.dtype)
    return lax.dot_general(weights, x, contract, preferred_element_type=jnp.float32)


def _low_rank(inner_ref: Any, right_ref: Any, columns: Array) -> Array:
    """``(inner @ right)ᵀ [N, M]`` of a tile; inner is padded to a multiple of `LEAST` by zeros."""

    def step(i: Array, total: Array) -> Array:
        ranks = jnp.minimum(i * LEAST + _count(LEAST), right_ref.shape[0] - 1)
        right = right_ref[ranks[:, None], columns[None]].astype(inner_ref.dtype)
        terms = _weighted(right.T, inner_ref[:, pl.ds(i * LEAST, LEAST)])
        return total + (jnp.sum(terms, axis=1, keepdims=True) if rows == 1 else terms)

    rows, rank = inner_ref.shape
    return lax.fori_loop(0, rank // LEAST, step, jnp.zeros((len(columns), rows), jnp.float32))
