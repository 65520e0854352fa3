"""Matrix products with NormalFloat weights on CPU, decoded tile by tile.

A decoded matrix of a large model does not fit into the cache, and writing and reading it costs more
than the product. So rows of the transposed matrix are decoded in tiles, each used at once. Codes
are looked up byte by byte, with one table per position p in the byte; codes at one position belong
to every n-th input, n being the number of codes in a byte. With few rows of inputs the tile is the
left operand, which needs no packing; with many rows it is the right one.

A single row of inputs needs no tile. Codes are looked up, multiplied and summed in one pass over
the words. Two levels are read at a time, as the halves of one 64-bit number: 0.7 to 0.9 cycles per
weight and core (Zen 3, AVX2), where one level at a time takes 1.3. The remaining cost is one lookup
per two weights, for which x86 has no fast vector instruction.

``scripts/benchmarks/gpu/kernels.py`` measures these numbers.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lordjax.kernels import normal_float
from lordjax.runtime import xla_scheduling

TILE = 2**18  # decoded values per tile: 1 MB; two cores each hold half of it in their caches
ROW_TILE = 2**20  # weights per loop iteration for a single row of inputs
FEW = 32  # largest number of input rows for which the tile is the left operand
LEAST = 8  # rows of a tile; with fewer a loop iteration does not pay off


def supported(quantized: Any) -> bool:
    """Returns whether an `NFQuantized` can be decoded in tiles.

    It must be a single matrix whose outputs start at word and block boundaries.
    """
    form, fan_in = quantized.format, quantized.fan_in
    whole = (
        fan_in % normal_float.WORD == 0
        if form.bits == 3
        else fan_in * form.bits % normal_float.WORD == 0
    )
    return (
        quantized.codes.ndim == 1
        and whole
        and fan_in * quantized.fan_out % normal_float.WORD == 0  # codes end with the last word
        and fan_in % form.block == 0
        and _tile_rows(fan_in, quantized.fan_out, TILE) >= min(LEAST, quantized.fan_out)
    )


def product(x: Float[Array, "... in"], quantized: Any) -> Float[Array, "... out"]:
    """Returns ``x @ W`` in the dtype of ``x``, for a matrix that is `supported`."""
    rows = x.reshape(-1, quantized.fan_in)
    codes, scales = _codes_after(x, quantized)
    if len(rows) == 1 and _scales_by_words(quantized.format):
        y = _one_row(rows[0], codes, scales, quantized)[None].astype(x.dtype)
    elif len(rows) <= FEW:
        y = _few_rows(rows, codes, scales, quantized)
    else:
        y = _many_rows(rows, codes, scales, quantized)
    return y.reshape(*x.shape[:-1], quantized.fan_out)


def _few_rows(rows: Array, codes: Array, scales: Array, quantized: Any) -> Array:
    """Returns ``rows @ W`` as ``(W.T @ rows.T).T``, for which a tile needs no repacking."""
    tiles, tables = _tiles(codes, scales, quantized)
    inputs = [rows[:, k :: len(tables)].T for k in range(len(tables))]

    def part(tile: tuple[Array, Array]) -> Array:
        decoded = _decoded(*tile, tables, rows.dtype)
        return functools.reduce(jnp.add, map(jnp.matmul, decoded, inputs))

    return _map_tiles(part, tiles).reshape(quantized.fan_out, len(rows)).T


def _many_rows(rows: Array, codes: Array, scales: Array, quantized: Any) -> Array:
    """Returns ``rows @ W``, written tile by tile in blocks of columns."""
    tiles, tables = _tiles(codes, scales, quantized)
    inputs = [rows[:, k :: len(tables)] for k in range(len(tables))]
    height = tiles[0].shape[1]

    def turn(y: Array, numbered: tuple[Array, tuple[Array, Array]]) -> tuple[Array, None]:
        number, tile = numbered
        decoded = _decoded(*tile, tables, rows.dtype)
        parts = (a @ w.T for a, w in zip(inputs, decoded, strict=True))
        part = functools.reduce(jnp.add, parts)
        return lax.dynamic_update_slice_in_dim(y, part, number * height, 1), None

    y = _zeros_after(rows, (len(rows), quantized.fan_out))
    if len(tiles[0]) == 1:
        return turn(y, (jnp.int32(0), (tiles[0][0], tiles[1][0])))[0]
    return lax.scan(turn, y, (jnp.arange(len(tiles[0])), tiles))[0]


def _map_tiles(fn: Any, tiles: tuple[Array, Array]) -> Array:
    """Applies ``fn`` to every tile; without a loop for a single tile, which compiles faster."""
    if len(tiles[0]) == 1:
        return fn((tiles[0][0], tiles[1][0]))
    return lax.map(fn, tiles)


def transposed_product(g: Float[Array, "... out"], quantized: Any) -> Float[Array, "... in"]:
    """Returns ``g @ W.T`` in the dtype of ``g``, for a matrix that is `supported`."""
    rows = g.reshape(-1, quantized.fan_out)
    tiles, tables = _tiles(*_codes_after(g, quantized), quantized)
    height = tiles[0].shape[1]
    zeros = _zeros_after(g, (len(rows), quantized.fan_in // len(tables)))

    def turn(
        sums: list[Array], numbered: tuple[Array, tuple[Array, Array]]
    ) -> tuple[list[Array], None]:
        number, (places, scales) = numbered
        part = lax.dynamic_slice_in_dim(rows, number * height, height, 1)
        decoded = _decoded(places, scales, tables, g.dtype)
        return [s + part @ w for s, w in zip(sums, decoded, strict=True)], None

    sums, _ = lax.scan(turn, [zeros] * len(tables), (jnp.arange(len(tiles[0])), tiles))
    return jnp.stack(sums, axis=-1).reshape(*g.shape[:-1], quantized.fan_in)


def _codes_after(x: Array, quantized: Any) -> tuple[Array, Array]:
    """Returns packed codes that depend on ``x``, and decoded scales ``[out, blocks]``.

    The dependency has the reason given in `NFQuantized.materialize_after`.
    """
    form, shape = quantized.format, (quantized.fan_out, quantized.fan_in // quantized.format.block)
    codes = quantized.codes + xla_scheduling.false_after(x).astype(quantized.codes.dtype)
    scales = normal_float.dequantize_scales(
        normal_float.unpack(quantized.scales, form.scale_bits, math.prod(shape)),
        quantized.supers,
        quantized.offset,
        form,
    )
    return codes, scales.reshape(shape)


def _zeros_after(x: Array, shape: tuple[int, ...]) -> Array:
    """Returns zeros that depend on ``x``: XLA would allocate those of all layers at once."""
    return jnp.broadcast_to(xla_scheduling.false_after(x).astype(x.dtype), shape)


def _tile_rows(fan_in: int, fan_out: int, tile: int) -> int:
    """Returns the rows of a tile: the largest divisor of ``fan_out`` within ``tile`` values."""
    limit = max(1, tile // fan_in)
    return max(d for d in range(1, min(limit, fan_out) + 1) if fan_out % d == 0)


def _tables(bits: int) -> list[np.ndarray]:
    """Returns a table ``[256]``, byte -> level, per code in a byte; with 3 bits code -> level."""
    levels = normal_float.levels(bits)
    if bits == 3:
        return [levels]
    byte = np.arange(256)
    return [levels[byte >> shift & (2**bits - 1)] for shift in range(0, 8, bits)]


def _tiles(codes: Array, scales: Array, quantized: Any) -> tuple[tuple[Array, Array], list[Array]]:
    """Returns tiles and lookup tables.

    Tiles are bytes (with 3 bits: codes) ``[tiles, rows, m]`` and scales ``[tiles, rows, blocks]``.
    """
    fan_in, fan_out = quantized.fan_in, quantized.fan_out
    bits = quantized.format.bits
    if bits == 3:
        places = normal_float.unpack(codes, bits, fan_in * fan_out)
    else:
        places = lax.bitcast_convert_type(codes, jnp.uint8)
    height = _tile_rows(fan_in, fan_out, TILE)
    places = places.reshape(fan_out // height, height, -1)
    tables = [jnp.asarray(table) for table in _tables(bits)]
    return (places, scales.reshape(*places.shape[:2], -1)), tables


def _decoded(places: Array, scales: Array, tables: list[Array], dtype: Any) -> list[Array]:
    """Returns a tile's values as n matrices ``[rows, in/n]``; matrix k has inputs k, k + n, …."""
    wide = _repeat_scales(scales, places.shape[1])
    return [(_gather(table, places) * wide).astype(dtype) for table in tables]


