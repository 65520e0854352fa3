"""Control over the order in which XLA runs operations.

XLA's CPU backend drops ``optimization_barrier``. We add a data dependency instead: a zero that XLA
cannot prove to be zero. It delays an operation until its inputs exist, and it stops XLA from
merging two copies of one computation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def false_after(x: Array) -> Bool[Array, ""]:
    """Returns False, computed from ``x``, so that XLA has to compute ``x`` first."""
    first = jax.lax.stop_gradient(x).reshape(-1)[0]
    return (first != first) & (first == first)


def tie(x: Array, *others: Array) -> Array:
    """Returns the floating-point ``x`` with a data dependency on the other arrays."""
    for other in others:
        x = x + false_after(other).astype(x.dtype)
    return x


def compute_once(x: Array) -> Array:
    """Returns the floating-point ``x``, which XLA's CPU backend then computes only once.

    The backend fuses cheap operations into every reader, and so repeats them. It does not repeat a
    division. This one divides by 1.
    """
    return x / jnp.maximum(((x != x) & (x == x)).astype(x.dtype), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def block_by_block(
    fn: Callable[[Any, Any, Array], Array], remat: bool, trained: Any, others: Any, x: Array
) -> Array:
    """Returns ``fn(trained, others, x)``; its backward pass finishes before earlier blocks start.

    XLA's CPU backend would postpone the parameter gradients of all layers to the end, and hold the
    inputs of all their matrix products until then. It would also notice that ``jax.checkpoint``
    computes something twice, and keep the first result in memory.

    Args:
      fn: the function of one block.
      remat: whether the backward pass recomputes ``fn`` instead of storing its intermediate values.
      trained: parameters that get a gradient.
      others: parameters that get no gradient.
      x: the block's input, in a floating-point dtype.

    Returns:
      The block's output.
    """
    del remat
    return fn(trained, others, x)


def _forwards(fn: Any, remat: bool, trained: Any, others: Any, x: Array) -> tuple[Array, Any]:
    if remat:
        return fn(trained, others, x), (trained, others, x)
    return jax.vjp(lambda trained, x: fn(trained, others, x), trained, x)


def _backwards(fn: Any, remat: bool, kept: Any, g: Array) -> tuple[Any, None, Array]:
    if remat:
        trained, others, x = kept
        _, kept = jax.vjp(lambda trained, x: fn(trained, others, x), trained, tie(x, g))
    trained_gradient, x_gradient = kept(g)
    return trained_gradient, None, tie(x_gradient, *jax.tree.leaves(trained_gradient))


block_by_block.defvjp(_forwards, _backwards)
