"""MoDeGPT: layers that share an inner width are compressed together, and stay dense but narrower.

With hidden states z (inside the MLP), queries q, keys k, values v of one head, C their second
moments, every function here shortens the inner width of one pair of layers:

========  =====================  =======================================================
module    pair                   decomposition
========  =====================  =======================================================
``mlp``   up (and gate), down    Nyström: keep columns S of z, fit ``down`` again on them
``qk``    query, key             CR: keep the rotary pairs of largest ``‖q_p‖·‖k_p‖``;
                                 without rotary positions a truncated SVD of ``C_Q^½ C_K^½``
``vo``    value, output          SVD of ``C^½ W_O``, then ``W_O`` fitted again on all heads
========  =====================  =======================================================

A matrix inside a nonlinearity (up, gate; queries and keys under a rotation) can only lose columns;
one outside (down, output) is free and takes what least squares gives it.

Beyond the paper: errors in the metric M of the loss gradient at the module's output, so that they
compare across modules; one factorisation for all widths; heads of a group decided together;
the output projection fitted to all heads at once.

``factor`` functions are pure and jittable; ``narrow_*`` take and give host arrays, since they would
otherwise compile for every width, and multiply in float64.

Arrays are in head form: q ``[m, h, d]``, k and v ``[m, k, d]``, o ``[h, d, m]``; h query heads, k
key/value heads, d head width, m model width, f MLP width.

Source: MoDeGPT, arXiv 2408.09632; theory/modegpt §2 to §4 for the exact, cheaper forms.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lordjax.methods import column_selection
from lordjax.methods.base import Module, ModuleFactors
from lordjax.methods.linalg import mm
from lordjax.methods.modular import mlp_on_host
from lordjax.methods.modular.metric import Arrays, drop_errors, gradient_metric, to_float64

RIDGE = 1e-4  # of the leverage scores, relative to the mean energy of a column
# Ridge λ of an MLP's fit, of every neuron's own energy, in neurons per token. That shrinks the
# correlations by 1 + λ: those of many neurons are not believed as few tokens show them.
# And with few tokens it is not the rounding of a singular matrix that chooses the neurons.
SHRINKAGE = 1.0


# --- mlp ------------------------------------------------------------------------------------------


def mlp(
    kernels: Arrays,
    stats: Mapping[str, Any],
    *,
    score: str,
    fit: bool = True,
    intercept: bool = False,
    shrinkage: float = 0.0,
    seed: int = 0,
) -> ModuleFactors:
    """Orders the neurons of an MLP and fits ``down`` for every width.

    Args:
      kernels: ``down`` ``[f, m]``; the others are only sliced.
      stats: ``moments`` `Moments` of the hidden state ``[f]``; ``gradients``, optional, second
        moment of the loss gradient at the MLP's output.
      score: how neurons are ranked. ``leverage``: ridge leverage scores, as in the paper;
        ``elimination``: error added to the output (`column_selection.elimination_order`);
        ``energy``: ``C_ii``; ``random``.
      fit: fit ``down`` by least squares; False only slices it.
      intercept: fit a bias besides.
      shrinkage: ridge of the fit in neurons per token, see `SHRINKAGE`. Predicted errors are those
        of correlations over 1 + λ, energies (with an intercept, variances) as they are.
      seed: of ``random``.

    Raises:
      ValueError: if the score is unknown.
    """
    moments, down = stats["moments"], kernels["down"]
    gram = _gram(moments, intercept)
    weigh = gradient_metric(stats)
    shrunk = jnp.maximum(column_selection.JITTER, shrinkage * len(down) / moments.count)
    match score:
        case "leverage":
            order = jnp.argsort(column_selection.leverage_complement(gram, RIDGE))
        case "elimination":
            order = column_selection.elimination_order(gram, weigh(down), shrunk)
        case "energy":
            order = jnp.argsort(-jnp.diagonal(gram))
        case "random":
            order = jax.random.permutation(jax.random.key(seed), len(gram))
        case _:
            raise ValueError(f"unknown score {score!r}")
    # Taken again, from the float32 sums: the first one need not live through the choice.
    gram, down = _gram(moments.take(order), intercept), down[order]
    parts = {"order": order}
    if fit:
        parts["lower"], parts["right"] = column_selection.nested_refit(gram, down, shrunk)
        spectrum = jnp.sum(weigh(parts["right"]) ** 2, axis=1) / (1 + shrunk)
    else:
        rows = weigh(down)
        spectrum = drop_errors(gram * mm(rows, rows.T))
    if intercept:
        parts["mean"] = moments.mean[order]
    return ModuleFactors(spectrum, parts)


def _gram(moments: Any, centred: bool) -> Float[Array, "n n"]:
    return moments.covariance() if centred else moments.second_moment()


def prune_mlp(kernels: Arrays, factors: ModuleFactors, width: int) -> dict[str, np.ndarray]:
    """The MLP with ``width`` neurons."""
    parts = factors.parts
    kept = np.asarray(parts["order"])[:width]
    new = {
        name: np.asarray(kernels[name])[..., kept]
        for name in ("gate", "up", "gate_bias", "up_bias")
        if name in kernels
    }
    down = np.asarray(kernels["down"])
    new["down"] = down[kept]
    if "lower" in parts:
        new["down"] = column_selection.refit(parts["lower"], parts["right"], width)
    if "mean" in parts:
        mean, down = to_float64(parts["mean"]), to_float64(down)
        new["out_bias"] = mean @ down[parts["order"]] - mean[:width] @ new["down"]
    return new


# --- qk -------------------------------------------------------------------------------------------


# --- vo -------------------------------------------------------------------------------------------


def mlp_module(needs: tuple[str, ...], **options: Any) -> Module:
    """A `Module` of `mlp`."""
    bias, score, host = options.get("intercept", False), options["score"], {}
    if score in mlp_on_host.SCORES and options.get("fit", True):
        own = {name: value for name, value in options.items() if name != "fit"}
        run = functools.partial(mlp_on_host.mlp, ridge=RIDGE, **own)
        host = {"host": run, "host_work": functools.partial(mlp_on_host.work, score=score)}
    return Module(functools.partial(mlp, **options), prune_mlp, needs, bias=bias, **host)
