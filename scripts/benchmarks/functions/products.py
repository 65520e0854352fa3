"""Counts the products of a function with its parameters, without `lordjax.find_sites`.

A product is a ``dot_general`` with one side that is computed from parameters alone and another side
that is not. That is looser than the rule of `lordjax.find_sites`, which also wants the one side to
be a single parameter, transposed or reshaped. So a product that is found here and has no site was
missed there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

Origin = frozenset[int]  # the inputs of the function that a value is computed from


def count_products(apply: Callable[..., Any], params: Any, *args: Any) -> int:
    """Returns the number of products with parameters in one call, those in loops counted once.

    Args:
      apply: function ``(params, *args) -> outputs``.
      params: its parameters, a pytree of arrays or ``ShapeDtypeStruct``.
      *args: its other arguments, pytrees of the same kinds.
    """
    closed = jax.make_jaxpr(lambda *inputs: jax.tree.leaves(apply(*inputs)))(params, *args)
    limit = len(jax.tree.leaves(params))
    found: set[tuple[str, ...]] = set()
    origins = [frozenset((i,)) for i in range(len(closed.jaxpr.invars))]
    _follow(closed, origins, limit, found, ())
    return len(found)


def _follow(
    jaxpr: Any, inputs: Sequence[Origin], limit: int, found: set[Any], place: tuple[str, ...]
) -> list[Origin]:
    """Returns what the outputs of a jaxpr are computed from; notes the places of products."""
    inner: Jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    known: dict[Any, Origin] = dict(zip(inner.invars, inputs, strict=True))

    def origin(v: Any) -> Origin:
        return frozenset() if isinstance(v, Literal) else known.get(v, frozenset())

    for i, eqn in enumerate(inner.eqns):
        own = [origin(v) for v in eqn.invars]
        here = (*place, f"{eqn.primitive.name} {i}")
        if eqn.primitive.name == "dot_general" and _is_product(own, limit):
            found.add(here)
        insides = [_loop(body, limit, found, here) for body in _bodies(eqn, own)]
        every = frozenset().union(*own)
        outs = [frozenset().union(*one) for one in zip(*insides, strict=True)]
        known.update(zip(eqn.outvars, outs or [every] * len(eqn.outvars), strict=True))
    return [origin(v) for v in inner.outvars]


def _is_product(sides: Sequence[Origin], limit: int) -> bool:
    """Whether exactly one of two sides is computed from parameters alone."""
    alone = [bool(side) and max(side) < limit for side in sides]
    return alone[0] != alone[1]


class Body(NamedTuple):
    """A sub-program of an equation.

    Attributes:
      jaxpr: the sub-program.
      inputs: what its inputs are computed from.
      start: the first input that is an output of the step before.
      count: number of such inputs.
    """

    jaxpr: Any
    inputs: list[Origin]
    start: int = 0
    count: int = 0


def _bodies(eqn: Any, own: list[Origin]) -> list[Body]:
    """Returns the sub-programs of an equation."""
    params, name = eqn.params, eqn.primitive.name
    if name == "cond":
        return [Body(branch, own[1:]) for branch in params["branches"]]
    if name == "while":
        skipped, fixed = params["cond_nconsts"], params["body_nconsts"]
        given = own[skipped:]
        return [Body(params["body_jaxpr"], given, fixed, len(given) - fixed)]
    if name == "scan":
        return [Body(params["jaxpr"], own, params["num_consts"], params["num_carry"])]
    inner = [p for p in params.values() if isinstance(p, Jaxpr | ClosedJaxpr)]
    return [Body(p, own) for p in inner[:1]]  # the others are rules of derivatives


def _loop(body: Body, limit: int, found: set[Any], here: tuple[str, ...]) -> list[Origin]:
    """Follows a sub-program until what its inputs are computed from does not change any more."""
    given = list(body.inputs)
    while True:
        outs = _follow(body.jaxpr, given, limit, found, here)
        new = list(given)
        for i in range(body.count):
            new[body.start + i] = given[body.start + i] | outs[i]
        if new == given:
            return outs
        given = new
