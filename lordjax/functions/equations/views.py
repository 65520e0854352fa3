"""Views: values of a program that are one parameter, seen with its axes in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from lordjax.kernels.base import Kernel, materialize
from lordjax.kernels.layout import Axes, canonical, dimensions, length, rearranged, reshaped


class Matrix(NamedTuple):
    """The axes of a parameter as a stack of matrices ``[stack, in, out]``.

    Attributes:
      stack: one axis per dimension of the stack, largest stride first.
      rows: axes of the inputs, largest stride first.
      cols: axes of the outputs, largest stride first.
    """

    stack: Axes
    rows: Axes
    cols: Axes

    @property
    def dims(self) -> tuple[Axes, ...]:
        """The axes of each dimension of the matrices."""
        return (*((axis,) for axis in self.stack), self.rows, self.cols)

    @property
    def transposed(self) -> Matrix:
        """The same matrices with inputs and outputs exchanged."""
        return Matrix(self.stack, self.cols, self.rows)


@flax.struct.dataclass
class View:
    """A parameter inside a program, after transposes, reshapes and conversions.

    Attributes:
      value: an array in the shape of the view, or a `Kernel` of shape ``[*stack, in, out]``.
      extra: arrays that the interpreter needs at products, with leading axes ``stack``; or None.
      path: path of the parameter.
      dims: axes of each dimension.
      dtype: dtype of the view.
      matrix: the matrices of ``value`` if it is a kernel, and those that ``extra`` belongs to.
      sliced: axes of the parameter that enclosing loops or indices have sliced away.
      picks: indices that have sliced axes away: place in the stack, size, index.
    """

    value: Any
    extra: Any
    path: str = flax.struct.field(pytree_node=False)
    dims: tuple[Axes, ...] = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)
    matrix: Matrix | None = flax.struct.field(pytree_node=False, default=None)
    sliced: Axes = flax.struct.field(pytree_node=False, default=())
    picks: tuple[tuple[int, int, int], ...] = flax.struct.field(pytree_node=False, default=())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the view."""
        return tuple(map(length, self.dims))

    def array(self) -> Any:
        """Returns the view as an array; a kernel is multiplied out."""
        if not isinstance(self.value, Kernel):
            return self.value
        assert self.matrix is not None  # set for every kernel
        found = rearranged(materialize(self.value), self.matrix.dims, self.dims)
        return found.astype(self.dtype)

    def sliceable(self) -> bool:
        """Whether a loop can slice the first dimension without multiplying a kernel out."""
        if self.picks:
            return False
        if self.matrix is None or (self.extra is None and not isinstance(self.value, Kernel)):
            return True
        return not self.dims[0] or (len(self.dims[0]) == 1 and self.dims[0][0] in self.matrix.stack)

    @property
    def place(self) -> int | None:
        """Where the first dimension is in the stack of the matrices; None if it is not there."""
        stack = () if self.matrix is None else self.matrix.stack
        axis = self.dims[0][0] if self.dims[0] else (1, 0)  # a stack of one may have no axis
        return stack.index(axis) if axis in stack else None

    def for_scan(self) -> tuple[Any, Callable[[Any], View]]:
        """Returns the arrays to scan over, and a function from a slice of them to its view."""
        first, matrix, place = self.dims[0], self.matrix, self.place
        value, extra = self.value, self.extra
        stack = () if matrix is None else matrix.stack
        if isinstance(value, Kernel):
            value = _axis_first(value, place)
        extra = _axis_first(extra, place)
        if matrix is not None:
            left = tuple(axis for i, axis in enumerate(stack) if i != place)
            matrix = matrix._replace(stack=left)

        def sliced(parts: Any) -> View:
            own = (*self.sliced, *first)
            rest = {"dims": self.dims[1:], "matrix": matrix, "sliced": own}
            return self.replace(value=parts[0], extra=parts[1], **rest)

        return (value, extra), sliced


