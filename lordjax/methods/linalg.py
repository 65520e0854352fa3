"""Dense linear algebra on matrices: PCA in a metric. Arrays in, arrays out; dtype of the input.

Products run at HIGHEST precision (float32 is otherwise TF32 on GPU and bfloat16 on TPU). Callers
that want float64 pass float64 arrays under ``jax.enable_x64``. The low-rank methods use no Cholesky
factorisation of a second moment of activations and no inverse: both fail on the singular ones that
few calibration tokens give. Gradient metrics are damped before. Column selection needs factors (one
triangular factor serves every width) and adds a jitter.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

# Share of the mean eigenvalue added to a gradient metric: directions in which few calibration
# tokens saw a gradient must not be free. 0.01 and 0.1 measured the same (docs/pages/tried.md).
GRADIENT_DAMPING = 1e-2
EMPTY = 1e-10  # share of the mean energy that an empty column counts as
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
    first, below, last = inverse_corners(lower)
    return jnp.block([[first, jnp.zeros_like(below.T)], [below, last]])


def inverse_corners(
    lower: Float[Array, "n n"],
) -> tuple[Float[Array, "h h"], Float[Array, "k h"], Float[Array, "k k"]]:
    """``L⁻¹`` as its corners: first, below it, last; less memory than the whole beside L."""
    half = len(lower) // 2
    first, last = lower_inverse(lower[:half, :half]), lower_inverse(lower[half:, half:])
    return first, -mm(last, lower[half:, :half], first), last
