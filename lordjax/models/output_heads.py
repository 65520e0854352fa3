"""Output heads: layers between the final norm and the last layer, and new classification heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.models.config import ModelConfig
from lordjax.models.layers import ACTIVATIONS, NORMS, Linear


class MaskedTransform(nn.Module):
    """``norm(act(dense(x)))``, before the prediction of masked tokens."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b s m"]) -> Float[Array, "b s m"]:
        """Transforms every position."""
        c = self.config
        x = ACTIVATIONS[c.head_activation](Linear(c.hidden_size, True, name="dense")(x))
        return NORMS[c.norm](c.norm_eps, name="norm")(x)


class Pooler(nn.Module):
    """``act(dense(x))`` of the first token, before the classification of a sequence."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b s m"]) -> Float[Array, "b m"]:
        """Returns one vector per sequence."""
        act = ACTIVATIONS[self.config.pooler_activation]
        return act(Linear(self.config.hidden_size, True, name="dense")(x[:, 0]))


# Head -> the module before its last layer.
TRANSFORMS: dict[str, Any] = {"masked": MaskedTransform, "classes": Pooler}

_DEVIATION = 0.02  # standard deviation of a new kernel, as in BERT's initialization


def with_classes(
    config: ModelConfig, params: Any, num_classes: int, key: Array
) -> tuple[ModelConfig, dict[str, Any]]:
    """Gives an encoder a new head that classifies sequences, for fine-tuning.

    Kernels of the head are normal with standard deviation 0.02, biases are 0, both in the dtype of
    the embedding. A model that already classifies keeps its pooler. Arrays outside the head are
    not copied.

    Args:
      config: the model, with any head.
      params: parameters of the model, compressed or not.
      num_classes: number of classes, at least 2.
      key: random key for the new kernels.

    Returns:
      Config and parameters of the new model.

    Raises:
      ValueError: if the model is not an encoder, or there are fewer than two classes.
    """
    if config.causal:
        raise ValueError("a causal model gets no head for classes; only encoders are supported")
    if num_classes < 2:
        raise ValueError(f"{num_classes} classes; expected 2 or more")
    new = dataclasses.replace(
        config, head="classes", num_classes=num_classes, tie_embeddings=False, head_bias=True
    )
    dtype = jax.tree.leaves(params["embed"])[0].dtype
    size = config.hidden_size

    def linear(outputs: int, key: Array) -> dict[str, Array]:
        kernel = _DEVIATION * jax.random.normal(key, (size, outputs))
        return {"kernel": kernel.astype(dtype), "bias": jnp.zeros(outputs, dtype)}

    first, second = jax.random.split(key)
    pooler = {"dense": linear(size, first)}
    if config.head == "classes":
        pooler = params["transform"]
    return new, {**params, "transform": pooler, "head": linear(num_classes, second)}
