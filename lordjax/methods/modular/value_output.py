"""Value/output modules: an SVD of each head, with the output projection refit on all heads."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lordjax.methods import column_selection, linalg
from lordjax.methods.base import Module, ModuleFactors
from lordjax.methods.modular.metric import (
    Arrays,
    batched_matmul,
    gradient_metric,
    root_and_pseudo_inverse,
    to_float64,
)


def value_output(kernels: Arrays, stats: Mapping[str, Any], *, fit: bool) -> ModuleFactors:
    """Ranks the directions of every value head, and fits the output projection for every width.

    Without ``fit`` the output projection of a head is the truncated factor. For each head this is
    the optimum of the paper's two SVDs, in a form that needs only head-sized eigenproblems.

    Args:
      kernels: ``v`` ``[m, k, d]``, ``o`` ``[h, d, m]``, optionally ``v_bias`` ``[k, d]``.
      stats: ``moments``, the `Moments` of the mixed values ``[h·d]``, or ``values`` ``[k, d, d]``,
        the second moments of values without bias (as in the paper; they ignore the attention
        weights); optionally ``gradients``, as in `modular.mlp.mlp`.
      fit: whether to fit the output projection to all heads at once; needs ``moments``.

    Returns:
      The bases of the value heads, the output projection or its refit factors, and the spectrum.
    """
    o = kernels["o"]
    heads, width, out = o.shape
    kv_heads = kernels["v"].shape[1]
    weigh = gradient_metric(stats)
    whole, context = _contexts(kernels, stats, heads, kv_heads, width)
    weighted = weigh(o.reshape(-1, out)).reshape(kv_heads, -1, width, out)
    target = jnp.einsum("gjdm,gjem->gde", weighted, weighted, precision="highest")
    square, pseudo = jax.vmap(root_and_pseudo_inverse)(context)
    values, directions = jax.vmap(linalg.eigh_descending)(batched_matmul(square, target, square))
    basis, inverse = batched_matmul(pseudo, directions), batched_matmul(directions.mT, square)
    norms = jnp.linalg.norm(basis, axis=1)
    norms = jnp.where(norms > 0, norms, 1)
    basis, inverse = basis / norms[:, None], inverse * norms[..., None]
    turned = jnp.einsum(
        "gde,gjem->gjdm", inverse, o.reshape(kv_heads, -1, width, out), precision="highest"
    ).reshape(o.shape)
    if not fit:
        return ModuleFactors(jnp.sum(values, axis=0), {"basis": basis, "out": turned})
    gram = _in_bases(basis, whole)
    # Directions without values have an energy that is a rounding error, of either sign.
    lower, right = column_selection.nested_refit(
        gram, turned.transpose(1, 0, 2).reshape(-1, out), unit=linalg.mean_unit
    )
    spectrum = jnp.sum(weigh(right) ** 2, axis=1).reshape(width, heads).sum(axis=1)
    return ModuleFactors(spectrum, {"basis": basis, "lower": lower, "right": right})


def value_output_errors(
    kernels: Arrays, factors: ModuleFactors, stats: Mapping[str, Any]
) -> Float[Array, "d+1"]:
    """Returns the errors of a fitted module at every width, by statistics of other tokens.

    Args:
      kernels: as for `value_output`.
      factors: what `value_output` returned with ``fit``, from statistics of some tokens.
      stats: the same statistics of other tokens.
    """
    heads, width, _ = kernels["o"].shape
    whole, _ = _contexts(kernels, stats, heads, kernels["v"].shape[1], width)
    weighted = gradient_metric(stats)(factors.parts["right"])
    gram = _in_bases(factors.parts["basis"], whole)
    return column_selection.prefix_errors(factors.parts["lower"], gram, weighted, heads)


def _in_bases(
    basis: Float[Array, "k d r"], whole: Float[Array, "h d h d"]
) -> Float[Array, "rh rh"]:
    """Returns the second moment of the mixed values along the directions of their heads.

    Sorted by direction first and head second, so that a width is a prefix.
    """
    heads, width = whole.shape[:2]
    each = jnp.repeat(basis, heads // len(basis), axis=0)
    gram = jnp.einsum("hdr,hdje,jes->rhsj", each, whole, each, precision="highest")
    return gram.reshape(heads * width, -1)


def _contexts(
    kernels: Arrays, stats: Mapping[str, Any], heads: int, kv_heads: int, width: int
) -> tuple[Any, Float[Array, "k d d"]]:
    """Returns the second moment of the mixed values: of all heads, and summed per value head.

    The first is ``[h, d, h, d]``, or None if only ``values`` were collected. Attention weights sum
    to one, so the values' bias passes through unchanged; it is subtracted.
    """
    if "moments" not in stats:
        return None, stats["values"].second_moment()
    moments = stats["moments"]
    mean = moments.mean
    if "v_bias" in kernels:
        mean = mean - jnp.repeat(kernels["v_bias"], heads // kv_heads, axis=0).reshape(-1)
    whole = (moments.covariance() + jnp.outer(mean, mean)).reshape(heads, width, heads, width)
    own = jnp.einsum("hdhe->hde", whole)
    return whole, jnp.sum(own.reshape(kv_heads, -1, width, width), axis=1)


def prune_value_output(
    kernels: Arrays, factors: ModuleFactors, width: int
) -> dict[str, np.ndarray]:
    """Returns values and outputs of head width ``width``; the values' bias moves to the output."""
    parts, heads = factors.parts, len(kernels["o"])
    v, basis = to_float64(kernels["v"]), to_float64(parts["basis"][..., :width])
    new = {"v": (v.transpose(1, 0, 2) @ basis).transpose(1, 0, 2)}
    if "lower" in parts:
        fitted = column_selection.refit(parts["lower"], parts["right"], width * heads)
        new["o"] = fitted.reshape(width, heads, -1).transpose(1, 0, 2)
    else:
        new["o"] = np.asarray(parts["out"])[:, :width]
    if "v_bias" in kernels:
        bias, o = to_float64(kernels["v_bias"]), to_float64(kernels["o"])
        new["out_bias"] = np.einsum("hd,hdm->m", np.repeat(bias, heads // len(bias), axis=0), o)
        new["v_bias"] = np.zeros((len(bias), width))
    return new


def value_output_module(needs: tuple[str, ...], **options: Any) -> Module:
    """Returns a `Module` that uses `value_output`.

    Args:
      needs: names of the statistics.
      **options: keyword arguments of `value_output`.
    """
    errors = value_output_errors if options["fit"] else None
    return Module(
        functools.partial(value_output, **options), prune_value_output, needs, errors=errors
    )
