"""When a compiler does things: barriers are dropped on CPU, so values are tied to each other.

What is added is nothing, of which only the reader knows that: a compiler has to wait for it, and
takes a computation with it and one without it for two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def false_after(x: Array) -> Bool[Array, ""]:
    """False, as soon as ``x`` is there."""
    first = jax.lax.stop_gradient(x).reshape(-1)[0]
    return (first != first) & (first == first)


def tie(x: Array, *others: Array) -> Array:
    """``x``, floating, once the others are there."""
    for other in others:
        x = x + false_after(other).astype(x.dtype)
    return x


def compute_once(x: Array) -> Array:
    """``x``, floating, computed once: XLA's CPU backend would do it anew wherever it is read.

    A division is not repeated for every element that needs its result; this one is by 1.
    """
    return x / jnp.maximum(((x != x) & (x == x)).astype(x.dtype), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def block_by_block(
    fn: Callable[[Any, Any, Array], Array], remat: bool, trained: Any, others: Any, x: Array
) -> Array:
    """``fn(trained, others, x)``, of which a gradient is finished before one further back begins.

    XLA's CPU backend would put off the gradients of all layers' parameters to the end, and hold the
    inputs of all their products until then; and it would find that ``jax.checkpoint`` computes
    something twice, and keep it.

    Args:
      fn: of a block.
      remat: a gradient computes ``fn`` again, instead of keeping what is inside it.
      trained: has a gradient.
      others: has none.
      x: the block's input, floating.
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
    of_trained, of_x = kept(g)
    return of_trained, None, tie(of_x, *jax.tree.leaves(of_trained))


block_by_block.defvjp(_forwards, _backwards)
