"""Parameters whose axes are not those of a matrix ``[..., in, out]``, as kernels.

A program may see a parameter as a matrix in other ways than by its last two axes. ``[out, in]`` is
transposed first; ``[m, heads, d]`` has two axes of outputs. A `Layout` says which axes of the
parameter are the stack, the inputs and the outputs of the matrix. A `Rearranged` kernel stands for
such a parameter.

Axes are described as in NumPy: by a size and a stride, which is counted in elements of the
parameter in row-major order. So axes can be split, merged and permuted without names. An array has
one tuple of axes (`Axes`) per dimension; a dimension of length 1 has none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.kernels.base import Kernel, materialize, matmul

Axis = tuple[int, int]  # size and stride
Axes = tuple[Axis, ...]


def dimensions(shape: Sequence[int], stride: int = 1) -> tuple[Axes, ...]:
    """Returns the axes of each dimension of a row-major array.

    Args:
      shape: the array's shape.
      stride: stride of the last dimension.
    """
    found: list[Axes] = []
    for size in reversed(shape):
        found.append(((size, stride),) if size != 1 else ())
        stride *= size
    return tuple(reversed(found))


def length(axes: Iterable[Axis]) -> int:
    """Returns the length of a dimension: the product of its axes' sizes."""
    return math.prod(size for size, _ in axes)


def merged(axes: Iterable[Axis]) -> Axes:
    """Returns the same order of elements with as few axes as possible."""
    found: list[Axis] = []
    for size, stride in axes:
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        elif size != 1:
            found.append((size, stride))
    return tuple(found)


def canonical(dims: Iterable[Axes]) -> Axes:
    """Returns all axes of some dimensions as one, in the order in which the parameter has them."""
    return merged(sorted((axis for axes in dims for axis in axes), key=lambda axis: -axis[1]))


