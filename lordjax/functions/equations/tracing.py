"""Functions of a parameter tree as jaxprs: leaves with paths, arrays apart from constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr

from lordjax.functions.equations.handler import Handler, expose_all
from lordjax.functions.equations.interpreter import run_jaxpr
from lordjax.kernels import trees
from lordjax.kernels.base import Kernel, is_kernel

Apply = Callable[..., Any]


def is_array(leaf: Any) -> bool:
    """Returns whether a leaf is an array or the shape of one; other leaves are constants."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and the dtype that a function sees of a leaf."""
    return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)


class Call(NamedTuple):
    """A function's arguments: a tree of parameters, other arrays, and constants.

    Attributes:
      paths: paths of the leaves that are arrays or kernels.
      leaves: these leaves.
      inputs: all other arrays of the arguments.
      rebuild: function ``(leaves, inputs) -> (args, kwargs)`` that puts others in their places.
      key: what decides the structure, hashable if the constants are.
    """

    paths: tuple[str, ...]
    leaves: list[Any]
    inputs: list[Any]
    rebuild: Callable[[Sequence[Any], Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]
    key: Any


def open_call(
    params: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, kernels: bool
) -> Call:
    """Returns the arrays of a call, and how to put others in their places.

    Args:
      params: the first argument.
      args: the other positional arguments.
      kwargs: the keyword arguments.
      kernels: whether a kernel is one leaf; otherwise its arrays are leaves.
    """
    stop = is_kernel if kernels else None
    flat, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=stop)
    mine = [is_array(leaf) for _, leaf in flat]
    paths = [trees.path_str(keys) for keys, _ in flat]
    others, rest = jax.tree.flatten((tuple(args), dict(kwargs)))
    theirs = [is_array(leaf) for leaf in others]
    fixed = tuple(leaf for (_, leaf), array in zip(flat, mine, strict=True) if not array)
    constants = tuple(leaf for leaf, array in zip(others, theirs, strict=True) if not array)

    def rebuild(leaves: Sequence[Any], inputs: Sequence[Any]) -> Any:
        own = jax.tree.unflatten(tree, _filled(mine, leaves, fixed))
        args, kwargs = jax.tree.unflatten(rest, _filled(theirs, inputs, constants))
        return (own, *args), kwargs

    return Call(
        tuple(path for path, array in zip(paths, mine, strict=True) if array),
        [leaf for (_, leaf), array in zip(flat, mine, strict=True) if array],
        [leaf for leaf, array in zip(others, theirs, strict=True) if array],
        rebuild,
        (tree, rest, tuple(mine), tuple(theirs), fixed, constants),
    )


def jitted_once(
    programs: dict[Any, Callable[..., Any]], key: Any, run: Callable[..., Any], **options: Any
) -> Any:
    """Returns the jitted function of a key; with an unhashable key, the function itself.

    Args:
      programs: key -> jitted function; a new one is added.
      key: what decides the program, besides shapes.
      run: the function.
      **options: keyword arguments of `jax.jit`.
    """
    try:
        return programs.setdefault(key, jax.jit(run, **options))
    except TypeError:  # constants among the arguments that have no hash
        return run


def _filled(places: Sequence[bool], some: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Returns the items of two sequences in turn, as ``places`` says."""
    one, two = iter(some), iter(others)
    return [next(one) if place else next(two) for place in places]


class Traced(NamedTuple):
    """A function as equations.

    Attributes:
      jaxpr: its jaxpr; the inputs are the leaves, then the other arrays.
      tree: structure of its output.
    """

    jaxpr: ClosedJaxpr
    tree: Any

    def run(self, handler: Handler, values: Sequence[Any]) -> Any:
        """Returns the function's output.

        Args:
          handler: what to do with parameters.
          values: the inputs; parameters as `View`.
        """
        outs = run_jaxpr(handler, self.jaxpr, values)
        return jax.tree.unflatten(self.tree, expose_all(handler, outs, "output of the function"))


def trace(apply: Apply, call: Call) -> Traced:
    """Returns a function as equations; kernels count as arrays of their shape and dtype."""
    structure: list[Any] = []

    def flat(leaves: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        args, kwargs = call.rebuild(leaves, inputs)
        outs, tree = jax.tree.flatten(apply(*args, **kwargs))
        structure[:] = [tree]
        return outs

    leaves = [shape_of(leaf) if isinstance(leaf, Kernel) else leaf for leaf in call.leaves]
    jaxpr = jax.make_jaxpr(flat)(leaves, call.inputs)
    return Traced(jaxpr, structure[0])
