"""A matrix of a pruned MLP: fewer neurons, in a program that was written for all of them."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.kernels.base import Kernel, materialize


@flax.struct.dataclass
class Pruned(Kernel):
    """A matrix without some of its outputs or inputs, which count as 0.

    The neurons that stay come first; the order of neurons is free.

    Attributes:
      kernel: the matrix of the neurons that stay, ``[..., in, out]``.
      rows: whether the neurons are inputs; otherwise they are outputs.
      size: number of neurons of the whole matrix.
    """

    kernel: Any
    rows: bool = flax.struct.field(pytree_node=False)
    size: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape ``(..., in, out)`` of the whole matrix."""
        *lead, fan_in, fan_out = self.kernel.shape
        return (*lead, self.size, fan_out) if self.rows else (*lead, fan_in, self.size)

    @property
    def width(self) -> int:
        """The number of neurons that stay."""
        return self.kernel.shape[-2 if self.rows else -1]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the matrix."""
        return self.kernel.dtype

    def matmul(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Returns ``x @ W``; outputs that were pruned are 0."""
        kernel = materialize(self.kernel).astype(x.dtype)
        if self.rows:
            return jnp.matmul(x[..., : self.width], kernel)
        return self._padded(jnp.matmul(x, kernel), -1)

    def materialize(self) -> Float[Array, "... in out"]:
        """Returns the whole matrix, with zeros for what was pruned."""
        return self._padded(materialize(self.kernel), -2 if self.rows else -1)

    def _padded(self, a: Any, axis: int) -> Any:
        pad = [(0, 0)] * a.ndim
        pad[axis] = (0, self.size - self.width)
        return jnp.pad(a, pad)
