"""Decodes single NormalFloat weights, by their places in the flattened matrix.

A row of an embedding is read by its token's id. Decoding the whole table for it would take longer
than the rest of a decoding step.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

from lordjax.kernels import normal_float
from lordjax.kernels.normal_float import WORD


def codes_at(
    words: UInt[Array, "words"], bits: int, index: UInt[Array, "..."]
) -> UInt[Array, "..."]:
    """Returns the codes at some places of a vector that `normal_float.pack` packed, as uint8.

    Args:
      words: the packed codes.
      bits: bits of a code.
      index: places, uint32, below the number of codes.
    """

    def word(place: Array) -> Array:
        return words.at[place].get(mode="promise_in_bounds", wrap_negative_indices=False)

    if bits == 3:
        first, shift = index // np.uint32(WORD) * np.uint32(3), index % np.uint32(WORD)
        planes = [(word(first + np.uint32(k)) >> shift & 1) << k for k in range(3)]
        return (planes[0] | planes[1] | planes[2]).astype(jnp.uint8)
    count = np.uint32(WORD // bits)
    shift = index % count * np.uint32(bits)
    return (word(index // count) >> shift & (2**bits - 1)).astype(jnp.uint8)


def values_at(
    packed: normal_float.Packed, form: normal_float.Format, index: UInt[Array, "..."]
) -> Float[Array, "..."]:
    """Returns the decoded values at some places of a packed vector.

    They have the bits that `normal_float.dequantize_packed` gives them.

    Args:
      packed: the vector.
      form: its format.
      index: places, uint32, below the number of values.

    Returns:
      Float32 values of the shape of ``index``.
    """
    flat = index.reshape(-1)
    scale = flat // np.uint32(form.block)
    supers = packed.supers[scale // np.uint32(form.scale_block)]
    alone = dataclasses.replace(form, scale_block=1)  # every scale has its own scale here
    codes = codes_at(packed.scales, form.scale_bits, scale)
    scales = normal_float.dequantize_scales(codes, supers, packed.offset, alone)
    values = normal_float.lookup(codes_at(packed.codes, form.bits, flat), form.bits) * scales
    return values.reshape(index.shape)
