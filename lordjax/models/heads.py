"""What comes before the last layer of a head, where that is not the final norm alone."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.models.config import ModelConfig
from lordjax.models.layers import ACTIVATIONS, NORMS, Linear


class MaskedTransform(nn.Module):
    """``norm(act(dense(x)))`` before the prediction of masked tokens."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b s m"]) -> Float[Array, "b s m"]:
        """Applies it to every position."""
        c = self.config
        x = ACTIVATIONS[c.head_activation](Linear(c.hidden_size, True, name="dense")(x))
        return NORMS[c.norm](c.norm_eps, name="norm")(x)


class Pooler(nn.Module):
    """``tanh(dense(x))`` of the first token, which is classified."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b s m"]) -> Float[Array, "b m"]:
        """One row for a sequence."""
        return jnp.tanh(Linear(self.config.hidden_size, True, name="dense")(x[:, 0]))


# Head -> what comes before its last layer.
TRANSFORMS: dict[str, Any] = {"masked": MaskedTransform, "classes": Pooler}
