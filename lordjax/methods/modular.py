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
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lordjax import linalg
from lordjax.linalg import mm
from lordjax.methods import mlp_on_host
from lordjax.methods.base import Module, ModuleFactors

RIDGE = 1e-4  # of the leverage scores, relative to the mean energy of a column
# Ridge λ of an MLP's fit, of every neuron's own energy, in neurons per token. That shrinks the
# correlations by 1 + λ: those of many neurons are not believed as few tokens show them.
# And with few tokens it is not the rounding of a singular matrix that chooses the neurons.
SHRINKAGE = 1.0
RANK_TOLERANCE = 1e-12  # eigenvalues of a head's second moment below this share count as zero

Arrays = Mapping[str, Array]


def _metric(stats: Mapping[str, Any]) -> Callable[[Float[Array, "n m"]], Float[Array, "n m"]]:
    """Rows times a root of the gradient metric M; as they are without gradients."""
    if "gradients" not in stats:
        return lambda rows: rows
    root, _ = linalg.root_pair(stats["gradients"].second_moment(), linalg.GRADIENT_DAMPING)
    return lambda rows: mm(rows, root)


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
      score: ``leverage`` (ridge leverage scores, the paper's), ``elimination``
        (`linalg.elimination_order`: what the output loses), ``energy`` (``C_ii``), ``random``.
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
    weigh = _metric(stats)
    shrunk = jnp.maximum(linalg.JITTER, shrinkage * len(down) / moments.count)
    match score:
        case "leverage":
            order = jnp.argsort(linalg.leverage_complement(gram, RIDGE))
        case "elimination":
            order = linalg.elimination_order(gram, weigh(down), shrunk)
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
        parts["lower"], parts["right"] = linalg.nested_refit(gram, down, shrunk)
        spectrum = jnp.sum(weigh(parts["right"]) ** 2, axis=1) / (1 + shrunk)
    else:
        rows = weigh(down)
        spectrum = _dropped(gram * mm(rows, rows.T))
    if intercept:
        parts["mean"] = moments.mean[order]
    return ModuleFactors(spectrum, parts)


def _gram(moments: Any, centred: bool) -> Float[Array, "n n"]:
    return moments.covariance() if centred else moments.second_moment()


def _dropped(effects: Float[Array, "n n"]) -> Float[Array, "n"]:
    """Increments, at least 0, of ``Σ_{i,j≥k} effects[i, j]``: the error of dropping all from k on.

    An increment below 0 says that dropping more does better; such a width is not offered.
    """
    tails = jnp.cumsum(jnp.cumsum(effects[::-1, ::-1], axis=0), axis=1)
    errors = jnp.concatenate([jnp.zeros(1, effects.dtype), jnp.diagonal(tails)])
    return jnp.diff(jax.lax.cummax(errors))[::-1]


def _double(a: Any) -> np.ndarray:
    return np.asarray(a, np.float64)


def narrow_mlp(kernels: Arrays, factors: ModuleFactors, width: int) -> dict[str, np.ndarray]:
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
        new["down"] = linalg.refit(parts["lower"], parts["right"], width)
    if "mean" in parts:
        mean, down = _double(parts["mean"]), _double(down)
        new["out_bias"] = mean @ down[parts["order"]] - mean[:width] @ new["down"]
    return new


# --- qk -------------------------------------------------------------------------------------------


def query_key(kernels: Arrays, stats: Mapping[str, Any], *, select: bool = False) -> ModuleFactors:
    """Orders what a head compares: rotary pairs by CR, or directions by SVD without rotation.

    Args:
      kernels: ``rope_index`` ``[k, d/2]`` says that positions are rotary.
      stats: ``queries`` ``[h, d, d]`` and ``keys`` ``[k, d, d]`` second moments, biases included;
        ``gates``, optional, ``[k, d/2, d/2]``: second moment of the loss' derivative by the size
        of each rotary pair.
      select: without rotary positions, keep columns (the paper's) instead of directions.
    """
    queries, keys = stats["queries"].second_moment(), stats["keys"].second_moment()
    groups, width = keys.shape[:2]
    queries = jnp.sum(queries.reshape(groups, -1, width, width), axis=1)
    if "rope_index" in kernels:
        # Of half-split pairs (i, i + d/2); the same before and after the rotation.
        energy = [jnp.sum(_diagonals(c).reshape(groups, 2, -1), axis=1) for c in (queries, keys)]
        order, spectrum = _by_score(energy[0] * energy[1], stats.get("gates"))
        # A step of the width is one column; an error is paid for the pair.
        pairs = jnp.stack([spectrum, jnp.zeros_like(spectrum)], axis=1).reshape(-1)
        return ModuleFactors(pairs, {"order": order})
    if select:
        order, spectrum = _by_score(_diagonals(queries) * _diagonals(keys), None)
        return ModuleFactors(spectrum, {"order": order})
    roots = [jax.vmap(_root_and_pseudo_inverse)(c) for c in (queries, keys)]
    (q_root, q_inverse), (k_root, k_inverse) = roots
    u, values, v = jnp.linalg.svd(_bmm(q_root, k_root))
    scale = jnp.sqrt(values)[:, None]
    maps = {"q_map": _bmm(q_inverse, u) * scale, "k_map": _bmm(k_inverse, v.mT) * scale}
    errors = values**2
    if "gates" in stats:
        # In the loss: a direction's share of the logits' energy, of what all of them are worth.
        worth = jnp.sum(stats["gates"].second_moment(), axis=(1, 2)) / 2
        total = jnp.sum(errors, axis=1)
        errors = errors * (worth / jnp.where(total > 0, total, 1))[:, None]
    return ModuleFactors(jnp.sum(errors, axis=0), maps)


def _diagonals(c: Float[Array, "n d d"]) -> Float[Array, "n d"]:
    return jnp.diagonal(c, axis1=1, axis2=2)


def _bmm(*factors: Array) -> Array:
    return functools.reduce(lambda a, b: jnp.matmul(a, b, precision="highest"), factors)


def _by_score(
    squares: Float[Array, "k n"], gates: Any
) -> tuple[Int[Array, "k n"], Float[Array, "n"]]:
    """Order by falling squared CR score in each group, and the error of dropping each place.

    With gates the error is half their quadratic form: the loss to second order. Without, the
    squared score: the error in the logits but for the products of different places.
    """
    order = jnp.argsort(-squares, axis=1)
    if gates is None:
        return order, jnp.sum(jnp.take_along_axis(squares, order, axis=1), axis=0)

    def errors(fisher: Array, order: Array) -> Array:
        return _dropped(fisher[order][:, order] / 2)

    return order, jnp.sum(jax.vmap(errors)(gates.second_moment(), order), axis=0)


def narrow_query_key(kernels: Arrays, factors: ModuleFactors, width: int) -> dict[str, np.ndarray]:
    """Queries and keys of head width ``width``."""
    parts = factors.parts
    host = {name: np.asarray(a) for name, a in kernels.items()}
    names = [name for name in ("q", "k", "q_bias", "k_bias") if name in host]
    groups, head = host["k"].shape[1:]

    def grouped(name: str) -> np.ndarray:
        """``[..., k, heads per group, d]``."""
        a = host[name]
        return a.reshape(*a.shape[:-2], groups, -1, head)

    if "order" not in parts:
        maps = {n: _double(parts[f"{n}_map"][..., :width]) for n in ("q", "k")}
        new = {n: _double(grouped(n)) @ maps[n[0]] for n in names}
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
        a = grouped(name)
        # The same columns for all heads of a group.
        at = columns[:, None].reshape((1,) * (a.ndim - 3) + (groups, 1, width))
        picked = np.take_along_axis(a, at, axis=-1)
        new[name] = picked.reshape(*host[name].shape[:-1], width)
    return new | index


# --- vo -------------------------------------------------------------------------------------------


def value_output(kernels: Arrays, stats: Mapping[str, Any], *, fit: bool) -> ModuleFactors:
    """Orders the directions of every value head, and fits the output projection for every width.

    Args:
      kernels: ``v`` ``[m, k, d]``, ``o`` ``[h, d, m]``, optional ``v_bias`` ``[k, d]``.
      stats: ``moments`` `Moments` of the attention's output ``[h·d]``, or ``values`` ``[k, d, d]``
        second moments without the bias (the paper's, which ignores where attention looks);
        ``gradients`` as in `mlp`.
      fit: fit the output projection to all heads at once; needs ``moments``.

    Without ``fit`` the projection of each head is the truncated factor: per head, the optimum of
    the paper's two SVDs in a form that needs only head-sized eigenproblems.
    """
    o = kernels["o"]
    heads, width, out = o.shape
    groups = kernels["v"].shape[1]
    weigh = _metric(stats)
    whole, context = _contexts(kernels, stats, heads, groups, width)
    weighted = weigh(o.reshape(-1, out)).reshape(groups, -1, width, out)
    target = jnp.einsum("gjdm,gjem->gde", weighted, weighted, precision="highest")
    square, pseudo = jax.vmap(_root_and_pseudo_inverse)(context)
    values, directions = jax.vmap(linalg.eigh_descending)(_bmm(square, target, square))
    basis, inverse = _bmm(pseudo, directions), _bmm(directions.mT, square)
    norms = jnp.linalg.norm(basis, axis=1)
    norms = jnp.where(norms > 0, norms, 1)
    basis, inverse = basis / norms[:, None], inverse * norms[..., None]
    turned = jnp.einsum(
        "gde,gjem->gjdm", inverse, o.reshape(groups, -1, width, out), precision="highest"
    ).reshape(o.shape)
    if not fit:
        return ModuleFactors(jnp.sum(values, axis=0), {"basis": basis, "out": turned})
    # Ordered by direction first and head second, so that a width is a prefix.
    each = jnp.repeat(basis, heads // groups, axis=0)
    gram = jnp.einsum("hdr,hdje,jes->rhsj", each, whole, each, precision="highest")
    gram = gram.reshape(heads * width, -1)
    # Directions in which the values never go have the energy of rounding, of either sign.
    lower, right = linalg.nested_refit(
        gram, turned.transpose(1, 0, 2).reshape(-1, out), unit=linalg.mean_unit
    )
    spectrum = jnp.sum(weigh(right) ** 2, axis=1).reshape(width, heads).sum(axis=1)
    return ModuleFactors(spectrum, {"basis": basis, "lower": lower, "right": right})


def _contexts(
    kernels: Arrays, stats: Mapping[str, Any], heads: int, groups: int, width: int
) -> tuple[Any, Float[Array, "k d d"]]:
    """Second moment of the mixed values of all heads ``[h, d, h, d]``, and summed over a group.

    Attention rows sum to one, so the values' bias goes through as it is and is taken out.
    """
    if "moments" not in stats:
        return None, stats["values"].second_moment()
    moments = stats["moments"]
    mean = moments.mean
    if "v_bias" in kernels:
        mean = mean - jnp.repeat(kernels["v_bias"], heads // groups, axis=0).reshape(-1)
    whole = (moments.covariance() + jnp.outer(mean, mean)).reshape(heads, width, heads, width)
    own = jnp.einsum("hdhe->hde", whole)
    return whole, jnp.sum(own.reshape(groups, -1, width, width), axis=1)


def _root_and_pseudo_inverse(c: Float[Array, "d d"]) -> tuple[Array, Array]:
    """``C^½`` and its pseudo-inverse."""
    values, vectors = linalg.eigh_descending(c)
    there = values > RANK_TOLERANCE * values[0]
    root = jnp.sqrt(jnp.where(there, values, 0))
    inverse = jnp.where(there, 1 / jnp.where(there, root, 1), 0)
    return mm(vectors * root[None], vectors.T), mm(vectors * inverse[None], vectors.T)


def narrow_value_output(
    kernels: Arrays, factors: ModuleFactors, width: int
) -> dict[str, np.ndarray]:
    """Values and outputs of head width ``width``; the values' bias moves to the output."""
    parts, heads = factors.parts, len(kernels["o"])
    v, basis = _double(kernels["v"]), _double(parts["basis"][..., :width])
    new = {"v": (v.transpose(1, 0, 2) @ basis).transpose(1, 0, 2)}
    if "lower" in parts:
        fitted = linalg.refit(parts["lower"], parts["right"], width * heads)
        new["o"] = fitted.reshape(width, heads, -1).transpose(1, 0, 2)
    else:
        new["o"] = np.asarray(parts["out"])[:, :width]
    if "v_bias" in kernels:
        bias, o = _double(kernels["v_bias"]), _double(kernels["o"])
        new["out_bias"] = np.einsum("hd,hdm->m", np.repeat(bias, heads // len(bias), axis=0), o)
        new["v_bias"] = np.zeros((len(bias), width))
    return new


def mlp_module(needs: tuple[str, ...], **options: Any) -> Module:
    """A `Module` of `mlp`."""
    bias, score, host = options.get("intercept", False), options["score"], {}
    if score in mlp_on_host.SCORES and options.get("fit", True):
        own = {name: value for name, value in options.items() if name != "fit"}
        run = functools.partial(mlp_on_host.mlp, ridge=RIDGE, **own)
        host = {"host": run, "host_work": functools.partial(mlp_on_host.work, score=score)}
    return Module(functools.partial(mlp, **options), narrow_mlp, needs, bias=bias, **host)


def query_key_module(needs: tuple[str, ...], **options: Any) -> Module:
    """A `Module` of `query_key`."""
    return Module(functools.partial(query_key, **options), narrow_query_key, needs)


def value_output_module(needs: tuple[str, ...], **options: Any) -> Module:
    """A `Module` of `value_output`."""
    return Module(functools.partial(value_output, **options), narrow_value_output, needs)
