"""Query/key modules: keep the rotary pairs with the highest scores (CR)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lordjax.methods.base import Module, ModuleFactors
from lordjax.methods.linalg import tail_errors
from lordjax.methods.modular.metric import (
    Arrays,
    batched_diagonal,
    batched_matmul,
    drop_errors,
    root_and_pseudo_inverse,
    to_float64,
)


def query_key(kernels: Arrays, stats: Mapping[str, Any], *, select: bool = False) -> ModuleFactors:
    """Ranks the rotary pairs of each key head by CR scores, or its directions by an SVD.

    Directions are used if positions are not rotary.

    Args:
      kernels: kernels in head form. ``rope_index`` ``[k, d/2]`` means that positions are rotary.
      stats: second moments ``queries`` ``[h, d, d]`` and ``keys`` ``[k, d, d]``, biases included;
        optionally ``gates`` ``[k, d/2, d/2]``, the second moment of the loss's derivative with
        respect to the scale of each rotary pair.
      select: without rotary positions, keep columns (as in the paper) instead of directions.

    Returns:
      The order of pairs or columns, or the maps of queries and keys; and the spectrum.
    """
    queries, keys = stats["queries"].second_moment(), stats["keys"].second_moment()
    kv_heads, width = keys.shape[:2]
    queries = jnp.sum(queries.reshape(kv_heads, -1, width, width), axis=1)
    if "rope_index" in kernels:
        # Energy of the pairs (i, i + d/2), which rotation does not change.
        energy = [
            jnp.sum(batched_diagonal(c).reshape(kv_heads, 2, -1), axis=1) for c in (queries, keys)
        ]
        order, spectrum = _by_score(energy[0] * energy[1], stats.get("gates"))
        # The width counts columns; the error of a pair is charged to its first column.
        pairs = jnp.stack([spectrum, jnp.zeros_like(spectrum)], axis=1).reshape(-1)
        return ModuleFactors(pairs, {"order": order})
    if select:
        order, spectrum = _by_score(batched_diagonal(queries) * batched_diagonal(keys), None)
        return ModuleFactors(spectrum, {"order": order})
    roots = [jax.vmap(root_and_pseudo_inverse)(c) for c in (queries, keys)]
    (q_root, q_inverse), (k_root, k_inverse) = roots
    u, values, v = jnp.linalg.svd(batched_matmul(q_root, k_root))
    scale = jnp.sqrt(values)[:, None]
    maps = {
        "q_map": batched_matmul(q_inverse, u) * scale,
        "k_map": batched_matmul(k_inverse, v.mT) * scale,
    }
    errors = values**2
    if "gates" in stats:
        # The loss of all directions together, divided in proportion to their energy in the logits.
        worth = jnp.sum(stats["gates"].second_moment(), axis=(1, 2)) / 2
        total = jnp.sum(errors, axis=1)
        errors = errors * (worth / jnp.where(total > 0, total, 1))[:, None]
    return ModuleFactors(jnp.sum(errors, axis=0), maps)


def query_key_errors(
    kernels: Arrays, factors: ModuleFactors, stats: Mapping[str, Any]
) -> Float[Array, "d+1"]:
    """Returns the errors of a module at every width, by statistics of other tokens.

    Args:
      kernels: as for `query_key`.
      factors: what `query_key` returned without ``select``, from statistics of some tokens.
      stats: the same statistics of other tokens; ``gates`` must be there.
    """
    parts, gates = factors.parts, stats["gates"].second_moment()
    if "rope_index" in kernels:
        effects = jax.vmap(lambda fisher, order: tail_errors(fisher[order][:, order] / 2))
        # A width counts columns; a pair is gone with its first column.
        return jnp.repeat(jnp.sum(effects(gates, parts["order"]), axis=0), 2)[1:]
    queries, keys = stats["queries"].second_moment(), stats["keys"].second_moment()
    kv_heads, width = keys.shape[:2]
    queries = jnp.sum(queries.reshape(kv_heads, -1, width, width), axis=1)
    products = [
        batched_matmul(turn.mT, moment, turn)
        for turn, moment in ((parts["q_map"], queries), (parts["k_map"], keys))
    ]
    tails = jax.vmap(tail_errors)(products[0] * products[1])
    # As in `query_key`: the loss of all directions together, divided by their energy.
    worth = jnp.sum(gates, axis=(1, 2)) / 2
    total = jnp.where(tails[:, :1] > 0, tails[:, :1], 1)
    return jnp.sum(tails / total * worth[:, None], axis=0)


def _by_score(
    squares: Float[Array, "k n"], saliency: Any
) -> tuple[Int[Array, "k n"], Float[Array, "n"]]:
    """Returns the order by decreasing squared CR score per key head, and the errors of dropping.

    With a saliency the error is half its quadratic form: the change of the loss to second order.
    Without one it is the squared score: the error of the logits without cross terms.
    """
    order = jnp.argsort(-squares, axis=1)
    if saliency is None:
        return order, jnp.sum(jnp.take_along_axis(squares, order, axis=1), axis=0)

    def errors(fisher: Array, order: Array) -> Array:
        return drop_errors(fisher[order][:, order] / 2)

    return order, jnp.sum(jax.vmap(errors)(saliency.second_moment(), order), axis=0)


def prune_query_key(kernels: Arrays, factors: ModuleFactors, width: int) -> dict[str, np.ndarray]:
    """Returns queries and keys with head width ``width``."""
    parts = factors.parts
    host = {name: np.asarray(a) for name, a in kernels.items()}
    names = [name for name in ("q", "k", "q_bias", "k_bias") if name in host]
    kv_heads, head = host["k"].shape[1:]

    def by_kv_head(name: str) -> np.ndarray:
        """Returns an array as ``[..., k, query heads per key head, d]``."""
        a = host[name]
        return a.reshape(*a.shape[:-2], kv_heads, -1, head)

    if "order" not in parts:
        maps = {n: to_float64(parts[f"{n}_map"][..., :width]) for n in ("q", "k")}
        new = {n: to_float64(by_kv_head(n)) @ maps[n[0]] for n in names}
        return {n: a.reshape(*host[n].shape[:-1], width) for n, a in new.items()}
    order, index = np.asarray(parts["order"]), {}
    if "rope_index" in host:
        pairs = np.sort(order[:, : width // 2], axis=1)
        columns = np.concatenate([pairs, pairs + head // 2], axis=1)
        index["rope_index"] = np.take_along_axis(host["rope_index"], pairs, axis=1)
    else:
        columns = np.sort(order[:, :width], axis=1)
    new = {}
    for name in names:
        a = by_kv_head(name)
        # The same columns for all query heads of a key head.
        at = columns[:, None].reshape((1,) * (a.ndim - 3) + (kv_heads, 1, width))
        picked = np.take_along_axis(a, at, axis=-1)
        new[name] = picked.reshape(*host[name].shape[:-1], width)
    return new | index


def query_key_module(needs: tuple[str, ...], **options: Any) -> Module:
    """Returns a `Module` that uses `query_key`.

    Args:
      needs: names of the statistics.
      **options: keyword arguments of `query_key`.
    """
    errors = query_key_errors if "gates" in needs else None
    return Module(functools.partial(query_key, **options), prune_query_key, needs, errors=errors)
