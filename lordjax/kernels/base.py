"""The interface of compressed weights, and functions that work on all kinds of them.

A *kernel* is the matrix of a linear layer in Flax's layout, ``[in, out]``, so that ``y = x @ W``.
It is an array or a `Kernel`. Leading axes are allowed everywhere (stacks of kernels).

A `Kernel` has a shape, a dtype and two operations:

* ``shape``          ``(..., in, out)``, derived from the leaves, so that it survives ``vmap``;
* ``dtype``          the dtype of ``materialize()``;
* ``matmul(x)``      ``x @ W`` in the dtype of ``x``, without forming ``W`` where that is cheaper;
* ``materialize()``  ``W`` itself.

A class is abstract or final. Constructors check nothing, because ``jax.tree.map`` builds kernels
whose leaves are not arrays; `lordjax.kernels.kinds.check` does.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.runtime import target


class Kernel(abc.ABC):
    """A matrix ``[..., in, out]`` that is not stored as one array. See this module's docstring."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape ``(..., in, out)``."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """The dtype of the matrix that `materialize` returns."""

    @abc.abstractmethod
    def matmul(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Returns ``x @ W`` in the dtype of ``x``."""

    @abc.abstractmethod
    def materialize(self) -> Float[Array, "... in out"]:
        """Returns the matrix ``W``."""


def kernel_fields(kind: Any) -> tuple[list[str], list[str]]:
    """Returns the names of a kernel's array or kernel fields, and those of its other fields.

    Args:
      kind: a kernel or its class.
    """
    fields = dataclasses.fields(kind)
    inner = [f.name for f in fields if f.metadata.get("pytree_node", True)]
    return inner, [f.name for f in fields if f.name not in inner]


def is_kernel(leaf: Any) -> bool:
    """Returns True for a `Kernel`; pass it as ``is_leaf`` to functions on parameter trees."""
    return isinstance(leaf, Kernel)


def matmul(x: Float[Array, "... in"], kernel: Any) -> Float[Array, "... out"]:
    """Returns ``x @ kernel``, computed in the dtype of ``x``.

    Args:
      x: inputs ``[..., in]``.
      kernel: an array ``[in, out]`` or a `Kernel`.

    Returns:
      Outputs ``[..., out]`` in the dtype of ``x``.
    """
    if isinstance(kernel, Kernel):
        return kernel.matmul(x)
    kernel = kernel.astype(x.dtype)
    if x.size != x.shape[-1] or kernel.ndim != 2:
        return jnp.matmul(x, kernel)
    y = jnp.matmul(with_second_row(x.reshape(1, -1)), kernel)[:1]
    return y.reshape(*x.shape[:-1], y.shape[-1])


def with_second_row(x: Float[Array, "... r n"]) -> Float[Array, "... s n"]:
    """Returns factors of matrix products; on a GPU a single row gets a row of zeros below it.

    XLA replaces a product with one row by a multiplication and a sum. On a GPU it may write the
    multiplied matrix in between, which moves three times the bytes.
    """
    if x.shape[-2] != 1 or target.platform() != "gpu":
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)])


def materialize(tree: Any) -> Any:
    """Replaces every `Kernel` of a tree, or a single one, by its matrix.

    Args:
      tree: a pytree of arrays and kernels. Arrays are returned unchanged.

    Returns:
      A tree of the same structure with an array ``[..., in, out]`` for every kernel.
    """
    return jax.tree.map(
        lambda leaf: leaf.materialize() if isinstance(leaf, Kernel) else leaf,
        tree,
        is_leaf=is_kernel,
    )


def nbytes(tree: Any) -> int:
    """Returns the number of bytes of all arrays of a tree.

    Plans, reports and files on disk all use this count.

    Args:
      tree: a kernel, a model, or a pytree of arrays or ``ShapeDtypeStruct``.
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
