"""Linear algebra of the three kinds of modules: gradient metric, roots, batched products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lordjax.methods import linalg
from lordjax.methods.linalg import mm

# Eigenvalues of a head's second moment below this fraction of the largest one count as zero.
RANK_TOLERANCE = 1e-12

Arrays = Mapping[str, Array]


def gradient_metric(
    stats: Mapping[str, Any],
) -> Callable[[Float[Array, "n m"]], Float[Array, "n m"]]:
    """Returns a function that multiplies rows by a root of the gradient metric M.

    Without gradients the function returns rows unchanged.
    """
    if "gradients" not in stats:
        return lambda rows: rows
    root, _ = linalg.root_pair(stats["gradients"].second_moment(), linalg.GRADIENT_DAMPING)
    return lambda rows: mm(rows, root)


def drop_errors(effects: Float[Array, "n n"]) -> Float[Array, "n"]:
    """Returns the errors added by dropping one more item, from the last to the first.

    The error of dropping all items from k on is ``Σ_{i,j≥k} effects[i, j]``; the result holds its
    increments. An increment below 0 would mean that dropping more does better. It is set to 0, so
    that such a width is not offered.
    """
    return -jnp.diff(linalg.tail_errors(effects))


def to_float64(a: Any) -> np.ndarray:
    """Returns an array as float64 on the host."""
    return np.asarray(a, np.float64)


def batched_diagonal(c: Float[Array, "n d d"]) -> Float[Array, "n d"]:
    """Returns the batched_diagonal of a stack of square matrices."""
    return jnp.diagonal(c, axis1=1, axis2=2)


def batched_matmul(*factors: Array) -> Array:
    """Returns the batched product of several stacks of matrices, at full precision."""
    return functools.reduce(lambda a, b: jnp.matmul(a, b, precision="highest"), factors)


def root_and_pseudo_inverse(c: Float[Array, "d d"]) -> tuple[Array, Array]:
    """Returns ``C^½`` and its pseudo-inverse."""
    values, vectors = linalg.eigh_descending(c)
    nonzero = values > RANK_TOLERANCE * values[0]
    root = jnp.sqrt(jnp.where(nonzero, values, 0))
    inverse = jnp.where(nonzero, 1 / jnp.where(nonzero, root, 1), 0)
    return mm(vectors * root[None], vectors.T), mm(vectors * inverse[None], vectors.T)
