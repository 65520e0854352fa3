"""Dense linear algebra on matrices: PCA in a metric. Arrays in, arrays out; dtype of the input.

Products run at HIGHEST precision (float32 is otherwise TF32 on GPU and bfloat16 on TPU). Callers
that want float64 pass float64 arrays under ``jax.enable_x64``. There is no Cholesky factorisation
and no explicit inverse: both fail on the singular Grams that few calibration tokens give.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

# Share of the mean eigenvalue added to a gradient metric: directions in which few calibration
# tokens saw a gradient must not be free. 0.01 and 0.1 measured the same (CHANGELOG, "Tried").
GRADIENT_DAMPING = 1e-2


def mm(*factors: Array) -> Array:
    """Product of matrices, left to right, at HIGHEST precision."""
    out = factors[0]
    for factor in factors[1:]:
        out = jnp.matmul(out, factor, precision="highest")
    return out


def symmetrize(a: Float[Array, "... n n"]) -> Float[Array, "... n n"]:
    """``(a + aᵀ) / 2``."""
    return (a + a.mT) / 2


def eigh_descending(
    a: Float[Array, "... n n"],
) -> tuple[Float[Array, "... n"], Float[Array, "... n n"]]:
    """Eigenvalues (largest first, negative rounding errors clipped to 0) and eigenvectors."""
    values, vectors = jnp.linalg.eigh(symmetrize(a))
    return jnp.maximum(values[..., ::-1], 0), vectors[..., ::-1]


def sqrt_pair(
    a: Float[Array, "n n"], damping: float
) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    """``(a + δI)^½`` and its inverse, ``δ = damping · trace(a)/n``; identity for ``a = 0``."""
    values, vectors = eigh_descending(a)
    values = values + damping * jnp.mean(values)
    values = jnp.where(values > 0, values, 1)
    root = jnp.sqrt(values)
    return mm(vectors * root[None], vectors.mT), mm(vectors / root[None], vectors.mT)


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
    damping: float = 0.0,
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
      damping: share of the mean eigenvalue of ``metric`` added to its diagonal.

    Returns:
      left, right, spectrum (non-increasing). Without a metric ``right`` is orthonormal; with one,
      column j of ``left`` and row j of ``right`` have equal norms.

    Source: Eckart-Young in the metric's coordinates; specs of LoRD §3.1.
    """
    if metric is None:
        spectrum, basis = eigh_descending(outputs)
        return mm(kernel, basis), basis.T, spectrum
    root, inverse = sqrt_pair(metric, damping)
    spectrum, basis = eigh_descending(mm(root, outputs, root))
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
