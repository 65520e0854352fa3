"""Metrics of outputs, roots and batched products that the three kinds of modules share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lordjax.methods import linalg
from lordjax.methods.linalg import mm

RANK_TOLERANCE = 1e-12  # eigenvalues of a head's second moment below this share count as zero


Arrays = Mapping[str, Array]


def gradient_metric(
    stats: Mapping[str, Any],
) -> Callable[[Float[Array, "n m"]], Float[Array, "n m"]]:
    """Rows times a root of the gradient metric M; as they are without gradients."""
    if "gradients" not in stats:
        return lambda rows: rows
    root, _ = linalg.root_pair(stats["gradients"].second_moment(), linalg.GRADIENT_DAMPING)
    return lambda rows: mm(rows, root)


def drop_errors(effects: Float[Array, "n n"]) -> Float[Array, "n"]:
    """Increments, at least 0, of ``Σ_{i,j≥k} effects[i, j]``: the error of dropping all from k on.

    An increment below 0 says that dropping more does better; such a width is not offered.
    """
    tails = jnp.cumsum(jnp.cumsum(effects[::-1, ::-1], axis=0), axis=1)
    errors = jnp.concatenate([jnp.zeros(1, effects.dtype), jnp.diagonal(tails)])
    return jnp.diff(jax.lax.cummax(errors))[::-1]


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
    """``C^½`` and its pseudo-inverse."""
    values, vectors = linalg.eigh_descending(c)
    there = values > RANK_TOLERANCE * values[0]
    root = jnp.sqrt(jnp.where(there, values, 0))
    inverse = jnp.where(there, 1 / jnp.where(there, root, 1), 0)
    return mm(vectors * root[None], vectors.T), mm(vectors * inverse[None], vectors.T)
