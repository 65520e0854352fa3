"""The best low-rank term for a weighted residual."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lordjax.methods.linalg import mm, orthonormal_rows
from lordjax.methods.quantized.weightings import Weights

OVERSAMPLING = 10  # dimensions of the subspace beyond the rank
FIRST_POWERS, POWERS = 3, 1  # power iterations from a random subspace, and from a previous one


class Product(NamedTuple):
    """A low-rank term ``left @ right``, and the subspace in which it was found.

    Attributes:
      left: left factor ``[in, width]``; columns from the rank on are zero.
      right: right factor ``[width, out]``; its rows have the norms of the columns of ``left``.
      basis: ``[k, out]`` orthonormal rows of the subspace; a start for the next search.
      energies: ``[k]`` reduction of the weighted error by each direction; decreasing if sorted.
      total: ``[]`` weighted error without the term.
    """

    left: Any
    right: Any
    basis: Any
    energies: Any
    total: Any

    def transposed(self) -> Float[Array, "out in"]:
        """Returns the transposed product ``[out, in]``."""
        return mm(self.right.T, self.left.T)


def start_basis(shape: tuple[int, ...], width: int, seed: int = 0) -> Float[Array, "k out"]:
    """Returns a random subspace, wide enough for rank ``width``, as rows ``[k, out]``."""
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
    """Fits the best low-rank term to a matrix, by subspace iteration.

    With ``A = √c·matrixᵀ H matrix·√c`` and V its leading eigenvectors, the solution is
    ``matrix·√c V Vᵀ/√c``. It needs no root and no inverse of H.

    Args:
      matrix: the matrix ``[in, out]`` to approximate.
      rank: rank of the term, at most ``width``; may be traced.
      weights: weights H and c of the error; ``elements`` are not used.
      basis: subspace to start from. Close to the solution one power iteration is enough.
      width: number of columns of the left factor.
      powers: number of power iterations.
      sort: whether to rotate the subspace so that its best directions come first. Directions of a
        sorted ``basis`` stay in order without it.

    Returns:
      The low-rank term.

    Source: theory/lq_lora §7.3a.
    """
    # Outputs run along rows, as codes are stored, and subspaces are rows too. So products with the
    # transpose of a large matrix read it in order.
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
