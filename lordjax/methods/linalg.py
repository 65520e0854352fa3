"""Dense linear algebra: PCA in a metric, damped Cholesky factors, orthonormal bases.

Arrays in, arrays out, in the dtype of the input. Matrix products run at HIGHEST precision; float32
would otherwise be TF32 on GPU and bfloat16 on TPU. Callers that want float64 pass float64 arrays
under ``jax.enable_x64``.

The low-rank methods use neither a Cholesky factorization nor an inverse of a second moment of
activations. Both fail for singular matrices, which few calibration tokens give. Gradient metrics
are damped first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from lordjax.runtime import target

# Fraction of the mean eigenvalue that is added to a gradient metric. Without it, errors would cost
# nothing in directions in which the few calibration tokens had no gradient. 0.01 and 0.1 gave equal
# results (docs/pages/tried.md).
GRADIENT_DAMPING = 1e-2
# Stands for the mean eigenvalue of a metric that is 0, where no error has an effect on the loss: as
# before a matrix of zeros. All errors cost the same there, so little that others come first.
INERT = 1e-18
EMPTY = 1e-10  # energy of an empty column, as a fraction of the mean energy
WIDE = 512  # number of columns from which the blocks of `gram` save time
ROWS_SHIFT = 1e-5  # shift in Gram-Schmidt; above the float32 rounding of products of unit rows
LEAF = 256  # size up to which a triangle is inverted by a solve; 48 to 384 are equally fast

Ridge = float | Float[Array, ""]


def mm(*factors: Array) -> Array:
    """Returns the product of matrices, from left to right, at HIGHEST precision."""
    out = factors[0]
    for factor in factors[1:]:
        out = jnp.matmul(out, factor, precision="highest")
    return out


def gram(
    rows: Float[Array, "t d"], weights: Float[Array, "t"] | None = None
) -> Float[Array, "d d"]:
    """Returns ``rowsᵀ diag(weights) rows``.

    For wide rows, one of four blocks is the transpose of another. Finer blocks would save more
    operations but less time, because slices are copied.
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
    """Returns ``(a + aᵀ) / 2``."""
    return (a + a.mT) / 2


def eigh_descending(
    a: Float[Array, "... n n"],
) -> tuple[Float[Array, "... n"], Float[Array, "... n n"]]:
    """Returns eigenvalues (largest first, negative ones clipped to 0) and eigenvectors."""
    values, vectors = jnp.linalg.eigh(symmetrize(a))
    return jnp.maximum(values[..., ::-1], 0), vectors[..., ::-1]


def principal_axes(
    a: Float[Array, "n n"], *, rounded: bool
) -> tuple[Float[Array, "n"], Float[Array, "n n"]]:
    """Returns orthonormal axes ``v_i`` of a matrix, and ``v_iᵀ a v_i``, non-increasing.

    The sum of the last numbers is what dropping the last axes costs, exactly, whatever the axes.

    Args:
      a: positive semi-definite matrix.
      rounded: whether axes are eigenvectors of the matrix in float32. An eigendecomposition in
        float64 moves twice the bytes, and many GPUs have little float64 arithmetic; the rest are
        a few products. Axes of eigenvalues below float32's rounding of the largest one are then
        mixed, which the numbers say.
    """
    if not rounded or a.dtype == jnp.float32:
        return eigh_descending(a)
    a = symmetrize(a)
    largest = jnp.max(jnp.abs(a))
    scaled = a / jnp.where(largest > 0, largest, 1)
    axes = jnp.linalg.eigh(scaled.astype(jnp.float32))[1].astype(a.dtype)
    # A Newton-Schulz step makes them orthonormal to the square of float32's rounding.
    axes = 1.5 * axes - mm(axes, mm(axes.T, axes)) / 2
    values = jnp.maximum(jnp.sum(axes * mm(a, axes), axis=0), 0)
    order = jnp.argsort(-values)
    return values[order], axes[:, order]


def root_pair(
    a: Float[Array, "n n"], damping: float
) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    """Returns R with ``a + δI = R Rᵀ``, and its inverse; ``δ = damping · trace(a)/n``.

    If ``a`` is zero, its trace counts as `INERT` · n.

    Every root of a metric gives the same errors. This one is a Cholesky factor, which exists thanks
    to the damping. The symmetric root needs an eigendecomposition, which takes tens of times as
    long.
    """
    root = jittered(a, damping, inert_unit(jnp.mean(jnp.diagonal(a))))
    return root, lower_inverse(root)


