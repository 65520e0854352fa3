"""A kernel as a product of two thin matrices."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.kernels.base import Kernel, materialize, matmul


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


def break_even(fan_in: int, fan_out: int) -> float:
    """The rank at which a factor pair holds as many weights as the matrix ``[fan_in, fan_out]``."""
    return fan_in * fan_out / (fan_in + fan_out)