def picked(view: View, params: dict[str, Any]) -> View | None:
    """Returns what is left of a view at one index of a stack.

    The view's value is that of the whole if it is an array. None if a slice is anything else.

    Args:
      view: the view.
      params: parameters of a ``slice``.
    """
    starts, limits = params["start_indices"], params["limit_indices"]
    cut = [i for i, n in enumerate(view.shape) if limits[i] - starts[i] != n]
    if params["strides"] is not None or len(cut) != 1:
        return None
    (dim,) = cut
    if limits[dim] - starts[dim] != 1 or len(view.dims[dim]) != 1:
        return None
    axis, index, matrix = view.dims[dim][0], starts[dim], view.matrix
    stack = () if matrix is None else matrix.stack
    held = isinstance(view.value, Kernel) or view.extra is not None
    if held and axis not in stack:
        return None
    place = stack.index(axis) if axis in stack else 0

    def at(a: Any) -> Any:
        return lax.index_in_dim(a, index, place, keepdims=False)

    value = jax.tree.map(at, view.value) if isinstance(view.value, Kernel) else view.value
    dims = (*view.dims[:dim], (), *view.dims[dim + 1 :])
    left = tuple(other for other in stack if other != axis)
    return view.replace(
        value=value,
        extra=jax.tree.map(at, view.extra),
        dims=dims,
        matrix=None if matrix is None else matrix._replace(stack=left),
        sliced=(*view.sliced, axis),
        picks=(*view.picks, (place, axis[0], index)),
    )


def unpicked(view: View, tree: Any) -> Any:
    """Returns arrays of a view's part of the stack as those of the whole, with zeros elsewhere."""
    for place, size, index in reversed(view.picks):

        def whole(a: Any, place: int = place, size: int = size, index: int = index) -> Any:
            zeros = jnp.zeros((*a.shape[:place], size, *a.shape[place:]), a.dtype)
            return zeros.at[(slice(None),) * place + (index,)].set(a)

        tree = jax.tree.map(whole, tree)
    return tree


def _axis_first(tree: Any, place: int | None) -> Any:
    """Moves an axis of all arrays to the front; None adds an axis of length 1 there."""

    def move(a: Any) -> Any:
        return jnp.expand_dims(a, 0) if place is None else jnp.moveaxis(a, place, 0)

    return jax.tree.map(move, tree)


def _transpose(view: View, params: dict[str, Any]) -> tuple[Axes, ...]:
    return tuple(view.dims[i] for i in params["permutation"])


def _reshape(view: View, params: dict[str, Any]) -> tuple[Axes, ...] | None:
    if params["dimensions"] is not None:
        return None
    return reshaped(view.dims, params["new_sizes"])


def _squeeze(view: View, params: dict[str, Any]) -> tuple[Axes, ...]:
    return tuple(axes for i, axes in enumerate(view.dims) if i not in params["dimensions"])


def _broadcast(view: View, params: dict[str, Any]) -> tuple[Axes, ...] | None:
    """Axes of length 1 may be added; a real broadcast is no view."""
    dims: list[Axes] = [()] * len(params["shape"])
    for i, place in enumerate(params["broadcast_dimensions"]):
        dims[place] = view.dims[i]
    return tuple(dims) if tuple(map(length, dims)) == tuple(params["shape"]) else None


def _same(view: View, params: dict[str, Any]) -> tuple[Axes, ...]:
    del params
    return view.dims


def _convert(view: View, params: dict[str, Any]) -> tuple[Axes, ...] | None:
    return view.dims if jnp.issubdtype(params["new_dtype"], jnp.floating) else None


# Primitive -> function (view, its parameters) -> axes of the result, None if it is no view.
RULES: dict[str, Callable[[View, dict[str, Any]], tuple[Axes, ...] | None]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "sharding_constraint": _same,
    "reshard": _same,
    "pvary": _same,
    "pcast": _same,
}
EACH_ARRAY = ("pvary", "pcast")  # these change the type of every array that is inside a kernel


def view_of(
    path: str, value: Any, shape: tuple[int, ...], dtype: Any, matrix: Matrix | None = None
) -> View:
    """Returns the view of a whole parameter.

    Args:
      path: its path.
      value: an array of this shape, or a kernel of shape ``[*stack, in, out]``.
      shape: its shape.
      dtype: its dtype.
      matrix: see `View`.
    """
    return View(value, None, path, dimensions(shape), jnp.dtype(dtype), matrix)