def orthonormal_rows(a: Float[Array, "k n"]) -> Float[Array, "k n"]:
    """Returns an orthonormal basis of the span of k ≪ n rows; zero rows stay zero.

    The first j rows of the result span the first j rows of ``a``. The method is Cholesky QR: the
    Cholesky factor of the Gram matrix of the rows. It squares the condition number, so it is
    applied twice; rows of unit length may have a condition number of up to 1e4 in float32. The Gram
    matrix is shifted, so that linearly dependent rows give some direction instead of NaN, and more
    so where many rows are almost parallel. It consists of matrix products only, because QR and
    triangular solves use CPU threads badly.
    """
    for _ in range(2):
        a = _unit_rows(a)
        lower = jittered(mm(a, a.T), ROWS_SHIFT, 1.0)
        # Newton iteration for the inverse. For a triangle it is exact after log2 k steps.
        inverse = jnp.diag(1 / jnp.diagonal(lower))
        for _ in range((len(a) - 1).bit_length()):
            inverse = 2 * inverse - mm(inverse, lower, inverse)
        a = mm(inverse, a)
    return _unit_rows(a)


def _unit_rows(a: Float[Array, "k n"]) -> Float[Array, "k n"]:
    norms = jnp.linalg.norm(a, axis=1, keepdims=True)
    return a / jnp.where(norms > 0, norms, 1)


