"""Matrix products with NormalFloat weights in one GPU kernel (Pallas, Triton).

The kernel computes ``y = x @ W + (x @ left) @ right`` and decodes W, an `NFQuantized`, tile by
tile. A *word group* is unpacked at once: one word of 16, 8 or 4 codes (2, 4, 8 bits), or three
words of 32 codes (3 bits). The codes at one place of all word groups form a *plane*. x is put into
the same order, so that nothing has to be shuffled::

    y[m, n] = Σ_places Σ_groups  x[m, place, group] · level[code[n, group, place]] · scale

A program computes a tile of rows and columns, and loops over the word groups. Shapes in the kernel:
N columns, M rows, G word groups of a step. Products are ``[N, G] @ [G, M]``, with the decoded
operand first, because tensor cores can read the first operand from registers. Decoded scales are
bit-identical to those of `normal_float`.
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
UNROLL = 8  # places that are unrolled; more would take long to compile
LEAST = 16  # smallest side of a tensor core's operands, in rows, columns and summands


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tile that a program computes, and how it is compiled. All sizes are powers of 2.

    Attributes:
      rows: rows of x. With 1 the program multiplies and adds; from 16 on it uses tensor cores.
      columns: columns of W, at least 16.
      word_groups: word groups of a column per step, at least 16.
      splits: number of parts of the inputs that different programs sum (split-K).
      gather: whether levels are read from a table or selected. 8 bits always read the table.
      warps: warps of 32 threads per program.
      stages: number of steps whose loads are in flight (software pipelining).

    Raises:
      ValueError: if a size is not a power of 2 or is too small.
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
    """Returns the tile for a number of rows of x that is used if nothing was measured."""
    if rows <= 4:
        return Tile(rows=1, columns=16, splits=2)
    if rows <= 64:
        return Tile(rows=max(LEAST, 2 ** (rows - 1).bit_length()), columns=32)
    return Tile(rows=64, columns=64, word_groups=16)


def codes_per_group(bits: int) -> int:
    """Returns the number of codes in a word group."""
    return normal_float.WORD if bits == 3 else normal_float.WORD // bits


def unsupported(x: Any, quantized: Any, low_rank: Any = None) -> str:
    """Returns the reason why the kernel cannot compute a product, or an empty string.

    Args:
      x: inputs ``[..., in]``; only shape and dtype are read.
      quantized: the matrix, an `NFQuantized`.
      low_rank: the low-rank term, a `LowRank`, or None.
    """
    if len(quantized.shape) != 2:
        return f"the quantized matrices are stacked: {quantized.shape}; expected [in, out]"
    fan_in, fan_out = quantized.shape
    if x.shape[-1:] != (fan_in,) or 0 in x.shape:
        return f"x is {x.shape}; expected [..., {fan_in}] that is not empty"
    if x.dtype.name not in DTYPES:
        return f"x is {x.dtype}; expected one of {', '.join(DTYPES)}"
    size = codes_per_group(quantized.format.bits)
    if fan_in % size:
        return (
            f"the matrix has {fan_in} inputs; expected a multiple of {size}, since codes of "
            f"{quantized.format.bits} bits are unpacked {size} at a time"
        )
    # Indices are 32-bit. Padding at most doubles x.
    if max(fan_in * fan_out, 2 * math.prod(x.shape), 2 * fan_out * math.prod(x.shape[:-1])) > 2**31:
        return f"x {x.shape} or the matrix {quantized.shape} is too large for 32-bit indices"
    for factor in () if low_rank is None else (low_rank.left, low_rank.right):
        if not isinstance(factor, (jax.Array, np.ndarray)) or factor.ndim != 2:
            return f"a low-rank factor is {type(factor).__name__}; expected an array, a matrix"
    if low_rank is not None and low_rank.shape != quantized.shape:
        return f"low_rank is {low_rank.shape}; expected {quantized.shape}, as the matrix"
    return ""


def matmul(
    x: Float[Array, "... in"],
    quantized: Any,
    low_rank: Any = None,
    *,
    tile: Tile | None = None,
    interpret: bool | None = None,
) -> Float[Array, "... out"]:
    """Returns ``x @ quantized + x @ low_rank`` in the dtype of ``x``, summed in float32.

    The result is differentiable in ``x`` and in the low-rank factors. The backward pass and
    ``vmap`` decode the whole matrix.

    Args:
      x: inputs ``[..., in]`` in bfloat16, float16 or float32.
      quantized: the matrix ``[in, out]``, an `NFQuantized`.
      low_rank: a `LowRank` of two arrays, or None.
      tile: the tile of a program; None chooses one by the number of rows.
      interpret: None runs the kernel when compiled for CUDA, and elsewhere decodes the whole
        matrix; False always runs the kernel; True interprets it, which works on any device.

    Returns:
      Outputs ``[..., out]``.

    Raises:
      ValueError: if the product is `unsupported`.
    """
    if reason := unsupported(x, quantized, low_rank):
        raise ValueError(f"the GPU kernel cannot compute this product: {reason}")
    rows = x.reshape(-1, x.shape[-1])
    inner = right = None
    if low_rank is not None:
        inner, right = jnp.matmul(rows, low_rank.left.astype(x.dtype)), low_rank.right
    mode = (tile or default_tile(len(rows)), interpret)
    y = _product(mode, rows, inner, right, quantized)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(mode: Any, x: Array, inner: Any, right: Any, quantized: Any) -> Array:
    """Returns ``x @ W + inner @ right``; ``inner`` ``[rows, rank]`` and ``right`` may be None."""
    return _choose(mode, x, inner, right, quantized)


def _forwards(mode: Any, x: Array, inner: Any, right: Any, quantized: Any) -> tuple[Array, Any]:
    return _choose(mode, x, inner, right, quantized), (inner, right, quantized)


def _backwards(mode: Any, residuals: Any, g: Array) -> tuple[Array, Any, Any, None]:
    del mode
    inner, right, quantized = residuals
    x_gradient = jnp.matmul(g, quantized.materialize_after(g).T)
    if inner is None:
        return x_gradient, None, None, None
    inner_gradient = jnp.matmul(g, right.astype(g.dtype).T)
    return x_gradient, inner_gradient, jnp.matmul(inner.T, g).astype(right.dtype), None


_product.defvjp(_forwards, _backwards)


def decoded(x: Array, quantized: Any, low_rank: Any = None) -> Array:
    """Returns the same product as `matmul`, but decodes the whole matrix."""
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
    """Reorders and pads x, runs the kernel, and removes the padding."""
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
    # The offset is passed as a vector, because the kernel reads references of one dimension.
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
    """Runs one program. ``sizes`` are the word groups of a column, and the columns."""
    x_ref, codes_ref, *scale_refs, table_ref = refs[:7]
    low_rank_refs, y_ref = refs[7:-1], refs[-1]
    per_column, fan_out = sizes
    size, words = codes_per_group(form.bits), 3 if form.bits == 3 else 1
    ragged = per_column % (tile.word_groups * tile.splits) > 0
    split = pl.program_id(2)
    columns = pl.program_id(1) * tile.columns + _iota(tile.columns)
    columns = jnp.minimum(columns, fan_out - 1)  # padding repeats the last column; cut off later

    def step(i: Array, total: Array) -> Array:
        first = (split * steps + i) * tile.word_groups
        word_groups = first + _iota(tile.word_groups)
        index = columns[:, None] * per_column + word_groups[None]
        # Word groups beyond the end of a column are multiplied by zeros of x.
        mask = jnp.broadcast_to(word_groups[None] < per_column, index.shape) if ragged else None
        packed = [_load(codes_ref, index * words + i, mask) for i in range(words)]
        read_scale = functools.partial(_scale, scale_refs, form=form, mask=mask)
        scale = read_scale(index * size)  # shared by a word group if blocks contain whole ones

        def unrolled(turn: Any, total: Array) -> Array:
            for place in range(min(size, UNROLL)):
                place = turn * UNROLL + place
                own = read_scale(index * size + place) if form.block % size else scale
                codes = _code(packed, place, form.bits)
                weights = own * _levels(table_ref, codes, form.bits, tile.gather)
                x = x_ref[:, place, pl.ds(first, tile.word_groups)]
                total += _weighted(weights, x)
            return total

        turns = size // UNROLL
        return unrolled(0, total) if turns < 2 else lax.fori_loop(0, turns, unrolled, total)

    wide = tile.word_groups if tile.rows == 1 else tile.rows
    y = lax.fori_loop(0, steps, step, jnp.zeros((tile.columns, wide), jnp.float32))
    if tile.rows == 1:
        y = jnp.sum(y, axis=1, keepdims=True)
    if low_rank_refs:
        first = (split == 0).astype(jnp.float32)
        inner_ref, right_ref = low_rank_refs
        y += first * _low_rank(inner_ref, right_ref, columns)
    y_ref[0] = y.T.astype(y_ref.dtype)


def _iota(length: int) -> Array:
    return jnp.arange(length, dtype=jnp.int32)


def _load(ref: Any, index: Array, mask: Array | None) -> Array:
    if mask is None:
        return ref[index]
    return triton.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def _code(words: list[Array], place: Any, bits: int) -> Array:
    """Returns the codes at one place of word groups, uint32; ``words`` are those of a group."""
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
    """Returns the scales of values at flat indices, as `normal_float.dequantize_scales` does."""
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
    """Returns ``weights [N, G] @ x [M, G].T``, or for a single row the terms of the sum."""
    if len(x) == 1:
        return weights.astype(jnp.float32) * x.astype(jnp.float32)
    contract = (((1,), (1,)), ((), ()))
    weights = weights.astype(x.dtype)
    return lax.dot_general(weights, x, contract, preferred_element_type=jnp.float32)


def _low_rank(inner_ref: Any, right_ref: Any, columns: Array) -> Array:
    """Returns ``(inner @ right).T [N, M]`` for a tile; the rank of ``inner`` is padded by zeros."""

    def step(i: Array, total: Array) -> Array:
        ranks = jnp.minimum(i * LEAST + _iota(LEAST), right_ref.shape[0] - 1)
        right = right_ref[ranks[:, None], columns[None]].astype(inner_ref.dtype)
        terms = _weighted(right.T, inner_ref[:, pl.ds(i * LEAST, LEAST)])
        return total + (jnp.sum(terms, axis=1, keepdims=True) if rows == 1 else terms)

    rows, rank = inner_ref.shape
    return lax.fori_loop(0, rank // LEAST, step, jnp.zeros((len(columns), rows), jnp.float32))
