"""Sub-programs that a parameter enters: their inside is run, and they are built again around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lordjax.functions.equations.handler import Frame, Handler, dense_all, expose_all
from lordjax.functions.equations.neurons import Neurons
from lordjax.functions.equations.views import View


def _inline(handler: Handler, eqn: Any, values: list[Any]) -> list[Any]:
    """Runs the inside of a call in place of the call."""
    jaxpr = eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
    outs, frame = handler.inner(jaxpr)(*values)
    handler.note(frame)
    return outs


def _checkpoint(handler: Handler, eqn: Any, values: list[Any]) -> list[Any]:
    """Rematerializes the inside as the original does."""
    options = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
    run = jax.checkpoint(handler.inner(eqn.params["jaxpr"]), **options)
    outs, frame = run(*values)
    handler.note(frame)
    return outs


def _outputs(handler: Handler, outs: Sequence[Any], use: str) -> list[Any]:
    return [jnp.asarray(out) for out in expose_all(handler, outs, use)]


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _scan(handler: Handler, eqn: Any, values: list[Any]) -> list[Any]:
    """Scans again. Frames of parameters that are scanned over are stacked, others are summed."""
    params = eqn.params
    fixed, carried = params["num_consts"], params["num_consts"] + params["num_carry"]
    consts, init, rows = values[:fixed], values[fixed:carried], values[carried:]
    init = expose_all(handler, init, "carry of scan")
    consts, rows = (
        [handler.expose(v, "scan") if isinstance(v, Neurons) else v for v in part]
        for part in (consts, rows)
    )
    rows = [
        handler.dense(row, "scan") if isinstance(row, View) and not row.sliceable() else row
        for row in rows
    ]
    pairs = [row.for_scan() if isinstance(row, View) else (row, None) for row in rows]
    scanned = {row.path: row.place or 0 for row in rows if isinstance(row, View)}
    run = handler.inner(params["jaxpr"], params["length"])

    def step(carry: Any, xs: Any) -> tuple[Any, Any, Frame]:
        own = [x if make is None else make(x) for x, (_, make) in zip(xs, pairs, strict=True)]
        outs, frame = run(*consts, *carry, *own)
        outs = _outputs(handler, outs, "output of scan")
        return outs[: params["num_carry"]], outs[params["num_carry"] :], frame

    def body(carry: Any, xs: Any) -> tuple[Any, Any]:
        sums, (new, ys, frame) = carry[1], step(carry[0], xs)
        summed = {path: handler.add(sums[path], frame[path]) for path in sums}
        return (new, summed), (ys, {path: frame[path] for path in frame if path not in sums})

    xs = [parts for parts, _ in pairs]
    sums: Frame = {}
    if params["length"] and handler.notes:
        one = jax.tree.map(lambda a: a[0], xs)
        shapes = jax.eval_shape(lambda c, x: step(c, x)[2], init, one)
        sums = {path: _zeros(s) for path, s in shapes.items() if path not in scanned}
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    (carry, sums), (ys, frame) = lax.scan(body, (init, sums), xs, **options)
    for path, tree in frame.items():  # the loop's axis goes to its place in the stack
        place = scanned[path]
        frame[path] = jax.tree.map(lambda a, place=place: jnp.moveaxis(a, 0, place), tree)
    handler.note(frame)
    handler.note(sums)
    return [*carry, *ys]


def _cond(handler: Handler, eqn: Any, values: list[Any]) -> list[Any]:
    """Branches again; a branch that notes nothing of a parameter notes zeros."""
    index, *operands = [handler.expose(v, "cond") if isinstance(v, Neurons) else v for v in values]
    runs = [handler.inner(branch) for branch in eqn.params["branches"]]
    frames = [
        jax.eval_shape(lambda *a, run=run: run(*a)[1], *operands) if handler.notes else {}
        for run in runs
    ]
    every = {path: shape for frame in frames for path, shape in frame.items()}

    def branch(run: Callable[..., Any], *args: Any) -> tuple[list[Any], Frame]:
        outs, frame = run(*args)
        outs = _outputs(handler, outs, "output of cond")
        return outs, {path: frame.get(path, _zeros(shape)) for path, shape in every.items()}

    branches = [functools.partial(branch, run) for run in runs]
    outs, frame = lax.switch(index, branches, *operands)
    handler.note(frame)
    return outs


def _while(handler: Handler, eqn: Any, values: list[Any]) -> list[Any]:
    """Loops again; what products of the body note is summed."""
    params = eqn.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    values = [handler.expose(v, "while") if isinstance(v, Neurons) else v for v in values]
    init = dense_all(handler, values[second:], "carry of while")
    test, run = handler.inner(params["cond_jaxpr"]), handler.inner(params["body_jaxpr"])

    def step(carry: Any) -> tuple[list[Any], Frame]:
        outs, frame = run(*values[first:second], *carry)
        return _outputs(handler, outs, "output of while"), frame

    def body(state: Any) -> Any:
        carry, sums = state
        new, frame = step(carry)
        return new, {path: handler.add(sums[path], frame[path]) for path in sums}

    shapes = jax.eval_shape(lambda c: step(c)[1], init) if handler.notes else {}
    state = lax.while_loop(
        lambda state: test(*values[:first], *state[0])[0][0], body, (init, _zeros(shapes))
    )
    handler.note(state[1])
    return state[0]


# Primitive -> function (handler, equation, values) that runs its inside and builds it again.
SUBPROGRAMS: dict[str, Callable[[Handler, Any, list[Any]], list[Any]]] = {
    "jit": _inline,
    "pjit": _inline,
    "closed_call": _inline,
    "core_call": _inline,
    "custom_jvp_call": _inline,
    "custom_vjp_call": _inline,
    "remat2": _checkpoint,
    "checkpoint": _checkpoint,
    "scan": _scan,
    "cond": _cond,
    "while": _while,
}
