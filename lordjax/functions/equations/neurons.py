"""Activations whose last product can be narrowed: how the neurons of an MLP flow through equations.

`Neurons` is an array with one dimension that belongs to the outputs of some products. Elementwise
equations keep it, and so does every reshape and transpose that leaves this dimension whole. Each
other use shows the neurons to something else, so that none can be taken away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
from jax import lax
from jax.extend.core import Literal

ELEMENTWISE = frozenset(
    {
        "abs",
        "add",
        "add_any",
        "and",
        "atan2",
        "cbrt",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "copy_p",
        "cos",
        "cosh",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "name",
        "ne",
        "neg",
        "not",
        "or",
        "pcast",
        "pow",
        "pvary",
        "reduce_precision",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
    }
)


KEEPING = ("convert_element_type", "copy", "name")  # that change no number


@flax.struct.dataclass
class Neurons:
    """An array with a dimension of neurons.

    Attributes:
      value: the array; its neurons may be fewer than the program has.
      dim: the dimension.
      paths: paths of the parameters whose outputs they are: matrices and biases.
      fresh: path of the matrix if nothing but the product has happened yet, of the bias if nothing
        but its broadcast; else None.
    """

    value: Any
    dim: int = flax.struct.field(pytree_node=False)
    paths: frozenset[str] = flax.struct.field(pytree_node=False)
    fresh: str | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        """The array's number of dimensions."""
        return self.value.ndim

    @property
    def count(self) -> int:
        """Number of neurons."""
        return self.value.shape[self.dim]


Definitions = Mapping[Any, Any]  # variable -> the equation that defines it


def follow(eqn: Any, values: Sequence[Any], definitions: Definitions) -> Neurons | None:
    """Returns the result of an equation that keeps the neurons apart; None if it does not.

    Args:
      eqn: the equation; some of its inputs are `Neurons`.
      values: its inputs.
      definitions: equations of the same program.
    """
    name = eqn.primitive.name
    if name in ELEMENTWISE:
        return _elementwise(eqn, values, definitions)
    if name not in MOVES or not isinstance(values[0], Neurons):
        return None
    neurons = values[0]
    found = MOVES[name](neurons, eqn.params, eqn.invars[0].aval.shape)
    if found is None:
        return None
    dim, params = found
    value = eqn.primitive.bind(neurons.value, *values[1:], **{**eqn.params, **params})
    return neurons.replace(value=value, dim=dim)


def _elementwise(eqn: Any, values: Sequence[Any], definitions: Definitions) -> Neurons | None:
    known = [value for value in values if isinstance(value, Neurons)]
    dim, count = known[0].dim, known[0].count
    if any(each.dim != dim or each.count != count for each in known):
        return None
    operands = []
    for var, value in zip(eqn.invars, values, strict=True):
        if isinstance(value, Neurons):
            operands.append(value.value)
        elif not getattr(value, "shape", ()) or value.shape[dim] == 1:
            operands.append(value)
        elif _is_constant(var, dim, definitions):
            operands.append(lax.slice_in_dim(value, 0, count, axis=dim))
        else:
            return None
    result = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    paths = frozenset(path for each in known for path in each.paths)
    kept = eqn.primitive.name in KEEPING
    return Neurons(result, dim, paths, known[0].fresh if kept else None)


def _is_constant(var: Any, dim: int, definitions: Definitions) -> bool:
    """Returns whether an array is the same for all neurons: broadcast along their dimension."""
    eqn = None if isinstance(var, Literal) else definitions.get(var)
    if eqn is None or eqn.primitive.name != "broadcast_in_dim":
        return False
    places = list(eqn.params["broadcast_dimensions"])
    return dim not in places or eqn.invars[0].aval.shape[places.index(dim)] == 1


def _transpose(neurons: Neurons, params: Mapping[str, Any], shape: Any) -> Any:
    del shape
    return params["permutation"].index(neurons.dim), {}


def _reshape(neurons: Neurons, params: Mapping[str, Any], shape: Sequence[int]) -> Any:
    before, sizes = math.prod(shape[: neurons.dim]), params["new_sizes"]
    for dim, size in enumerate(sizes):
        if math.prod(sizes[:dim]) == before and size == shape[neurons.dim]:
            return dim, {"new_sizes": (*sizes[:dim], neurons.count, *sizes[dim + 1 :])}
    return None


def _squeeze(neurons: Neurons, params: Mapping[str, Any], shape: Any) -> Any:
    del shape
    gone = [i for i in params["dimensions"] if i < neurons.dim]
    return None if neurons.dim in params["dimensions"] else (neurons.dim - len(gone), {})


def _broadcast(neurons: Neurons, params: Mapping[str, Any], shape: Sequence[int]) -> Any:
    dim, sizes = params["broadcast_dimensions"][neurons.dim], params["shape"]
    if sizes[dim] != shape[neurons.dim]:
        return None
    return dim, {"shape": (*sizes[:dim], neurons.count, *sizes[dim + 1 :])}


def _same(neurons: Neurons, params: Any, shape: Any) -> Any:
    del params, shape
    return neurons.dim, {}


# Primitive -> function (neurons, parameters, shape in the program) -> dimension, new parameters.
MOVES: dict[str, Any] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "sharding_constraint": _same,
}
