"""Dense linear algebra on matrices: PCA in a metric. Arrays in, arrays out; dtype of the input.

Products run at HIGHEST precision (float32 is otherwise TF32 on GPU and bfloat16 on TPU). Callers
that want float64 pass float64 arrays under ``jax.enable_x64``. The low-rank methods use no Cholesky
factorisation of a second moment of activations and no inverse: both fail on the singular ones that
few calibration tokens give. Gradient metrics are damped before. Column selection needs factors (one
triangular factor serves every width) and adds a jitter.
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

# Share of the mean eigenvalue added to a gradient metric: directions in which few calibration
# tokens saw a gradient must not be free. 0.01 and 0.1 measured the same (docs/pages/tried.md).
GRADIENT_DAMPING = 1e-2
JITTER = 1e-6  # least ridge of a refit, see `own_unit`
EMPTY = 1e-10  # share of the mean energy that an empty column counts as
PANELS = 8  # that a product is subtracted in
WIDE = 512  # columns from which `gram` saves time
ROWS_SHIFT = 1e-5  # of Gram-Schmidt, above the rounding of products of unit rows in float32
LEAF = 256  # columns up to which a triangle is inverted by a solve; 48 to 384 are as fast

Ridge = float | Float[Array, ""]


def mm(*factors: Array) -> Array:
    """Product of matrices, left to right, at HIGHEST precision."""
    out = factors[0]
    for factor in factors[1:]:
        out = jnp.matmul(out, factor, precision="highest")
    return out


def gram(
    rows: Float[Array, "t d"], weights: Float[Array, "t"] | None = None
) -> Float[Array, "d d"]:
    """``rowsᵀ diag(weights) rows``; of wide rows one block of four is a copy of its transpose.

    Finer blocks save more operations and less time: what they slice has to be copied.
    """
    width = rows.shape[1]
    weighted = rows if weights is None else rows * weights[:, None]
    # float32 products at the default precision are TF32 on GPU and bfloat16 on TPU.
    if width < WIDE:
        return mm(weighted.T, rows)
    half = width // 2
    left, right = rows[:, :half], rows[:, half:]
    across = mm(weighted[:, :half].T, right)
    first, last = mm(weighted[:, :half].T, left), mm(weighted[:, half:].T, right)
    return jnp.block([[first, across], [across.T, last]])


def symmetrize(a: Float[Array, "... n n"]) -> Float[Array, "... n n"]:
    """``(a + aᵀ) / 2``."""
    return (a + a.mT) / 2


def eigh_descending(
    a: Float[Array, "... n n"],
) -> tuple[Float[Array, "... n"], Float[Array, "... n n"]]:
    """Eigenvalues (largest first, negative rounding errors clipped to 0) and eigenvectors."""
    values, vectors = jnp.linalg.eigh(symmetrize(a))
    return jnp.maximum(values[..., ::-1], 0), vectors[..., ::-1]


def root_pair(
    a: Float[Array, "n n"], damping: float
) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    """R with ``a + δI = R Rᵀ`` and its inverse, ``δ = damping · trace(a)/n``.

    Whatever is measured in a metric is the same by any root. The damping makes this one, a Cholesky
    factor, safe; the symmetric one takes an eigendecomposition, tens of times as long.
    """
    root = jittered(a, damping, mean_unit(jnp.diagonal(a)))
    return root, lower_inverse(root)


def orthonormal_rows(a: Float[Array, "k n"]) -> Float[Array, "k n"]:
    """An orthonormal basis of the span of k ≪ n rows, the first ones of the first; zeros stay zero.

    Gram-Schmidt by Cholesky factors of the rows' products, twice because that squares the
    condition (of the rows at unit length; up to 1e4 in float32), and shifted, so that rows which
    depend on others become some directions instead of NaN. All of it products: on CPU the threads
    of a QR or of a solve get in their way.
    """
    for _ in range(2):
        a = _unit_rows(a)
        lower = jnp.linalg.cholesky(mm(a, a.T) + ROWS_SHIFT * jnp.eye(len(a), dtype=a.dtype))
        # Newton's iteration for its inverse; of a triangle it ends exactly after log2 k steps.
        inverse = jnp.diag(1 / jnp.diagonal(lower))
        for _ in range((len(a) - 1).bit_length()):
            inverse = 2 * inverse - mm(inverse, lower, inverse)
        a = mm(inverse, a)
    return _unit_rows(a)


def _unit_rows(a: Float[Array, "k n"]) -> Float[Array, "k n"]:
    norms = jnp.linalg.norm(a, axis=1, keepdims=True)
    return a / jnp.where(norms > 0, norms, 1)


def row_space(kernel: Float[Array, "in out"]) -> Float[Array, "out m"] | None:
    """Orthonormal basis of the outputs of a widening kernel, or None if ``out <= in``.

    Outputs of ``x @ kernel`` lie in an ``in``-dimensional subspace when ``out > in``. Coordinates
    in this basis make every eigenproblem as small as the smaller side.
    """
    if kernel.shape[1] <= kernel.shape[0]:
        return None
    return jnp.linalg.qr(kernel.T)[0]


def metric_pca(
    kernel: Float[Array, "in m"],
    outputs: Float[Array, "m m"],
    metric: Float[Array, "m m"] | None = None,
    damping: float = GRADIENT_DAMPING,
) -> tuple[Float[Array, "in m"], Float[Array, "m m"], Float[Array, "m"]]:
    """Best low-rank approximations of ``kernel`` for all ranks at once.

    For every r, ``left[:, :r] @ right[:r]`` minimises over matrices ``K'`` of rank r::

        E (y - y')ᵀ M (y - y'),    y = x K,  y' = x K',  M = metric (+ damping)

    and the error is ``sum(spectrum[r:])``. Without a metric this is PCA of the outputs: the
    optimum of LoRD's linear form, SVD-LLM and DRONE. With ``M`` the second moment of the loss
    gradient at the outputs the error is, to second order and taking gradients and activations as
    independent (K-FAC), the change of the loss.

    Args:
      kernel: ``K``.
      outputs: ``E yᵀy``, or the covariance if the mean is corrected by a bias.
      metric: positive semi-definite, or None for the identity.
      damping: share of the mean eigenvalue of ``metric`` added to its diagonal; above 0.

    Returns:
      left, right, spectrum (non-increasing). Without a metric ``right`` is orthonormal; with one,
      column j of ``left`` and row j of ``right`` have equal norms.

    Source: Eckart-Young in the metric's coordinates; theory/lord_rom §3.1.
    """
    if metric is None:
        spectrum, basis = eigh_descending(outputs)
        return mm(kernel, basis), basis.T, spectrum
    root, inverse = root_pair(metric, damping)
    spectrum, basis = eigh_descending(mm(root.T, outputs, root))
    left, right = mm(kernel, root, basis), mm(basis.T, inverse)
    # Any diagonal may move between the factors. Gradients are tiny, so without this one factor
    # would be subnormal in float16 and the other near overflow.
    norms = jnp.linalg.norm(left, axis=0), jnp.linalg.norm(right, axis=1)
    balance = jnp.sqrt(jnp.where(norms[0] > 0, norms[1] / jnp.where(norms[0] > 0, norms[0], 1), 1))
    balance = jnp.where(balance > 0, balance, 1)
    return left * balance[None], right / balance[:, None], spectrum


def solve_psd(
    a: Float[Array, "n n"], b: Float[Array, "n k"], damping: float
) -> Float[Array, "n k"]:
    """``(a + δI)⁻¹ b`` through the eigendecomposition; ``δ = damping · trace(a)/n``."""
    values, vectors = eigh_descending(a)
    values = values + damping * jnp.mean(values)
    inverse = jnp.where(values > 0, 1 / jnp.where(values > 0, values, 1), 0)
    return mm(vectors * inverse[None], mm(vectors.T, b))


def mean_unit(diagonal: Any) -> Any:
    """What a share of the mean energy of columns is a share of; 1 where all are zero."""
    mean = diagonal.mean()
    return mean + (mean == 0).astype(mean.dtype)


def own_unit(diagonal: Any) -> Any:
    """What a share of each column's own energy is a share of: the same whatever their units.

    Beside outliers, which a mean is made of, other columns would drown in a share of that.
    """
    return diagonal + EMPTY * mean_unit(diagonal)


def jittered(a: Float[Array, "n n"], first: Ridge, unit: Any) -> Float[Array, "n n"]:
    """Lower Cholesky factor of ``a + τ diag(unit)``; only the upper triangle of ``a`` is read.

    τ is the least of ``first``, 10 ``first``, … that works: fewer tokens than columns, or columns
    that are always zero, make a Gram singular. A matrix that is not finite gives a factor that is
    not finite either.

    Args:
      a: symmetric.
      first: the least τ.
      unit: a number or ``[n]``; `mean_unit` or `own_unit` of the diagonal.
    """
    diagonal = jnp.diagonal(a)
    index = jnp.arange(len(a))

    def factor(share: Array) -> Array:
        # XLA would scatter a new diagonal into a copy, and copy rows to columns for LAPACK.
        shifted = jnp.where(index[:, None] == index[None], diagonal + share * unit, a.T)
        return jnp.linalg.cholesky(shifted, symmetrize_input=False)

    def failed(share: Array) -> Array:
        # A failed factor is NaN everywhere. A share larger than the matrix itself: it holds NaN.
        return ~jnp.isfinite(factor(share)[-1, -1]) & (share < 1)

    # The loop finds the share only: a factor in its state, beside the matrix and the next factor,
    # would be the peak memory of a compression. Once more is a third of what an inverse costs.
    share = jnp.asarray(first, a.dtype)
    return factor(jax.lax.while_loop(failed, lambda share: 10 * share, share))


def lower_inverse(lower: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """``L⁻¹`` by halves, so that products do the work: a third of a solve against the identity."""
    n = len(lower)
    if n <= LEAF:
        return solve_triangular(lower, jnp.eye(n, dtype=lower.dtype), lower=True)
    first, below, last = _inverse_corners(lower)
    return jnp.block([[first, jnp.zeros_like(below.T)], [below, last]])


def _inverse_corners(
    lower: Float[Array, "n n"],
) -> tuple[Float[Array, "h h"], Float[Array, "k h"], Float[Array, "k k"]]:
    """``L⁻¹`` as its corners: first, below it, last; less memory than the whole beside L."""
    half = len(lower) // 2
    first, last = lower_inverse(lower[:half, :half]), lower_inverse(lower[half:, half:])
    return first, -mm(last, lower[half:, :half], first), last


def leverage_complement(gram: Float[Array, "n n"], ridge: float) -> Float[Array, "n"]:
    """``[(C + λI)⁻¹]_ii`` with ``λ = ridge · mean(diag C)``: small where ridge leverage is large.

    The ridge leverage score is ``s = 1 - λ·h``. It is h that is returned: scores are all close to
    1 for small λ, and their order would drown in rounding. Columns of zeros get infinity. With
    ``C + λI = L Lᵀ`` they are the squared column norms of ``L⁻¹``.
    """
    first, below, last = (
        jnp.sum(part**2, axis=0)
        for part in _inverse_corners(jittered(gram, ridge, mean_unit(jnp.diagonal(gram))))
    )
    h = jnp.concatenate([first + below, last])
    return jnp.where(jnp.diagonal(gram) > 0, h, jnp.inf)


def inverse_psd(gram: Float[Array, "n n"], ridge: Ridge = JITTER) -> Float[Array, "n n"]:
    """``(C + τD)⁻¹``, τ as of `jittered` and D of `own_unit`, by its corners."""
    first, below, last = _inverse_corners(jittered(gram, ridge, own_unit(jnp.diagonal(gram))))
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
