"""The interface of compressed weights, and functions that work on all kinds."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Kernel(abc.ABC):
    """A matrix ``[..., in, out]`` that is not stored as one array."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``(..., in, out)``."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """The dtype of `materialize`."""

    @abc.abstractmethod
    def matmul(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """``x @ W``."""

    @abc.abstractmethod
    def materialize(self) -> Float[Array, "... in out"]:
        """``W``."""


def kernel_fields(kind: Any) -> tuple[list[str], list[str]]:
    """Names of the fields of a kernel or a kind that are arrays or kernels, and of the others."""
    fields = dataclasses.fields(kind)
    inner = [f.name for f in fields if f.metadata.get("pytree_node", True)]
    return inner, [f.name for f in fields if f.name not in inner]


def is_kernel(leaf: Any) -> bool:
    """True for a `Kernel`; the ``is_leaf`` of every tree walk over parameters."""
    return isinstance(leaf, Kernel)


def matmul(x: Float[Array, "... in"], kernel: Any) -> Float[Array, "... out"]:
    """``x @ kernel`` for an array or a `Kernel`, computed and returned in the dtype of ``x``."""
    if isinstance(kernel, Kernel):
        return kernel.matmul(x)
    return jnp.matmul(x, kernel.astype(x.dtype))


def materialize(tree: Any) -> Any:
    """Replaces every `Kernel` of a tree (or a single one) by its matrix; arrays pass through."""
    return jax.tree.map(
        lambda leaf: leaf.materialize() if isinstance(leaf, Kernel) else leaf,
        tree,
        is_leaf=is_kernel,
    )


def nbytes(tree: Any) -> int:
    """Bytes of all leaves of a kernel, a model, or a tree of ``ShapeDtypeStruct``.

    The one byte count of the project: plan, report and file on disk use it.
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