def row_space(kernel: Float[Array, "in out"]) -> Float[Array, "out m"] | None:
    """Returns an orthonormal basis of the outputs of a kernel, or None if ``out <= in``.

    If ``out > in``, the outputs ``x @ kernel`` lie in a subspace of ``in`` dimensions. Coordinates
    in this basis make every eigenproblem as small as the smaller side of the kernel.
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
    """Returns the best low-rank approximations of a kernel for all ranks at once.

    For every r, ``left[:, :r] @ right[:r]`` minimizes over matrices ``K'`` of rank r::

        E (y - y')ᵀ M (y - y'),    y = x K,  y' = x K',  M = metric (+ damping)

    and the error is ``sum(spectrum[r:])``. Without a metric this is PCA of the outputs, the optimum
    of LoRD's linear form, SVD-LLM and DRONE. If ``M`` is the second moment of the loss gradient at
    the outputs, the error is the change of the loss to second order, under the assumption that
    gradients and activations are independent (K-FAC).

    Args:
      kernel: the matrix ``K`` ``[in, m]``.
      outputs: second moment ``E yᵀy`` of the outputs ``[m, m]``, or their covariance if a bias
        corrects the mean.
      metric: positive semi-definite matrix ``[m, m]``, or None for the identity.
      damping: fraction of the mean eigenvalue of ``metric`` that is added to its diagonal; above 0.

    Returns:
      left, right, and the non-increasing spectrum. Without a metric ``right`` is orthonormal. With
      one, column j of ``left`` and row j of ``right`` have equal norms.

    Source: Eckart-Young in the metric's coordinates; theory/lord_rom §3.1.
    """
    rounded = target.platform() == "gpu"
    if metric is None:
        spectrum, basis = principal_axes(outputs, rounded=rounded)
        return mm(kernel, basis), basis.T, spectrum
    root, inverse = root_pair(metric, damping)
    spectrum, basis = principal_axes(mm(root.T, outputs, root), rounded=rounded)
    left, right = mm(kernel, root, basis), mm(basis.T, inverse)
    # Gradients are tiny. Without equal norms, one factor would be subnormal in float16 and the
    # other close to overflow.
    norms = jnp.linalg.norm(left, axis=0), jnp.linalg.norm(right, axis=1)
    balance = jnp.sqrt(jnp.where(norms[0] > 0, norms[1] / jnp.where(norms[0] > 0, norms[0], 1), 1))
    balance = jnp.where(balance > 0, balance, 1)
    return left * balance[None], right / balance[:, None], spectrum


def tail_errors(products: Float[Array, "n n"]) -> Float[Array, "n+1"]:
    """Returns ``e[k] = Σ_{i,j≥k} products[i, j]`` for k = 0…n, made non-increasing.

    If a residual is a sum of n terms, ``products`` are the expected products of two terms, and the
    first k terms are kept, then ``e[k]`` is the expected square of the rest. Where keeping fewer
    terms would do better, the larger error of the two counts: nothing is offered twice.
    """
    tails = jnp.diagonal(jnp.cumsum(jnp.cumsum(products[::-1, ::-1], axis=0), axis=1))
    tails = jnp.concatenate([jnp.zeros(1, products.dtype), tails])
    return jax.lax.cummax(tails)[::-1]


def solve_psd(
    a: Float[Array, "n n"], b: Float[Array, "n k"], damping: float
) -> Float[Array, "n k"]:
    """Returns ``(a + δI)⁻¹ b`` by an eigendecomposition, with ``δ = damping · trace(a)/n``."""
    values, vectors = eigh_descending(a)
    values = values + damping * jnp.mean(values)
    inverse = jnp.where(values > 0, 1 / jnp.where(values > 0, values, 1), 0)
    return mm(vectors * inverse[None], mm(vectors.T, b))


def mean_unit(diagonal: Any) -> Any:
    """Returns the unit of a ridge that is relative to the columns' mean energy.

    Args:
      diagonal: energies of the columns ``[n]``.

    Returns:
      Their mean, or 1 if all are zero.
    """
    mean = diagonal.mean()
    return mean + (mean == 0).astype(mean.dtype)


def inert_unit(mean: Any) -> Any:
    """Returns the mean of a metric or of error weights; `INERT` if it is 0."""
    return jnp.where(mean > 0, mean, jnp.asarray(INERT, mean.dtype))


def own_unit(diagonal: Any) -> Any:
    """Returns the unit of a ridge that is relative to each column's own energy.

    Such a ridge does not depend on the units of the columns. A fraction of the mean, which comes
    from a few outliers, would exceed the energy of all other columns.

    Args:
      diagonal: energies of the columns ``[n]``.
    """
    return diagonal + EMPTY * mean_unit(diagonal)


def jittered(a: Float[Array, "n n"], first: Ridge, unit: Any) -> Float[Array, "n n"]:
    """Returns the lower Cholesky factor of ``a + τ diag(unit)``.

    τ is the smallest of ``first``, 10 ``first``, … for which the factorization succeeds. A Gram
    matrix is singular if there are fewer tokens than columns, or if a column is always zero. If
    ``a`` is not finite, neither is the factor.

    Args:
      a: symmetric matrix ``[n, n]``; only the upper triangle is read.
      first: smallest τ.
      unit: a number or ``[n]``: `mean_unit` or `own_unit` of the diagonal.
    """
    diagonal = jnp.diagonal(a)
    index = jnp.arange(len(a))

    def factor(share: Array) -> Array:
        # Setting the diagonal would make XLA scatter into a copy; not transposing would make it
        # copy rows to columns for LAPACK.
        shifted = jnp.where(index[:, None] == index[None], diagonal + share * unit, a.T)
        return jnp.linalg.cholesky(shifted, symmetrize_input=False)

    def failed(share: Array) -> Array:
        # A failed factor is NaN everywhere. If a ridge of 1 does not help, the matrix holds NaN.
        return ~jnp.isfinite(factor(share)[-1, -1]) & (share < 1)

    # The loop keeps the ridge only. A factor in its state, beside the matrix and the next factor,
    # would be the peak memory of a compression. Repeating it costs a third of an inverse.
    share = jnp.asarray(first, a.dtype)
    return factor(jax.lax.while_loop(failed, lambda share: 10 * share, share))


def lower_inverse(lower: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Returns ``L⁻¹``, by halves.

    Most of the work is in matrix products, which takes a third of the time of a triangular solve
    against the identity.
    """
    n = len(lower)
    if n <= LEAF:
        return solve_triangular(lower, jnp.eye(n, dtype=lower.dtype), lower=True)
    first, below, last = inverse_corners(lower)
    return jnp.block([[first, jnp.zeros_like(below.T)], [below, last]])


def inverse_corners(
    lower: Float[Array, "n n"],
) -> tuple[Float[Array, "h h"], Float[Array, "k h"], Float[Array, "k k"]]:
    """Returns ``L⁻¹`` as its upper left, lower left and lower right block.

    The blocks take less memory beside L than the whole inverse.
    """
    half = len(lower) // 2
    first, last = lower_inverse(lower[:half, :half]), lower_inverse(lower[half:, half:])
    return first, -mm(last, lower[half:, :half], first), last
