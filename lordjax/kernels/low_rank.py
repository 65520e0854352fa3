"""A low-rank kernel: the product of two thin matrices."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.kernels.base import Kernel, materialize, matmul


@flax.struct.dataclass
class LowRank(Kernel):
    """A low-rank matrix ``W = left @ right``.

    Attributes:
      left: left factor ``[..., in, rank]``, an array or a `Kernel`.
      right: right factor ``[..., rank, out]``, an array or a `Kernel`.
    """

    left: Any
    right: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape ``(..., in, out)``."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def rank(self) -> int:
        """The rank: the inner dimension of the product."""
        return self.left.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the factors."""
        return self.left.dtype

    def matmul(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Returns ``(x @ left) @ right``."""
        return matmul(matmul(x, self.left), self.right)

    def materialize(self) -> Float[Array, "... in out"]:
        """Returns ``left @ right``, multiplied at full precision."""
        return jnp.matmul(materialize(self.left), materialize(self.right), precision="highest")


def break_even(fan_in: int, fan_out: int) -> float:
    """Returns the rank at which two factors have as many weights as the dense matrix."""
    return fan_in * fan_out / (fan_in + fan_out)