def reshaped(dims: Iterable[Axes], shape: Sequence[int]) -> tuple[Axes, ...] | None:
    """Returns the axes of each dimension after a reshape; None if an axis would be cut unevenly."""
    left = [axis for axes in dims for axis in axes][::-1]
    found = []
    for wanted in shape:
        axes: list[Axis] = []
        while wanted > 1:
            size, stride = left.pop()
            if wanted % size == 0:
                axes.append((size, stride))
                wanted //= size
            elif size % wanted == 0:
                axes.append((wanted, stride * (size // wanted)))
                left.append((size // wanted, stride))
                wanted = 1
            else:
                return None
        found.append(merged(axes))
    return tuple(found)


def rearranged(array: Any, old: Sequence[Axes], new: Sequence[Axes], start: int = 0) -> Any:
    """Returns an array with axes of consecutive dimensions in another order and grouping.

    Args:
      array: the array.
      old: axes of the dimensions from ``start`` on.
      new: axes of the dimensions that replace them; the same elements.
      start: first of these dimensions; those before and after them stay.
    """
    prefix, suffix = array.shape[:start], array.shape[start + len(old) :]
    shape = (*prefix, *map(length, new), *suffix)
    if tuple(map(merged, old)) == tuple(map(merged, new)):
        return array.reshape(shape)
    before = [axis for axes in old for axis in axes]
    after = [axis for axes in new for axis in axes]
    # The parameter's own order is that of both, whatever pieces its axes are cut into.
    array = array.reshape((*prefix, *(size for size, _ in before), *suffix))
    down = sorted(range(len(before)), key=lambda i: -before[i][1])
    array = array.transpose(_inside(down, start, array.ndim))
    down = sorted(range(len(after)), key=lambda i: -after[i][1])
    array = array.reshape((*prefix, *(after[i][0] for i in down), *suffix))
    back = sorted(range(len(down)), key=lambda i: down[i])
    return array.transpose(_inside(back, start, array.ndim)).reshape(shape)


def _inside(order: Sequence[int], start: int, rank: int) -> list[int]:
    """Returns a permutation of all dimensions that permutes some from ``start`` on."""
    moved = [start + i for i in order]
    return [*range(start), *moved, *range(start + len(order), rank)]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a parameter are the inputs and the outputs of a matrix.

    Attributes:
      shape: the parameter's shape, without leading axes that stack matrices.
      stack: axes that stack matrices and are not leading; one dimension of the matrices each.
      rows: axes of the inputs.
      cols: axes of the outputs.
    """

    shape: tuple[int, ...]
    stack: Axes
    rows: Axes
    cols: Axes

    @classmethod
    def of(cls, shape: tuple[int, ...], stack: Axes, rows: Axes, cols: Axes) -> Layout:
        """Returns the layout of a parameter; stack axes that lead are left out.

        Args:
          shape: the parameter's whole shape.
          stack: axes that stack matrices, largest stride first.
          rows: axes of the inputs, largest stride first.
          cols: axes of the outputs, largest stride first.
        """
        dims = dimensions(shape)
        while stack and dims and dims[0] == stack[:1]:
            dims, stack, shape = dims[1:], stack[1:], shape[1:]
        return cls(tuple(shape), stack, rows, cols)

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Layout:
        """Returns the layout whose fields were written as JSON."""
        axes = (tuple((int(n), int(s)) for n, s in fields[k]) for k in ("stack", "rows", "cols"))
        return cls(tuple(map(int, fields["shape"])), *axes)

    @property
    def plain(self) -> bool:
        """Whether the parameter is ``[..., in, out]`` as it is."""
        sides = length(self.rows), length(self.cols)
        return not self.stack and self.shape == sides and self.rows == dimensions(sides)[0]

    def to_matrix(self, leaf: Any) -> Any:
        """Returns the matrices ``[..., in, out]`` of a parameter."""
        lead = leaf.shape[: leaf.ndim - len(self.shape)]
        return rearranged(leaf, self._leaf(lead), self._matrix(lead))

    def to_leaf(self, matrix: Any) -> Any:
        """Returns the parameter of matrices ``[..., in, out]``."""
        lead = matrix.shape[: matrix.ndim - 2 - len(self.stack)]
        return rearranged(matrix, self._matrix(lead), self._leaf(lead))

    def lead(self, lead: Sequence[int]) -> Axes:
        """Returns the axes of leading dimensions that stack matrices."""
        strides = dimensions((*lead, math.prod(self.shape)))[:-1]
        return tuple(axes[0] if axes else (1, 0) for axes in strides)

    def _leaf(self, lead: Sequence[int]) -> tuple[Axes, ...]:
        return dimensions((*lead, *self.shape))

    def _matrix(self, lead: Sequence[int]) -> tuple[Axes, ...]:
        own = tuple((axis,) for axis in self.stack)
        return (*self._leaf(lead)[: len(lead)], *own, self.rows, self.cols)


@flax.struct.dataclass
class Rearranged(Kernel):
    """A kernel in the shape and dtype of the parameter that it stands for.

    Attributes:
      kernel: the matrices ``[..., in, out]``: an array or a `Kernel`.
      layout: where the matrix's axes are in the parameter.
      leaf_dtype: name of the parameter's dtype; None: that of the kernel.
    """

    kernel: Any
    layout: Layout = flax.struct.field(pytree_node=False)
    leaf_dtype: str | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        lead = self.kernel.shape[: len(self.kernel.shape) - 2 - len(self.layout.stack)]
        return (*lead, *self.layout.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The parameter's dtype."""
        return jnp.dtype(self.leaf_dtype or self.kernel.dtype)

    def matmul(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Returns ``x @ parameter``, multiplied out unless the parameter is the matrix itself."""
        if self.layout.plain:
            return matmul(x, self.kernel)
        *lead, fan_in, _ = self.kernel.shape
        ones = jnp.broadcast_to(jnp.eye(fan_in, dtype=x.dtype), (*lead, fan_in, fan_in))
        with jax.default_matmul_precision("highest"):
            matrix = matmul(ones, self.kernel)
        return jnp.matmul(x, self.layout.to_leaf(matrix))

    def materialize(self) -> Any:
        """Returns the parameter in its own shape."""
        return self.layout.to_leaf(materialize(self.kernel)).astype(self.dtype)
