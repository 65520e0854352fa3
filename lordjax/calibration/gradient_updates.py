"""Updates of gradient statistics from the activations and gradients of one batch.

The accumulators, by name and then by site path:

* ``gradients``: `SecondMoment` of the gradient at the site's output;
* ``fisher``: ``[in, out]``, squared weight gradients, summed over sequences;
* ``row_fisher``: ``[in]``, the same, summed over outputs;
* ``weighted_inputs``: `SecondMoment` of the site's input, every token weighted by the squared
  norm of the gradient at its output;
* ``weighted_squares``: `MeanSquare` of the gradient at the site's output, every token weighted
  by the squared norm of its input;
* ``gates``, at ``"attention/queries"``: `HeadMoments`, per key head, of the derivative of the
  loss by a factor on each rotary pair of the queries; without rotary positions by a factor on
  all columns of a query.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lordjax.calibration.statistics import HeadMoments, MeanSquare, SecondMoment
from lordjax.models.sites import Site


def update_gradients(
    stats: dict[str, dict[str, Any]],
    sites: Mapping[str, Site],
    taps: Mapping[str, Array],
    grads: Mapping[str, Array],
    bases: Mapping[str, Any],
    mask: Bool[Array, "b s"] | None,
    shares: int,
) -> dict[str, dict[str, Any]]:
    """Adds a batch to the accumulators.

    Args:
      stats: accumulators; see the module's docstring.
      sites: site path -> site.
      taps: tap -> activation of the batch.
      grads: tap -> gradient of the loss by that activation.
      bases: site path -> ``[out, m]`` basis in which the gradient is stored; None: as it is.
      mask: False at padding.
      shares: number of devices that split the batch.
    """

    def inputs_and_gradient(path: str) -> tuple[Array, Array]:
        return taps[sites[path].input_tap], grads[sites[path].output_tap]

    def squared_norm(a: Array) -> Array:
        squares = jnp.sum(a**2, axis=-1)
        return squares if mask is None else jnp.where(mask, squares, 0)

    def second_moment(path: str, moment: SecondMoment) -> SecondMoment:
        gradient = grads[sites[path].output_tap]
        if bases[path] is not None:
            gradient = jnp.matmul(gradient, bases[path].astype(gradient.dtype), precision="highest")
        return moment.update(gradient, mask)

    def fisher(path: str, total: Array) -> Array:
        return add_fisher(total, *inputs_and_gradient(path), shares)

    def weighted_inputs(path: str, total: SecondMoment) -> SecondMoment:
        x, gradient = inputs_and_gradient(path)
        return total.update(x, squared_norm(gradient))

    def weighted_squares(path: str, total: MeanSquare) -> MeanSquare:
        x, gradient = inputs_and_gradient(path)
        return total.update(gradient, squared_norm(x))

    def saliency(tap: str, total: HeadMoments) -> HeadMoments:
        return _add_saliency(total, taps[tap], grads[tap], mask)

    add = {
        "gradients": second_moment,
        "row_fisher": fisher,
        "fisher": fisher,
        "weighted_inputs": weighted_inputs,
        "weighted_squares": weighted_squares,
        "gates": saliency,
    }
    return {
        name: {key: add[name](key, total) for key, total in table.items()}
        for name, table in stats.items()
    }


def add_fisher(
    total: Array, x: Float[Array, "b s in"], gradient: Float[Array, "b s out"], shares: int
) -> Array:
    """Adds every sequence's squared weight gradient to ``[in, out]``, or summed to ``[in]``.

    Sequences are added one by one, because the weight gradients of a whole batch may not fit.
    """

    def add(totals: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        weight_gradient = jnp.matmul(jnp.swapaxes(pair[0], 1, 2), pair[1], precision="highest")
        square = weight_gradient**2
        return totals + (square if total.ndim == 2 else jnp.sum(square, axis=-1)), None

    def by_device(a: Array) -> Array:  # [sequences of a device, devices, ...]
        return jnp.swapaxes(a.reshape(shares, -1, *a.shape[1:]), 0, 1)

    others = jnp.zeros((shares - 1, *total.shape), total.dtype)
    start = jnp.concatenate([total[None], others])
    pairs = (by_device(x), by_device(gradient))
    return jnp.sum(jax.lax.scan(add, start, pairs)[0], axis=0)


def _add_saliency(
    total: HeadMoments, queries: Array, gradient: Array, mask: Bool[Array, "b s"] | None
) -> HeadMoments:
    """Adds the effects of every key head's rotary pairs on the loss.

    A factor on a pair of a query changes the loss by gradient · query, summed over the pair. A
    factor on the key's pair has the same effect, summed over the queries of that key head.
    """
    kv_heads, pairs = total.total.shape[:2]
    # The two columns of a pair are d/2 apart, so the last axis is that of the pairs.
    effect = (gradient * queries).reshape(*queries.shape[:2], kv_heads, -1, pairs)
    return total.update(jnp.sum(effect, axis=3).reshape(*effect.shape[:2], -1), mask)
