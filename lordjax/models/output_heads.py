"""Output heads: layers between the final norm and the last layer, and new classification heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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


def transform_of(config: ModelConfig) -> type[MaskedTransform] | type[Pooler] | None:
    """Returns the module before the head's last layer, or None."""
    if config.head == "masked":
        return MaskedTransform
    return Pooler if config.head == "classes" and not config.causal else None


def last_token(x: Float[Array, "b s m"], mask: Bool[Array, "b s"] | None) -> Float[Array, "b m"]:
    """Returns the row of each sequence's last token, which a causal classifier reads.

    Args:
      x: a row per position.
      mask: False at padding; None: there is no padding.
    """
    if mask is None:
        return x[:, -1]
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


# Parameters that belong to a checkpoint, but that the forward pass does not read: BERT's pooler
# where nothing is classified, and the head of its second pre-training task.
CARRIED = ("pooler", "seq_relationship")

_DEVIATION = 0.02  # standard deviation of a new kernel, as in BERT's initialization


def with_classes(
    config: ModelConfig, params: Any, num_classes: int, key: Array
) -> tuple[ModelConfig, dict[str, Any]]:
    """Gives an encoder a new head that classifies sequences, for fine-tuning.

    Kernels of the head are normal with standard deviation 0.02, biases are 0, both in the dtype of
    the embedding. A model that already has a pooler keeps it. Arrays outside the head are not
    copied.

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
    dtype = params["embed"]["embedding"].dtype
    size = config.hidden_size

    def linear(outputs: int, key: Array) -> dict[str, Array]:
        kernel = _DEVIATION * jax.random.normal(key, (size, outputs))
        return {"kernel": kernel.astype(dtype), "bias": jnp.zeros(outputs, dtype)}

    first, second = jax.random.split(key)
    pooler = params.get("pooler", {"dense": linear(size, first)})
    if config.head == "classes":
        pooler = params["transform"]
    kept = {name: part for name, part in params.items() if name not in CARRIED}
    return new, {**kept, "transform": pooler, "head": linear(num_classes, second)}
