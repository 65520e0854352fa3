"""The inner loop of backward elimination: removes the cheapest of some columns, one by one.

It works on a few small matrices, so on a GPU every step of the loop would start programs that take
longer to start than to run. There the whole loop is one kernel (Pallas, Triton).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

WARPS = 16  # of 32 threads, whose registers hold both matrices: 64 x 64 float64 each


def removed(
    inverse: Float[Array, "s s"],
    products: Float[Array, "s s"],
    floor: Float[Array, "s"],
    alive: Bool[Array, "s"],
    count: int,
    *,
    interpret: bool | None = None,
) -> tuple[Int[Array, "count"], Float[Array, "count count"]]:
    """Finds the columns that greedy backward elimination removes first.

    Removing column i adds ``‖W_i‖² / [C⁻¹]_ii`` to the error, and changes C⁻¹ and W to those of
    the columns that are left. The products ``W Wᵀ`` change as C⁻¹ does, so W itself is not needed.

    Args:
      inverse: ``C⁻¹``, symmetric.
      products: ``W Wᵀ``.
      floor: costs of columns where they are negative: these are removed first.
      alive: columns that may be removed.
      count: number of columns to remove.
      interpret: None runs the kernel when compiled for CUDA, and elsewhere a loop; True interprets
        the kernel on any device.

    Returns:
      Places of the removed columns, in the order of their removal; of equal costs the first column
      is removed. And an upper triangular U that factors the part of ``C⁻¹`` at these places: it is
      ``Uᵀ diag(U)⁻¹ U``.
    """
    operands = (inverse, products, floor, alive.astype(inverse.dtype))
    kernel = functools.partial(_launch, count, bool(interpret))
    if interpret is None:
        loop = functools.partial(_loop, count)
        found, rows = lax.platform_dependent(*operands, cuda=kernel, default=loop)
    else:
        found, rows = kernel(*operands)
    return found, jnp.triu(rows[:, found])


def _launch(count: int, interpret: bool, *operands: Array) -> tuple[Array, Array]:
    def run(*refs: Any) -> None:
        *given, found, rows = refs
        found[...], rows[...] = _loop(count, *(ref[...] for ref in given))

    inverse = operands[0]
    shapes = ((count,), jnp.int32), ((count, len(inverse)), inverse.dtype)
    return pl.pallas_call(
        run,
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="greedy_elimination",
    )(*operands)


def _loop(
    count: int, inverse: Array, products: Array, floor: Array, alive: Array
) -> tuple[Array, Array]:
    """Removes ``count`` columns; returns their places, and their rows of ``C⁻¹`` at that time.

    Rows are picked by masks, because a kernel cannot index arrays.
    """
    places, turns = _iota(len(floor)), _iota(count)
    diagonal = places[:, None] == places[None]

    def picked(mask: Array, a: Array, axis: int) -> Array:
        return jnp.sum(jnp.where(mask, a, jnp.zeros_like(a)), axis=axis)

    def step(turn: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        inverse, products, alive, found, rows = state
        energy = picked(diagonal, products, 1)
        pivots = jnp.where(alive > 0, picked(diagonal, inverse, 1), 1)
        costs = jnp.where(floor < 0, floor, energy / pivots)
        at = lax.argmin(jnp.where(alive > 0, costs, jnp.inf), 0, jnp.int32)
        own = places == at
        row, across = (picked(own[:, None], a, 0) for a in (inverse, products))
        share = row / picked(own, row, 0)
        left, top = share[:, None], share[None]
        inverse = inverse - left * row[None]
        products = products - left * across[None] - across[:, None] * top
        products = products + picked(own, across, 0) * (left * top)
        alive = jnp.where(own, jnp.zeros_like(alive), alive)
        now = turns == turn
        rows = jnp.where(now[:, None], row[None], rows)
        return inverse, products, alive, jnp.where(now, at, found), rows

    rows = jnp.zeros((count, len(floor)), inverse.dtype)
    state = (inverse, products, alive, jnp.zeros_like(turns), rows)
    return lax.fori_loop(jnp.int32(0), jnp.int32(count), step, state)[-2:]


def _iota(length: int) -> Int[Array, "n"]:
    return lax.iota(jnp.int32, length)
