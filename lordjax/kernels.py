"""Compressed weights as values: what may stand where a model expects a kernel.

A *kernel* is the matrix of a linear layer in Flax's layout, ``[in, out]``, so that ``y = x @ W``.
It is either an array or a `Kernel`. Leading axes are allowed everywhere (stacks of kernels).

The contract of a `Kernel`, and all of it:

* ``shape``          ``(..., in, out)``, derived from the leaves, so that it survives ``vmap``;
* ``matmul(x)``      ``x @ W`` without forming ``W`` where that is cheaper; the dtype of ``x``;
* ``materialize()``  ``W`` itself.

A class is abstract or final. Checks live in `check`, not in constructors, because
``jax.tree.map`` builds kernels whose leaves are not arrays.
"""

from __future__ import annotations

import abc
from typing import Any

import flax.struct
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


@flax.struct.dataclass
class LowRank(Kernel):
    """``W = left @ right``: two thin matrices, either of which may itself be a `Kernel`.

    Attributes:
      left: ``[..., in, rank]``.
      right: ``[..., rank, out]``.
    """

    left: Any
    right: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., in, out)``."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.left.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the factors."""
        return self.left.dtype

    def matmul(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """``(x @ left) @ right``."""
        return matmul(matmul(x, self.left), self.right)

    def materialize(self) -> Float[Array, "... in out"]:
        """``left @ right``, multiplied at full precision."""
        return jnp.matmul(materialize(self.left), materialize(self.right), precision="highest")


# Kernel kinds by the name they have on disk.
KINDS: dict[str, type[Kernel]] = {"low_rank": LowRank}


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


def kind_of(leaf: Any) -> str:
    """The on-disk name of a leaf's kind: ``"dense"`` for an array, else a key of `KINDS`.

    Raises:
      TypeError: if the leaf is a `Kernel` of a kind that `KINDS` lacks.
    """
    for name, kind in KINDS.items():
        if type(leaf) is kind:
            return name
    if isinstance(leaf, Kernel):
        raise TypeError(f"{type(leaf).__name__} is not in KINDS, so that it has no name on disk")
    return "dense"


def check(kernel: Kernel, path: str) -> None:
    """Verifies that the parts of a kernel, however deep, fit each other.

    Raises:
      ValueError: if they do not; names ``path``.
    """
    if not isinstance(kernel, LowRank):
        return
    left, right = kernel.left, kernel.right
    for name, factor in (("left", left), ("right", right)):
        if isinstance(factor, Kernel):
            check(factor, f"{path}/{name}")
        elif len(factor.shape) < 2:
            raise ValueError(f"{path}/{name}: expected a matrix, got shape {factor.shape}")
    if left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
        raise ValueError(
            f"{path}: left {left.shape} and right {right.shape} do not fit; expected "
            "[..., in, rank] and [..., rank, out] with the same rank and leading axes"
        )
    if left.dtype != right.dtype:
        raise ValueError(
            f"{path}: left is {left.dtype}, right is {right.dtype}; expected one dtype"
        )
