"""The statistics of one product: which a method needs, and their sums over the vectors of a call.

Arrays of a product are ``[*stack, *tokens, width]``; statistics have leading axes ``stack``. The
statistics of a site by name:

* ``input``, ``output``: `Moments` of the inputs, or of the outputs where these are narrower;
* ``abs_mean``: `AbsMean` of the inputs;
* ``gradients``: `SecondMoment` of the loss gradient at the output, in the kernel's row space;
* ``row_fisher``, ``fisher``, ``weighted_inputs``, ``weighted_squares``: see
  `lordjax.calibration.gradient_updates`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lordjax.allocation.candidates import QUANTIZERS
from lordjax.calibration.gradient_updates import add_fisher
from lordjax.calibration.statistics import AbsMean, MeanSquare, Moments, SecondMoment, merged
from lordjax.functions.sites import FunctionSite
from lordjax.methods import METHODS
from lordjax.methods.quantized.weightings import WEIGHTINGS

FORWARD = ("input", "output", "abs_mean")
FISHER = ("fisher", "row_fisher")
GRADIENTS = ("gradients", *FISHER, "weighted_inputs", "weighted_squares")


def needs_of(methods: Iterable[str] | None, *, loss: bool) -> frozenset[str]:
    """Returns the names of the statistics that methods need.

    Args:
      methods: keys of `METHODS` or `QUANTIZERS`; None: what all but Fisher information need.
      loss: whether there is a loss; without one, None means statistics of activations only.
    """
    if methods is None:
        found = {"moments", "inputs", "abs_mean"}
        own = {"gradients", "weighted_inputs", "weighted_squares"} if loss else set()
        return frozenset(found | own)
    found = set()
    for name in methods:
        if name in QUANTIZERS:
            found |= set(WEIGHTINGS[QUANTIZERS[name].weighting])
            continue
        method = METHODS[name]
        needs = [method.needs, *(module.needs for module in method.modules.values())]
        found |= {need for names in needs for need in names}
    return frozenset(found)


def statistics_of(row: FunctionSite, needs: Collection[str], *, inner: bool) -> tuple[str, ...]:
    """Returns the names of a site's statistics.

    Args:
      row: the site.
      needs: what methods need.
      inner: whether the inputs are the neurons of an MLP, whose own moments are needed.
    """
    names = [name for name in ("abs_mean", *GRADIENTS) if name in needs]
    if "inputs" in needs or ("moments" in needs and (inner or row.fan_in <= row.fan_out)):
        names.append("input")
    elif "moments" in needs:
        names.append("output")
    return tuple(names)


def zeros_of(row: FunctionSite, names: Collection[str], *, inner: bool) -> dict[str, Any]:
    """Returns statistics of no vectors.

    Args:
      row: the site.
      names: names of the statistics.
      inner: see `statistics_of`; then gradients are in the outputs' own coordinates.
    """
    fan_in, fan_out = row.fan_in, row.fan_out
    makers: dict[str, Callable[[], Any]] = {
        "input": lambda: Moments.zeros(fan_in),
        "output": lambda: Moments.zeros(fan_out),
        "abs_mean": lambda: AbsMean.zeros(fan_in),
        "gradients": lambda: SecondMoment.zeros(fan_out if inner else min(fan_in, fan_out)),
        "fisher": lambda: jnp.zeros((fan_in, fan_out)),
        "row_fisher": lambda: jnp.zeros(fan_in),
        "weighted_inputs": lambda: SecondMoment.zeros(fan_in),
        "weighted_squares": lambda: MeanSquare.zeros(fan_out),
    }

    def stacked(a: Any) -> Any:
        return jnp.zeros((*row.stack, *a.shape), a.dtype)

    return jax.tree.map(stacked, {name: makers[name]() for name in names})


def over_stack(fn: Callable[..., Any], depth: int) -> Callable[..., Any]:
    """Returns a function that is mapped over leading axes of all its arguments."""
    for _ in range(depth):
        fn = jax.vmap(fn)
    return fn


def add(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the statistics of both sets of vectors together."""

    def both(a: Any, b: Any) -> Any:
        depth = a.count.ndim if isinstance(a, Moments) else 0
        return over_stack(lambda a, b: merged([a, b]), depth)(a, b)

    return {name: both(first[name], second[name]) for name in first}


