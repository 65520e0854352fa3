"""Runs a function on one batch and takes the statistics of its products."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lordjax.functions.equations.handler import Frame
from lordjax.functions.equations.interpreter import Interpreter, bind
from lordjax.functions.equations.tracing import Apply, Call, trace
from lordjax.functions.equations.views import (
    Product,
    View,
    inputs_of,
    outputs_of,
    product_of,
    unpicked,
    view_of,
)
from lordjax.functions.held_out import Loss
from lordjax.functions.site_statistics import (
    GRADIENTS,
    add,
    forward_sums,
    gradient_sums,
    token_weights,
    zeros_of,
)
from lordjax.functions.sites import Sites
from lordjax.functions.statistics import inner_sites

Wanted = Mapping[str, Collection[str]]  # path -> names of its statistics


class Collector(Interpreter):
    """Computes a function as it is, and adds up statistics of its products.

    Args:
      wanted: path -> names of the statistics.
      sites: the sites.
      weights: one weight per token of the batch, or None.
      sequences: number of sequences of the batch.
    """

    def __init__(self, wanted: Wanted, sites: Sites, weights: Any, sequences: int) -> None:
        super().__init__()
        self.wanted, self.sites, self.weights = wanted, sites, weights
        self.sequences = sequences
        self.unweighted: set[str] = set()

    def add(self, first: Any, second: Any) -> Any:
        """Adds statistics."""
        return add(first, second)

    def product(self, eqn: Any, view: View, other: Any, *, first: bool) -> Any:
        """Computes a product as it is, and notes its statistics."""
        y = bind(eqn, [view.value, other] if first else [other, view.value])[0]
        if view.path not in self.wanted:
            return y
        found = product_of(view, other.ndim, eqn.params, first=first)
        if found.matrix != self.sites[view.path].matrix:
            raise ValueError(
                f"{view.path}: the function uses it as another matrix than in the first batch; "
                "expected the same products for all batches"
            )
        names, depth = self.wanted[view.path], len(found.inner.stack)
        x = inputs_of(other, view, found)
        weights = token_weights(self.weights, x.shape[depth:-1])
        if self.weights is not None and weights is None:
            self.unweighted.add(view.path)
        outs = outputs_of(y, view, found)
        sums = forward_sums(x, outs, weights, names, depth)
        self.note({view.path: unpicked(view, sums)})
        if view.extra is None:
            return y
        return self._tap(y, x, weights, view, found)

    def _tap(self, y: Any, x: Any, weights: Any, view: View, product: Product) -> Any:
        """Returns ``y``; its gradient becomes statistics, as the gradient of zeros."""
        names, depth = tuple(view.extra["zeros"]), len(product.inner.stack)
        x = x if set(names) - {"gradients"} else None
        frozen = view.replace(value=None, extra=None)  # static, so that no tracer is closed over

        def sums(x: Any, g: Any, basis: Any, weights: Any) -> Any:
            return gradient_sums(x, g, weights, basis, names, self.sequences)

        @jax.custom_vjp
        def tap(y: Any, x: Any, weights: Any, basis: Any, zeros: Any) -> Any:
            del x, weights, basis, zeros
            return y

        def forwards(y: Any, x: Any, weights: Any, basis: Any, zeros: Any) -> Any:
            del zeros
            return y, (x, weights, basis)

        def backwards(kept: Any, g: Any) -> Any:
            x, weights, basis = kept
            run = sums
            for _ in range(depth):
                run = jax.vmap(run, in_axes=(0, 0, 0, None))
            return g, None, None, None, run(x, outputs_of(g, frozen, product), basis, weights)

        tap.defvjp(forwards, backwards)
        return tap(y, x, weights, view.extra["basis"], view.extra["zeros"])


def observe(
    call: Call,
    apply: Apply,
    sites: Sites,
    wanted: Wanted,
    bases: Mapping[str, Any],
    loss: Loss | None,
    weights: Callable[..., Any] | None,
) -> tuple[Any, Frame, set[str]]:
    """Runs a function on one batch and returns its output, its statistics and unweighted sites.

    Args:
      call: the function's arguments.
      apply: the function.
      sites: its sites.
      wanted: path -> names of the statistics.
      bases: path -> coordinates of the gradients, ``[*stack, out, m]``.
      loss: function ``(outputs, *batch) -> losses``; None: no gradients.
      weights: function ``(*batch) -> one weight per token``; None: all count 1.
    """
    args, kwargs = call.rebuild(call.leaves, call.inputs)
    batch = args[1:]
    given = None if weights is None else jnp.asarray(weights(*batch, **kwargs), jnp.float32)
    counted = Collector(wanted, sites, given, _sequences(call.inputs))
    inner = inner_sites(sites)

    def views(zeros: Mapping[str, Any]) -> list[Any]:
        found = []
        for path, leaf in zip(call.paths, call.leaves, strict=True):
            if path not in wanted:
                found.append(leaf)
                continue
            view = view_of(path, leaf, leaf.shape, leaf.dtype, sites[path].matrix)
            extra = {"zeros": zeros[path], "basis": bases.get(path)} if path in zeros else None
            found.append(view.replace(extra=extra))
        return found

    traced = trace(apply, call)
    if loss is None:
        outs = traced.run(counted, [*views({}), *call.inputs])
        return outs, counted.frame, counted.unweighted
    zeros = {
        path: zeros_of(sites[path], own, inner=path in inner)
        for path, names in wanted.items()
        if (own := [name for name in names if name in GRADIENTS])
    }

    def total(zeros: Mapping[str, Any]) -> Any:
        outs = traced.run(counted, [*views(zeros), *call.inputs])
        losses = jnp.sum(loss(outs, *batch, **kwargs))
        return losses.astype(jnp.float32), (outs, counted.frame)

    gradients, (outs, frame) = jax.grad(total, has_aux=True)(zeros)
    both = {path: {**frame.get(path, {}), **gradients.get(path, {})} for path in wanted}
    return outs, {path: own for path, own in both.items() if own}, counted.unweighted


def _sequences(inputs: Sequence[Any]) -> int:
    """Returns the number of sequences of a batch: the length of its first array."""
    return next((a.shape[0] for a in inputs if a.shape), 1)
