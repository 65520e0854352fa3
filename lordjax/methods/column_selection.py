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
from jaxtyping import Array, Float, Int

from lordjax.methods.linalg import Ridge, inverse_corners, jittered, mean_unit, mm, own_unit

JITTER = 1e-6  # smallest ridge of a refit, as a fraction of `own_unit`
PANELS = 8  # row panels in which a product is subtracted


def leverage_complement(gram: Float[Array, "n n"], ridge: float) -> Float[Array, "n"]:
    """``[(C + λI)⁻¹]_ii`` with ``λ = ridge · mean(diag C)``: small where ridge leverage is large.

    The ridge leverage score is ``s = 1 - λ·h``. It is h that is returned: scores are all close to
    1 for small λ, and their order would drown in rounding. Columns of zeros get infinity. With
    ``C + λI = L Lᵀ`` they are the squared column norms of ``L⁻¹``.
    """
    first, below, last = (
        jnp.sum(part**2, axis=0)
        for part in inverse_corners(jittered(gram, ridge, mean_unit(jnp.diagonal(gram))))
    )
    h = jnp.concatenate([first + below, last])
    return jnp.where(jnp.diagonal(gram) > 0, h, jnp.inf)


def inverse_psd(gram: Float[Array, "n n"], ridge: Ridge = JITTER) -> Float[Array, "n n"]:
    """``(C + τD)⁻¹``, τ as of `jittered` and D of `own_unit`, by its corners."""
    first, below, last = inverse_corners(jittered(gram, ridge, own_unit(jnp.diagonal(gram))))
    half, across = len(first), mm(last.T, below)
    inverse = jnp.zeros_like(gram).at[half:, half:].set(mm(last.T, last))
    inverse = inverse.at[half:, :half].set(across).at[:half, half:].set(across.T)
    return inverse.at[:half, :half].set(mm(first.T, first) + mm(below.T, below))


def nested_refit(
    gram: Float[Array, "n n"],
    kernel: Float[Array, "n m"],
    ridge: Ridge = JITTER,
    unit: Callable[[Any], Any] = own_unit,
) -> tuple[Float[Array, "n n"], Float[Array, "n m"]]:
    """Ridge refits of ``z @ kernel`` from the first k columns of z, for every k at once.

    With ``C + τD = L Lᵀ`` and ``R = Lᵀ kernel`` the refit is ``L[:k,:k]⁻ᵀ R[:k]`` (`refit`), and
    ``Σ_{i≥k} ‖R[i]‖²`` its squared error per token if ``C + τD`` is the second moment of z.

    Args:
      gram: C.
      kernel: to refit.
      ridge: least τ (see `jittered`); `JITTER` gives least squares.
      unit: D of the diagonal of C: `own_unit`, or `mean_unit` where columns without energy may have
        some, or less than none, by rounding.

    Returns:
      L, R.

    Source: block form of the normal equations; theory/modegpt §2.3.
    """
    lower = jittered(gram, ridge, unit(jnp.diagonal(gram)))
    return lower, mm(lower.T, kernel)


def refit(lower: Any, right: Any, k: int) -> Float[np.ndarray, "k m"]:
    """The refit of `nested_refit` from the first k columns, in float64 on the host.

    Compiled, every k would be a program of its own or a solve of the full size.
    """
    block, target = (np.asarray(a, np.float64) for a in (lower[:k, :k], right[:k]))
    return scipy.linalg.solve_triangular(block.T, target, check_finite=False)


def _subtract_product(
    a: Float[Array, "n m"], left: Float[Array, "n k"], right: Float[Array, "k m"]
) -> Float[Array, "n m"]:
    """``a - left @ right``, a panel of rows after the other: XLA would hold the whole product."""
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
    """Columns by falling importance: backward elimination with exact refits (OBS).

    Without column i the refit error of ``z @ kernel`` grows by ``‖W_i‖² / [C⁻¹]_ii``, C being the
    second moment with the ridge of `nested_refit` and W the refit kernel so far. Columns go one
    after the other; of each ``block`` the choice is among the ``2 · block`` that were cheapest when
    it began, on whose part of W and ``C⁻¹`` every removal is carried out at once, and on the rest
    when the block is full. So of two columns that replace each other one stays, and n removals cost
    a few products instead of n updates of everything.

    Args:
      gram: C without the ridge.
      kernel: W before anything goes.
      ridge: as for `nested_refit`.
      block: columns that go at once.

    Source: Optimal Brain Surgeon (Hassibi and Stork, 1993), with many outputs.
    """
    n, pad = gram.shape[0], -gram.shape[0] % block
    # Columns that fill the last block up; they go first.
    gram, kernel = jnp.pad(gram, ((0, pad), (0, pad))), jnp.pad(kernel, ((0, pad), (0, 0)))
    index = jnp.arange(n + pad)
    floor = jnp.where(index >= n, -2.0, jnp.where(jnp.diagonal(gram) <= 0, -1.0, 0.0))
    inverse = inverse_psd(gram, ridge)

    def costs(inverse: Array, kernel: Array, floor: Array, alive: Array) -> Array:
        diagonal = jnp.where(alive, jnp.diagonal(inverse), 1)
        cost = jnp.where(floor < 0, floor, jnp.sum(kernel**2, axis=1) / diagonal)
        return jnp.where(alive, cost, jnp.inf)

    def remove(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        inverse, kernel, floor, alive, dropped = state
        at = jnp.argmin(costs(inverse, kernel, floor, alive))  # ties: the first
        share = inverse[:, at] / inverse[at, at]
        kernel = kernel - jnp.outer(share, kernel[at])
        inverse = inverse - jnp.outer(share, inverse[at])
        return inverse, kernel, floor, alive.at[at].set(False), dropped.at[i].set(at)

    def step(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        inverse, kernel, alive, order = state
        near = jnp.argsort(costs(inverse, kernel, floor, alive))[: 2 * block]
        parts = (inverse[near][:, near], kernel[near], floor[near], alive[near])
        start = (*parts, jnp.zeros(block, near.dtype))
        drop = near[jax.lax.fori_loop(0, block, remove, start)[-1]]
        shares = jnp.linalg.solve(inverse[drop][:, drop], inverse[drop])
        kernel = kernel - mm(shares.T, kernel[drop])
        inverse = _subtract_product(inverse, inverse[:, drop], shares)
        at = n + pad - (i + 1) * block
        order = jax.lax.dynamic_update_slice(order, drop[::-1].astype(order.dtype), (at,))
        return inverse, kernel, alive.at[drop].set(False), order

    start = (inverse, kernel, jnp.ones(n + pad, bool), jnp.zeros(n + pad, jnp.int32))
    return jax.lax.fori_loop(0, (n + pad) // block, step, start)[3][:n]