def _repeat_scales(scales: Array, width: int) -> Array:
    """Repeats scales ``[rows, blocks]`` to ``[rows, width]``."""
    rows, blocks = scales.shape
    wide = jnp.broadcast_to(scales[:, :, None], (rows, blocks, width // blocks))
    return wide.reshape(rows, width)


def _gather(table: Array, index: Array) -> Array:
    """Returns ``table[index]`` for unsigned indices within bounds."""
    return table.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _scales_by_words(form: normal_float.Format) -> bool:
    """Returns whether a block consists of whole words, so that sums over words can be scaled."""
    return form.bits != 3 and form.block * form.bits % normal_float.WORD == 0


def _one_row(x: Array, codes: Array, scales: Array, quantized: Any) -> Array:
    """Returns ``x [in] @ W``, float32."""
    bits, rows = quantized.format.bits, quantized.fan_out
    # Transposed once. XLA would do it for every row of the matrix.
    inputs = xla_scheduling.compute_once(
        x.astype(jnp.float32).reshape(-1, normal_float.WORD // bits).T
    )
    words = codes.reshape(rows, -1)
    ones = jnp.ones(words.shape[1], jnp.float32)

    def sums(tile: tuple[Array, Array]) -> Array:
        words, scales = tile
        # A product with ones, because XLA would put a sum into a fusion of its own.
        return (_word_products(words, inputs, bits) * _repeat_scales(scales, len(ones))) @ ones

    height = _tile_rows(quantized.fan_in, rows, ROW_TILE)
    tiles = (words.reshape(-1, height, len(ones)), scales.reshape(rows // height, height, -1))
    return _map_tiles(sums, tiles).reshape(rows)


def _word_products(words: Array, inputs: Array, bits: int) -> Array:
    """Returns levels times inputs, summed over the codes of each word, ``[rows, words]``.

    Args:
      words: packed codes ``[rows, words]``.
      inputs: inputs ``[codes per word, words]``.
      bits: bits of a code.
    """
    terms = []
    for byte in range(normal_float.WORD // 8):
        index = words >> np.uint32(8 * byte) & np.uint32(255)
        found = [level for table in _byte_tables(bits) for level in _levels(table, index)]
        parts = inputs[byte * len(found) : (byte + 1) * len(found)]
        terms += [level * part[None] for level, part in zip(found, parts, strict=True)]
    return functools.reduce(jnp.add, terms)


def _byte_tables(bits: int) -> list[np.ndarray]:
    """Returns tables of the levels in a byte: pairs ``[256, 2]``, or ``[256]`` with 8 bits."""
    tables = _tables(bits)
    if bits == 8:
        return tables
    return [np.stack(pair, 1) for pair in zip(tables[::2], tables[1::2], strict=True)]


def _levels(table: np.ndarray, index: Array) -> list[Array]:
    """Returns ``table[index]`` as one level, or as two that are read as the bits of a float64."""
    if table.ndim == 1:
        return [_gather(jnp.asarray(table), index)]
    with jax.enable_x64(True):
        found = _gather(jnp.asarray(table.view(np.float64)[:, 0]), index)
        pair = lax.bitcast_convert_type(found, jnp.uint64)
        halves = pair.astype(jnp.uint32), (pair >> np.uint64(32)).astype(jnp.uint32)
        return [lax.bitcast_convert_type(half, jnp.float32) for half in halves]
