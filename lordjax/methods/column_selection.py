"""Column selection: which columns of a hidden state to keep, and a linear layer refit on them.

Arrays in, arrays out; pure and jittable, except for `refit`. Selection needs Cholesky factors,
since one triangular factor serves every width, and adds a jitter. `lapack` has the same functions
for arrays on the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

from lordjax.methods.greedy import removed
from lordjax.methods.linalg import (
    Ridge,
    inverse_corners,
    jittered,
    mean_unit,
    mm,
    own_unit,
    tail_errors,
)

JITTER = 1e-6  # smallest ridge of a refit, as a fraction of `own_unit`
PANELS = 8  # row panels in which a product is subtracted


def leverage_complement(gram: Float[Array, "n n"], ridge: float) -> Float[Array, "n"]:
    """Returns ``h_i = [(C + λI)⁻¹]_ii``, which is small where the ridge leverage is large.

    The ridge leverage score is ``1 - λ·h``. For small λ all scores are close to 1, and rounding
    would decide their order; so h is returned. Columns of zeros get infinity. With ``C + λI = L
    Lᵀ``, h are the squared column norms of ``L⁻¹``.

    Args:
      gram: the Gram matrix C ``[n, n]``.
      ridge: λ as a fraction of the mean of C's diagonal.
    """
    first, below, last = (
        jnp.sum(part**2, axis=0)
        for part in inverse_corners(jittered(gram, ridge, mean_unit(jnp.diagonal(gram))))
    )
    h = jnp.concatenate([first + below, last])
    return jnp.where(jnp.diagonal(gram) > 0, h, jnp.inf)


def inverse_psd(gram: Float[Array, "n n"], ridge: Ridge = JITTER) -> Float[Array, "n n"]:
    """Returns ``(C + τD)⁻¹``, with τ from `jittered` and D from `own_unit`."""
    first, below, last = inverse_corners(jittered(gram, ridge, own_unit(jnp.diagonal(gram))))
    half, across = len(first), mm(last.T, below)
    inverse = jnp.zeros_like(gram).at[half:, half:].set(mm(last.T, last))
    inverse = inverse.at[half:, :half].set(across).at[:half, half:].set(across.T)
    return inverse.at[:half, :half].set(mm(first.T, first) + mm(below.T, below))


def group_elimination_order(
    gram: Float[Array, "n n"], kernel: Float[Array, "n m"], groups: int, ridge: Ridge = JITTER
) -> Int[Array, "groups"]:
    """Returns groups of columns by decreasing importance: `elimination_order` of whole groups.

    Removing the columns G adds ``tr(W_Gᵀ [C⁻¹]_GG⁻¹ W_G)`` to the refit error of ``z @ kernel``.
    After every removal C⁻¹ and the refit kernel W are those of the columns that are left.

    Args:
      gram: the second moment C without the ridge ``[n, n]``.
      kernel: the kernel W of all columns ``[n, m]``.
      groups: number of groups; each has ``n / groups`` neighbouring columns.
      ridge: smallest ridge, as for `nested_refit`.

    Returns:
      Indices of the groups, the most important one first.

    Source: Optimal Brain Surgeon (Hassibi and Stork, 1993), for several weights at once.
    """
    size = len(gram) // groups

    def columns(group: Any) -> Int[Array, "size"]:
        return group * size + jnp.arange(size, dtype=jnp.int32)

    def remove(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        inverse, kernel, alive, order = state

        def cost(group: Array) -> Array:
            own = columns(group)
            block = jnp.where(alive[group], inverse[own][:, own], jnp.eye(size, dtype=gram.dtype))
            return jnp.sum(kernel[own] * jnp.linalg.solve(block, kernel[own]))

        costs = jnp.where(alive, jax.lax.map(cost, jnp.arange(groups, dtype=jnp.int32)), jnp.inf)
        drop = jnp.argmin(costs).astype(jnp.int32)  # ties: the first
        own = columns(drop)
        shares = jnp.linalg.solve(inverse[own][:, own], inverse[own])
        kernel = kernel - mm(shares.T, kernel[own])
        inverse = inverse - mm(inverse[:, own], shares)
        order = order.at[groups - 1 - i].set(drop)
        return inverse, kernel, alive.at[drop].set(False), order

    start = (inverse_psd(gram, ridge), kernel, jnp.ones(groups, bool), jnp.zeros(groups, jnp.int32))
    return jax.lax.fori_loop(0, groups, remove, start)[3]


def nested_refit(
    gram: Float[Array, "n n"],
    kernel: Float[Array, "n m"],
    ridge: Ridge = JITTER,
    unit: Callable[[Any], Any] = own_unit,
) -> tuple[Float[Array, "n n"], Float[Array, "n m"]]:
    """Returns the factors for ridge refits of ``z @ kernel`` on the first k columns, for every k.

    With ``C + τD = L Lᵀ`` and ``R = Lᵀ kernel`` the refit is ``L[:k,:k]⁻ᵀ R[:k]`` (`refit`). Its
    squared error per token is ``Σ_{i≥k} ‖R[i]‖²`` if ``C + τD`` is the second moment of z.

    Args:
      gram: the second moment C of z ``[n, n]``.
      kernel: the matrix to refit ``[n, m]``.
      ridge: smallest τ (see `jittered`); `JITTER` gives least squares.
      unit: computes D from the diagonal of C. `own_unit`, or `mean_unit` if columns without energy
        can have a small positive or negative one by rounding.

    Returns:
      L and R.

    Source: block form of the normal equations; theory/modegpt §2.3.
    """
    lower = jittered(gram, ridge, unit(jnp.diagonal(gram)))
    return lower, mm(lower.T, kernel)


def refit(lower: Any, right: Any, k: int) -> Float[np.ndarray, "k m"]:
    """Returns the refit of `nested_refit` on the first k columns, in float64 on the host.

    A compiled version would be one program per k, or a solve of the full size.
    """
    block, target = (np.asarray(a, np.float64) for a in (lower[:k, :k], right[:k]))
    return scipy.linalg.solve_triangular(block.T, target, check_finite=False)


def prefix_errors(
    lower: Float[Array, "n n"],
    gram: Float[Array, "n n"],
    weighted: Float[Array, "n m"],
    step: int = 1,
) -> Float[Array, "n/step+1"]:
    """Returns the errors of the refits of `nested_refit` on other data, for every k.

    In the coordinates ``ẑ = z L⁻ᵀ`` the refit on the first k columns drops the terms ``ẑ_i R_i``
    from k on. So the error is ``Σ_{i,j≥k} (L⁻¹ C L⁻ᵀ)_ij R_i M R_jᵀ``.

    Args:
      lower: L ``[n, n]`` of `nested_refit`.
      gram: second moment C of z in the other data ``[n, n]``.
      weighted: R times a root of the metric M ``[n, m]``.
      step: only multiples of this are offered as k.
    """
    half = solve_triangular(lower, gram, lower=True)
    inner = solve_triangular(lower, half.T, lower=True)
    products, count = inner * mm(weighted, weighted.T), len(gram) // step
    return tail_errors(jnp.sum(products.reshape(count, step, count, step), axis=(1, 3)))


def _subtract_product(
    a: Float[Array, "n m"], left: Float[Array, "n k"], right: Float[Array, "k m"]
) -> Float[Array, "n m"]:
    """Returns ``a - left @ right``, panel by panel; XLA would store the whole product."""
    rows = len(a) // math.gcd(len(a), PANELS)

    def panel(i: Array, a: Array) -> Array:
        part = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=i * rows, slice_size=rows
        )
        return jax.lax.dynamic_update_slice_in_dim(
            a, part(a) - mm(part(left), right), i * rows, axis=0
        )

    return jax.lax.fori_loop(0, len(a) // rows, panel, a)


def elimination_order(
    gram: Float[Array, "n n"], kernel: Float[Array, "n m"], ridge: Ridge = JITTER, block: int = 32
) -> Int[Array, "n"]:
    """Returns the columns by decreasing importance: greedy backward elimination with exact refits.

    Removing column i adds ``‖W_i‖² / [C⁻¹]_ii`` to the refit error of ``z @ kernel``. C is the
    second moment with the ridge of `nested_refit`, and W is the refit kernel so far.

    Columns are removed one after the other, in blocks. The columns of a block are chosen among the
    ``2 · block`` that were cheapest when the block began. For these, W and ``C⁻¹`` are updated
    after every removal; for all others when the block is full. So of two columns that can replace
    each other one stays, and n removals cost a few matrix products instead of n full updates.

    Args:
      gram: the second moment C without the ridge ``[n, n]``.
      kernel: the kernel W of all columns ``[n, m]``.
      ridge: smallest ridge, as for `nested_refit`.
      block: number of columns that are removed together.

    Returns:
      Indices of the columns, the most important one first.

    Source: Optimal Brain Surgeon (Hassibi and Stork, 1993), with many outputs.
    """
    n, pad = gram.shape[0], -gram.shape[0] % block
    # Padding columns complete the last block; they are removed first.
    gram, kernel = jnp.pad(gram, ((0, pad), (0, pad))), jnp.pad(kernel, ((0, pad), (0, 0)))
    index = jnp.arange(n + pad)
    floor = jnp.where(index >= n, -2.0, jnp.where(jnp.diagonal(gram) <= 0, -1.0, 0.0))
    inverse = inverse_psd(gram, ridge)

    def step(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        inverse, kernel, alive, order = state
        costs = jnp.sum(kernel**2, axis=1) / jnp.where(alive, jnp.diagonal(inverse), 1)
        costs = jnp.where(alive, jnp.where(floor < 0, floor, costs), jnp.inf)
        near = jnp.argsort(costs)[: 2 * block]
        rows = kernel[near]
        parts = (inverse[near][:, near], mm(rows, rows.T), floor[near], alive[near])
        places, upper = removed(*parts, block)
        drop = near[places]
        half = solve_triangular(upper, inverse[drop], trans=1) * jnp.diagonal(upper)[:, None]
        shares = solve_triangular(upper, half)
        kernel = kernel - mm(shares.T, kernel[drop])
        inverse = _subtract_product(inverse, inverse[:, drop], shares)
        at = n + pad - (i + 1) * block
        order = jax.lax.dynamic_update_slice(order, drop[::-1].astype(order.dtype), (at,))
        return inverse, kernel, alive.at[drop].set(False), order

    start = (inverse, kernel, jnp.ones(n + pad, bool), jnp.zeros(n + pad, jnp.int32))
    return jax.lax.fori_loop(0, (n + pad) // block, step, start)[3][:n]
