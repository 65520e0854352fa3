"""Attention heads: choose the key/value heads to keep and refit the output projection.

A key/value head is dropped with its query heads, so that the result is attention with fewer heads.
The output is linear in the mixed values of all heads. So this is the column selection of
`modular.mlp`, with all columns of a key/value head's query heads as one group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lordjax.methods import column_selection
from lordjax.methods.base import Module, ModuleFactors
from lordjax.methods.modular.metric import Arrays, gradient_metric
from lordjax.methods.modular.mlp import SHRINKAGE


def heads(kernels: Arrays, stats: Mapping[str, Any]) -> ModuleFactors:
    """Ranks the key/value heads, and refits the output projection for every number of them.

    Args:
      kernels: ``k`` ``[m, k, d]`` and ``o`` ``[h, d, m]``; other kernels are not read.
      stats: ``moments``, the `Moments` of the mixed values ``[h·d]``, and ``gradients``, the second
        moment of the loss gradient at the output of the attention.

    Returns:
      The order of the key/value heads, the spectrum by their number, and the factors of
      `column_selection.nested_refit`.
    """
    moments, groups = stats["moments"], kernels["k"].shape[1]
    kernel = kernels["o"].reshape(-1, kernels["o"].shape[-1])
    weigh, gram = gradient_metric(stats), moments.second_moment()
    ridge = jnp.maximum(column_selection.JITTER, SHRINKAGE * len(gram) / moments.count)
    order = column_selection.group_elimination_order(gram, weigh(kernel), groups, ridge)
    columns = _columns(order, len(gram))
    gram = moments.take(columns).second_moment()
    lower, right = column_selection.nested_refit(gram, kernel[columns], ridge)
    spectrum = jnp.sum(weigh(right) ** 2, axis=1).reshape(groups, -1).sum(axis=1) / (1 + ridge)
    return ModuleFactors(spectrum, {"order": order, "lower": lower, "right": right})


def heads_errors(
    kernels: Arrays, factors: ModuleFactors, stats: Mapping[str, Any]
) -> Float[Array, "k+1"]:
    """Returns the errors at every number of key/value heads, by statistics of other tokens.

    Args:
      kernels: as for `heads`.
      factors: what `heads` returned, from statistics of some tokens.
      stats: the same statistics of other tokens.
    """
    parts, groups = factors.parts, kernels["k"].shape[1]
    columns = _columns(parts["order"], len(parts["right"]))
    gram = stats["moments"].take(columns).second_moment()
    weighted = gradient_metric(stats)(parts["right"])
    return column_selection.prefix_errors(parts["lower"], gram, weighted, len(columns) // groups)


def _columns(order: Int[Array, "k"], count: int) -> Int[Array, "n"]:
    """Returns the columns of the mixed values, those of the first key/value head first."""
    size = count // len(order)
    return (order[:, None] * size + jnp.arange(size, dtype=order.dtype)[None]).reshape(-1)


def prune_heads(kernels: Arrays, factors: ModuleFactors, count: int) -> dict[str, np.ndarray]:
    """Returns the kernels and biases of ``count`` key/value heads, which keep their order."""
    parts, (groups, width) = factors.parts, kernels["k"].shape[1:]
    chosen = np.asarray(parts["order"])[:count]
    kept = np.sort(chosen)
    new = {}
    for name in ("q", "k", "v", "q_bias", "k_bias", "v_bias"):
        if name in kernels:
            a = np.asarray(kernels[name])
            own = a.reshape(*a.shape[:-2], groups, -1, width)[..., kept, :, :]
            new[name] = own.reshape(*a.shape[:-2], -1, width)
    size = len(parts["right"]) // groups
    fitted = column_selection.refit(parts["lower"], parts["right"], count * size)
    fitted = fitted.reshape(count, size, -1)[np.argsort(chosen)]
    return new | {"o": fitted.reshape(-1, width, fitted.shape[-1])}


def heads_module() -> Module:
    """Returns the `Module` of `heads`."""
    return Module(heads, prune_heads, ("moments", "gradients"), errors=heads_errors)