def token_weights(weights: Any, tokens: Sequence[int]) -> Any:
    """Returns weights per vector ``[*tokens]``, or None if the two shapes do not fit.

    The weights' axes must be among the axes of the vectors, in their order; axes may be merged.

    Args:
      weights: one weight per token of the batch, such as ``[batch, length]``; or None.
      tokens: shape of the vectors.
    """
    if weights is None:
        return None
    for shape in (weights.shape, (weights.size,)):
        places, start = [], 0
        for size in shape:
            found = [i for i in range(start, len(tokens)) if tokens[i] == size]
            if not found:
                break
            places.append(found[0])
            start = found[0] + 1
        if len(places) == len(shape):
            full = [size if i in places else 1 for i, size in enumerate(tokens)]
            return jnp.broadcast_to(weights.reshape(full), tokens)
    return None


def forward_sums(x: Any, y: Any, weights: Any, names: Collection[str], depth: int) -> Any:
    """Returns the statistics of activations of one product.

    Args:
      x: inputs ``[*stack, *tokens, in]``.
      y: outputs ``[*stack, *tokens, out]``.
      weights: ``[*tokens]`` or None.
      names: names of the statistics.
      depth: number of axes of the stack.
    """
    kinds = {"input": (Moments, x), "output": (Moments, y), "abs_mean": (AbsMean, x)}

    def update(kind: Any, rows: Any) -> Any:
        return kind.zeros(rows.shape[-1]).update(rows, weights)

    return {
        name: over_stack(functools.partial(update, kinds[name][0]), depth)(kinds[name][1])
        for name in FORWARD
        if name in names
    }


def gradient_sums(
    x: Any, g: Any, weights: Any, basis: Any, names: Collection[str], sequences: int
) -> dict[str, Any]:
    """Returns the statistics of gradients of one product, without a stack.

    Args:
      x: inputs ``[*tokens, in]``, or None if no statistic reads them.
      g: gradient of the loss at the outputs, ``[*tokens, out]``.
      weights: ``[*tokens]`` or None.
      basis: ``[out, m]`` coordinates of the gradients; None: the outputs.
      names: names of the statistics.
      sequences: number of sequences of the batch, for Fisher information.
    """
    g = g.astype(jnp.float32)
    x = None if x is None else x.astype(jnp.float32)

    def squares(a: Any) -> Any:
        sums = jnp.sum(a**2, axis=-1)
        return sums if weights is None else jnp.where(weights > 0, sums, 0)

    found: dict[str, Any] = {}
    if "gradients" in names:
        rows = g if basis is None else jnp.matmul(g, basis, precision="highest")
        found["gradients"] = SecondMoment.zeros(rows.shape[-1]).update(rows, weights)
    if x is None:
        return found
    if "weighted_inputs" in names:
        found["weighted_inputs"] = SecondMoment.zeros(x.shape[-1]).update(x, squares(g))
    if "weighted_squares" in names:
        found["weighted_squares"] = MeanSquare.zeros(g.shape[-1]).update(g, squares(x))
    for name in FISHER:
        if name in names:
            shape = (x.shape[-1], g.shape[-1])
            rows = [_by_sequence(a, sequences) for a in (x, g)]
            zeros = jnp.zeros(shape if name == "fisher" else shape[:1])
            found[name] = add_fisher(zeros, rows[0], rows[1], 1)
    return found


def _by_sequence(a: Any, sequences: int) -> Any:
    """Returns vectors ``[*tokens, width]`` as ``[sequences, length, width]`` where that is even."""
    count = math.prod(a.shape[:-1])
    return a.reshape(sequences if count % sequences == 0 else count, -1, a.shape[-1])
