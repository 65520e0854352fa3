"""Runs the equations of a function, with something else in place of its products with parameters.

Parameters enter as `View`. An equation that has no view among its inputs is bound as it is, so that
custom derivatives, rematerialization and sub-programs stay. Sub-programs that a view enters are run
inside and built again around that. A `Handler` says what a product is, and what happens where a
parameter is used in another way.

What a handler notes at products goes into its frame: path -> tree of arrays. Frames leave loops and
branches as further outputs. Noted trees of one path are added by `Handler.add`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from lordjax.functions.equations.handler import Frame, Handler, dense_all, expose_all
from lordjax.functions.equations.neurons import ELEMENTWISE, Definitions, Neurons, follow
from lordjax.functions.equations.subprograms import SUBPROGRAMS
from lordjax.functions.equations.views import EACH_ARRAY, RULES, View, picked
from lordjax.kernels.base import Kernel


class Interpreter(Handler):
    """A `Handler` that runs sub-programs as it runs the program."""

    def inner(self, jaxpr: Any, trips: int = 1) -> Callable[..., tuple[list[Any], Frame]]:
        """Returns a function that runs a sub-program and returns its outputs and its frame."""

        def run(*args: Any) -> tuple[list[Any], Frame]:
            outside = self.frame, self.trips
            self.frame, self.trips = {}, self.trips * trips
            try:
                return run_jaxpr(self, jaxpr, args), self.frame
            finally:
                self.frame, self.trips = outside

        return run


def run_jaxpr(handler: Handler, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """Runs a jaxpr; inputs and outputs are arrays or views.

    Args:
      handler: what to do with views.
      jaxpr: a `Jaxpr` without constants or a `ClosedJaxpr`.
      args: the inputs.
    """
    closed = jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())
    inner: Jaxpr = closed.jaxpr
    values: dict[Any, Any] = {}
    values.update(zip(inner.constvars, closed.consts, strict=True))
    values.update(zip(inner.invars, args, strict=True))
    last = _last_uses(inner)
    definitions = {var: eqn for eqn in inner.eqns for var in eqn.outvars}
    for i, eqn in enumerate(inner.eqns):
        found = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
        outs = _run_equation(handler, eqn, found, definitions)
        values.update(zip(eqn.outvars, outs, strict=True))
        for var in last[i]:  # so that eager runs free what no equation reads any more
            values.pop(var, None)
    return [v.val if isinstance(v, Literal) else values[v] for v in inner.outvars]


def _last_uses(jaxpr: Jaxpr) -> list[list[Any]]:
    """Returns the variables that each equation is the last one to read."""
    last: list[list[Any]] = [[] for _ in jaxpr.eqns]
    seen = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for i in reversed(range(len(jaxpr.eqns))):
        for v in jaxpr.eqns[i].invars:
            if not isinstance(v, Literal) and v not in seen:
                seen.add(v)
                last[i].append(v)
    return last


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Runs one equation on arrays, as it is."""
    with eqn.ctx.manager:
        found = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(found) if eqn.primitive.multiple_results else [found]


def _run_equation(
    handler: Handler, eqn: Any, values: list[Any], definitions: Definitions
) -> list[Any]:
    name, views = eqn.primitive.name, [isinstance(value, View) for value in values]
    neurons = any(isinstance(value, Neurons) for value in values)
    if not neurons and not any(views):
        return bind(eqn, values)
    if name in RULES and views[0] and not any(views[1:]):
        return [_view(handler, eqn, values)]
    if name == "slice" and (part := picked(values[0], eqn.params)) is not None:
        if isinstance(part.value, Kernel):
            return [part]
        return [part.replace(value=bind(eqn, [part.value])[0])]
    if name == "dot_general" and sum(views) == 1:
        first = views[0]
        view, other = values if first else values[::-1]
        return [handler.product(eqn, view, other, first=first)]
    if name == "optimization_barrier":
        return _barrier(eqn, values)
    if name in SUBPROGRAMS:
        return SUBPROGRAMS[name](handler, eqn, values)
    if neurons and name in ELEMENTWISE:
        vectors = [handler.vector(v) if isinstance(v, View) else None for v in values]
        values = [v if own is None else own for v, own in zip(values, vectors, strict=True)]
    use = "product of two parameters" if all(views) and name == "dot_general" else name
    values = dense_all(handler, values, use)
    if not neurons:
        return bind(eqn, values)
    found = follow(eqn, values, definitions)
    if found is None:
        return bind(eqn, expose_all(handler, values, name))
    handler.joined(eqn, values)
    return [found]


def _view(handler: Handler, eqn: Any, values: list[Any]) -> Any:
    """Returns what a transpose, a reshape or a conversion makes of a view."""
    view, name = values[0], eqn.primitive.name
    dims = RULES[name](view, eqn.params)
    if dims is None:
        vector = handler.vector(view) if name == "broadcast_in_dim" else None
        found = None if vector is None else follow(eqn, [vector, *values[1:]], {})
        return bind(eqn, dense_all(handler, values, name))[0] if found is None else found
    value = view.value
    if name in EACH_ARRAY:
        value = jax.tree.map(lambda a: bind(eqn, [a])[0], value)
    elif not isinstance(value, Kernel):
        (value,) = bind(eqn, [value, *values[1:]])
    dtype = eqn.params["new_dtype"] if name == "convert_element_type" else view.dtype
    return view.replace(value=value, dims=dims, dtype=jnp.dtype(dtype))


def _barrier(eqn: Any, values: list[Any]) -> list[Any]:
    """Runs a barrier on the arrays inside views and neurons as well."""
    marked = (View, Neurons)
    arrays, tree = jax.tree.flatten([v.value if isinstance(v, marked) else v for v in values])
    found = jax.tree.unflatten(tree, bind(eqn, arrays))
    pairs = zip(values, found, strict=True)
    return [v.replace(value=new) if isinstance(v, marked) else new for v, new in pairs]
