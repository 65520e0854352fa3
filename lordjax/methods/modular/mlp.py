"""MLP modules: choose the neurons to keep and refit the down projection (Nyström).

`lordjax.methods.modular` describes the methods and the layout of arrays. Source: MoDeGPT, arXiv
2408.09632; theory/modegpt §2.
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
from lordjax.methods.linalg import mm, tail_errors
from lordjax.methods.modular import mlp_on_host
from lordjax.methods.modular.metric import Arrays, drop_errors, gradient_metric, to_float64

RIDGE = 1e-4  # ridge of the leverage scores, relative to the mean energy of a column
# Ridge λ of the MLP refit, relative to each neuron's own energy, in units of neurons per token. It
# shrinks correlations by 1 / (1 + λ), because correlations estimated from few tokens do not
# generalize. It also keeps the rounding errors of a singular Gram matrix from deciding which
# neurons are kept.
SHRINKAGE = 1.0


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
    """Ranks the neurons of an MLP and refits ``down`` for every width.

    Args:
      kernels: ``down`` ``[f, m]``; other kernels are not read.
      stats: ``moments``, the `Moments` of the hidden state ``[f]``; optionally ``gradients``, the
        second moment of the loss gradient at the MLP's output.
      score: how neurons are ranked. ``leverage``: ridge leverage scores, as in the paper;
        ``elimination``: error added to the output (`column_selection.elimination_order`);
        ``energy``: ``C_ii``; ``random``.
      fit: whether to refit ``down`` by least squares; False slices it.
      intercept: whether to fit a bias as well.
      shrinkage: ridge of the refit in neurons per token, see `SHRINKAGE`. Predicted errors assume
        correlations divided by 1 + λ, and energies (variances with an intercept) as measured.
      seed: seed of the score ``random``.

    Returns:
      The order of the neurons, the spectrum, and with ``fit`` the factors of `nested_refit`.

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
            raise ValueError(
                f"unknown score {score!r}; expected leverage, elimination, energy or random"
            )
    # Computed again from the float32 sums, so that the first one is freed during the selection.
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


def mlp_errors(
    kernels: Arrays,
    factors: ModuleFactors,
    stats: Mapping[str, Any],
    *,
    fit: bool = True,
    intercept: bool = False,
) -> Float[Array, "f+1"]:
    """Returns the errors of an MLP at every width, by statistics of other tokens.

    Args:
      kernels: as for `mlp`.
      factors: what `mlp` returned, from statistics of some tokens.
      stats: the same statistics of other tokens.
      fit: as for `mlp`.
      intercept: as for `mlp`.
    """
    parts, weigh = factors.parts, gradient_metric(stats)
    moments = stats["moments"].take(parts["order"])
    gram = _gram(moments, intercept)
    if intercept:  # the bias restores the mean of the first tokens
        shift = moments.mean - parts["mean"]
        gram = gram + jnp.outer(shift, shift)
    if fit:
        return column_selection.prefix_errors(parts["lower"], gram, weigh(parts["right"]))
    rows = weigh(kernels["down"][parts["order"]])
    return tail_errors(gram * mm(rows, rows.T))


def _gram(moments: Any, centred: bool) -> Float[Array, "n n"]:
    """Returns the covariance, or the second moment."""
    return moments.covariance() if centred else moments.second_moment()


def prune_mlp(kernels: Arrays, factors: ModuleFactors, width: int) -> dict[str, np.ndarray]:
    """Returns the kernels and biases of the MLP with ``width`` neurons."""
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


def mlp_module(needs: tuple[str, ...], **options: Any) -> Module:
    """Returns a `Module` that uses `mlp`.

    Args:
      needs: names of the statistics.
      **options: keyword arguments of `mlp`.
    """
    bias, score, extra = options.get("intercept", False), options["score"], {}
    fit = options.get("fit", True)
    if score in mlp_on_host.SCORES and fit:
        own = {name: value for name, value in options.items() if name != "fit"}
        extra = {
            "host": functools.partial(mlp_on_host.mlp, ridge=RIDGE, **own),
            "host_work": functools.partial(mlp_on_host.work, score=score),
            "host_errors": functools.partial(mlp_on_host.errors, intercept=bias),
        }
    errors = functools.partial(mlp_errors, fit=fit, intercept=bias)
    factor = functools.partial(mlp, **options)
    return Module(factor, prune_mlp, needs, bias=bias, errors=errors, **extra)
