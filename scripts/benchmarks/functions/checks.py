"""What has to hold of a function that lordjax compresses, as numbers for a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lordjax
from lordjax.functions.collecting import Collection
from lordjax.functions.equations.tracing import open_call
from lordjax.functions.observing import observe
from lordjax.functions.site_statistics import needs_of
from lordjax.kernels import trees
from lordjax.kernels.layout import Layout, Rearranged
from lordjax.kernels.low_rank import LowRank
from lordjax.scripts.benchmarks.functions.models import Case
from lordjax.scripts.benchmarks.functions.products import count_products


def found(case: Case) -> dict[str, int]:
    """Compares the products of `lordjax.find_sites` with those of `count_products`.

    Returns:
      The products by both counts (``counted``, ``seen``), ``sites``, ``modules`` (MLPs), and the
      matrices that are in products and stay dense (``left``).
    """
    sites = lordjax.find_sites(case.apply, case.params, *case.batch)
    return {
        "counted": count_products(case.apply, case.params, *case.batch),
        "seen": sum(row.uses.count("product") for row in sites.values()),
        "sites": len(sites.names()),
        "left": len([path for path in sites.left_dense if sites[path].matrix is not None]),
        "modules": len(sites.modules),
    }


def statistics(case: Case) -> Any:
    """Returns the statistics of two batches, with gradients: halves of the case's batch."""
    halves = [jax.tree.map(lambda a, h=h: a[h::2], case.batch) for h in (0, 1)]
    return lordjax.collect(case.apply, case.params, halves, loss=case.loss)


def observed_difference(case: Case, *, gradients: bool = True) -> float:
    """Returns what statistics change in a function's outputs; see `difference`.

    Args:
      case: the model.
      gradients: whether gradients at the products are taken, too.
    """
    call = open_call(case.params, case.batch, {}, kernels=False)
    loss = case.loss if gradients else None
    run = Collection(case.apply, case.params, case.batch, needs_of(None, loss=gradients), loss)
    given = call, run.apply, run.sites, run.wanted, run.bases, run.loss, run.weights
    outputs, _, _ = observe(*given)
    return difference(outputs, case.apply(case.params, *case.batch))


def difference(new: Any, old: Any) -> float:
    """Returns the largest difference of two outputs, relative to the largest number of the old."""
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    return max(
        float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1)) for a, b in pairs
    )


def full_rank(case: Case) -> float:
    """Returns what pairs of factors of full rank change in the outputs; see `difference`."""
    sites = lordjax.find_sites(case.apply, case.params, *case.batch)
    leaves = trees.flatten(case.params)
    pairs = {path: _pair(sites[path].layout, leaves[path]) for path in sites.names()}
    fast = lordjax.compressed(case.apply)
    outputs = fast(trees.update(case.params, pairs), *case.batch)
    return difference(outputs, case.apply(case.params, *case.batch))


def _pair(layout: Layout, leaf: Any) -> Rearranged:
    """Returns a parameter as a pair of factors of full rank."""
    left, values, right = jnp.linalg.svd(layout.to_matrix(leaf), full_matrices=False)
    return Rearranged(LowRank(left * values[..., None, :], right), layout)


def transforms(case: Case, small: Any) -> dict[str, bool]:
    """Runs a compressed function under JAX's transformations; says which of them are right.

    Args:
      case: the model.
      small: its compressed parameters.

    Returns:
      Name of the transformation -> whether it gives the same as without it, in finite numbers.
    """
    fast = lordjax.compressed(case.apply)
    outputs = fast(small, *case.batch)

    def close(new: Any, old: Any = outputs) -> bool:
        finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(new))
        return finite and difference(new, old) < 1e-4

    def loss(params: Any, run: Callable[..., Any] = fast) -> Any:
        return jnp.mean(case.loss(run(params, *case.batch), *case.batch))

    parts = jax.tree.map(lambda a: a.reshape(2, -1, *a.shape[1:]), case.batch)
    halves = [fast(small, *jax.tree.map(lambda a, i=i: a[i], parts)) for i in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *halves)
    axes = (None, *(0 for _ in parts))
    grads = jax.grad(loss)(small)
    return {
        "jit": close(jax.jit(fast)(small, *case.batch)),
        "grad": close(grads, grads) and any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads)),
        "vmap": close(jax.vmap(fast, in_axes=axes)(small, *parts), stacked),
        "pmap": close(
            jax.pmap(fast, in_axes=axes, devices=jax.devices()[:2])(small, *parts), stacked
        ),
        "remat": close(jax.grad(lambda p: loss(p, jax.checkpoint(fast)))(small), grads),
    }