class Product(NamedTuple):
    """A product of a view with another value: the axes of a ``dot_general`` by their roles.

    Attributes:
      matrix: the view's axes as matrices, with those that loops have sliced away in the stack.
      inner: the same without them, as one step of the loops sees it.
      batch: pairs (dimension of the view, of the other value) that stack matrices.
      contracted: pairs (dimension of the view, of the other value) that are summed over.
      free: dimensions of the view that are outputs.
      tokens: dimensions of the other value that are neither.
      first: whether the view is the first operand.
    """

    matrix: Matrix
    inner: Matrix
    batch: tuple[tuple[int, int], ...]
    contracted: tuple[tuple[int, int], ...]
    free: tuple[int, ...]
    tokens: tuple[int, ...]
    first: bool


def product_of(view: View, rank: int, params: dict[str, Any], *, first: bool) -> Product:
    """Returns what a ``dot_general`` does with a view.

    Args:
      view: one operand.
      rank: number of dimensions of the other operand.
      params: parameters of the equation.
      first: whether the view is the first operand.
    """
    (contract, batch) = params["dimension_numbers"]
    mine, theirs = (0, 1) if first else (1, 0)
    pairs = tuple(zip(contract[mine], contract[theirs], strict=True))
    stacked = tuple(zip(batch[mine], batch[theirs], strict=True))
    used = {i for i, _ in (*pairs, *stacked)}
    free = tuple(i for i in range(len(view.dims)) if i not in used)
    taken = {j for _, j in (*pairs, *stacked)}
    tokens = tuple(j for j in range(rank) if j not in taken)
    rows = canonical(view.dims[i] for i, _ in pairs)
    cols = canonical(view.dims[i] for i in free)
    own = [axis for i, _ in stacked for axis in view.dims[i]]
    inner, whole = (
        tuple(sorted(axes, key=lambda axis: -axis[1])) for axes in (own, [*own, *view.sliced])
    )
    return Product(
        Matrix(whole, rows, cols),
        Matrix(inner, rows, cols),
        stacked,
        pairs,
        free,
        tokens,
        first,
    )


def inputs_of(x: Any, view: View, product: Product) -> Any:
    """Returns the other operand as ``[*stack, *tokens, in]``, in the order of the matrices."""
    stacked = [j for _, j in product.batch]
    x = jnp.transpose(x, (*stacked, *product.tokens, *(j for _, j in product.contracted)))
    contracted = [view.dims[i] for i, _ in product.contracted]
    x = rearranged(x, contracted, (product.inner.rows,), len(stacked) + len(product.tokens))
    return rearranged(x, _batch(view, product), _stack(product))


def outputs_of(y: Any, view: View, product: Product) -> Any:
    """Returns the result of the product as ``[*stack, *tokens, out]``."""
    batch, free, tokens = len(product.batch), len(product.free), len(product.tokens)
    if product.first:
        free_last = range(batch + tokens, batch + tokens + free)
        y = jnp.moveaxis(y, range(batch, batch + free), free_last)
    columns = [view.dims[i] for i in product.free]
    y = rearranged(y, columns, (product.inner.cols,), batch + tokens)
    return rearranged(y, _batch(view, product), _stack(product))


def result_of(y: Any, view: View, product: Product) -> Any:
    """Returns the program's result from ``[*stack, *tokens, out]``; undoes `outputs_of`."""
    batch, free, tokens = len(product.batch), len(product.free), len(product.tokens)
    y = rearranged(y, _stack(product), _batch(view, product))
    columns = [view.dims[i] for i in product.free]
    y = rearranged(y, (product.inner.cols,), columns, batch + tokens)
    if not product.first:
        return y
    return jnp.moveaxis(y, range(batch + tokens, batch + tokens + free), range(batch, batch + free))


def _batch(view: View, product: Product) -> list[Axes]:
    return [view.dims[i] for i, _ in product.batch]


def _stack(product: Product) -> list[Axes]:
    return [(axis,) for axis in product.inner.stack]
