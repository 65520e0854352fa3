"""The best low-rank term for a weighted residual."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lordjax.methods.linalg import mm, orthonormal_rows
from lordjax.methods.quantized.weightings import Weights

OVERSAMPLING = 10  # columns of the subspace beyond the rank


FIRST_POWERS, POWERS = 3, 1  # power iterations from a random subspace, and from the last one


class Product(NamedTuple):
    """``left @ right`` of a rank, the remaining columns zero, and where it was found.

    Attributes:
      left: ``[in, width]``.
      right: ``[width, out]``, of the same norms.
      basis: ``[k, out]`` orthonormal rows; a start for the next search.
      energies: ``[k]`` what each direction takes off the measure, falling if they were sorted.
      total: ``[]`` the measure of the matrix itself.
    """

    left: Any
    right: Any
    basis: Any
    energies: Any
    total: Any

    def transposed(self) -> Float[Array, "out in"]:
        """The product, outputs along rows."""
        return mm(self.right.T, self.left.T)


def start_basis(shape: tuple[int, ...], width: int, seed: int = 0) -> Float[Array, "k out"]:
    """A random subspace to begin with, wide enough for rank ``width``."""
    k = min(width + OVERSAMPLING, *shape)
    return jax.random.normal(jax.random.key(seed), (k, shape[1]))


def best_product(
    matrix: Float[Array, "in out"],
    rank: Int[Array, ""],
    weights: Weights,
    basis: Float[Array, "k out"],
    *,
    width: int,
    powers: int,
    sort: bool = True,
) -> Product:
    """The product of a rank that is closest to ``matrix``, by subspace iteration.

    With ``A = √c·matrixᵀ H matrix·√c`` and V its leading eigenvectors, it is
    ``matrix·√c V Vᵀ/√c``: no root of H and no inverse is needed (theory/lq_lora §7.3a).

    Args:
      matrix: what to approximate.
      rank: at most ``width``; may be traced.
      weights: the measure; ``elements`` are not used.
      basis: of the search; near the answer, one power is enough.
      width: columns of the result; those from ``rank`` on are zero.
      powers: power iterations.
      sort: turn the subspace so that its best directions come first; those of a sorted ``basis``
        stay in order by themselves.
    """
    # Outputs run along rows, as codes are stored, and subspaces are rows too: a product with the
    # transpose of a large matrix then reads it in order.
    root = weights.root_outputs()
    scaled = matrix.T * root
    heavy = weights.times_inputs(scaled)
    for _ in range(powers):
        basis = orthonormal_rows(mm(mm(basis, heavy), scaled.T))
    inner = mm(basis, scaled)
    within = mm(mm(basis, heavy), inner.T)
    energies = jnp.diagonal(within)
    if sort:
        energies, turn = jnp.linalg.eigh(within)
        energies, turn = energies[::-1], turn[:, ::-1].T
        basis, inner = mm(turn, basis), mm(turn, inner)
    energies = jnp.maximum(energies, 0)
    missing = ((0, max(0, width - len(basis))), (0, 0))
    left = jnp.pad(inner, missing)[:width].T
    right = jnp.pad(basis / root.T, missing)[:width]
    kept = jnp.arange(width) < rank
    norms = jnp.linalg.norm(left, axis=0), jnp.linalg.norm(right, axis=1)
    kept = kept & (norms[0] > 0) & (norms[1] > 0)
    balance = jnp.sqrt(jnp.where(kept, norms[1], 1) / jnp.where(kept, norms[0], 1))
    left = left * jnp.where(kept, balance, 0)[None]
    right = right * jnp.where(kept, 1 / balance, 0)[:, None]
    return Product(left, right, basis, energies, jnp.sum(scaled * heavy))
