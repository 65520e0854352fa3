"""How far a model's predictions are from those of a teacher: the losses of distillation.

The teacher's predictions are computed beside the model's (`divergences`), or come from a table of
its most likely tokens at every position (`top_predictions`, `losses_and_divergences`), so that the
two models need not be in memory together.

Source: Hinton et al., arXiv 1503.02531.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lordjax.models.config import ModelConfig
from lordjax.models.objective import by_chunks, logits_of, nll_of


@functools.partial(jax.jit, static_argnums=0)
def divergences(
    config: ModelConfig,
    params: Any,
    teacher: Any,
    x: Float[Array, "b s m"],
    y: Float[Array, "b s m"],
    targets: Int[Array, "b s"],
) -> Float[Array, "b s"]:
    """Computes ``KL(teacher || student)`` at every target, in nats.

    Args:
      config: architecture of both models, which predict tokens.
      params: the student's parameters; only those outside the blocks are read.
      teacher: the teacher's parameters; only those outside the blocks are read.
      x: the student's residual stream after the last block.
      y: the teacher's residual stream after the last block.
      targets: token ids; only whether there is a target matters.

    Returns:
      Divergences; 0 at positions without a target.
    """

    def divergence(x: Array, y: Array, target: Array) -> Array:
        ours, theirs = (
            jax.nn.log_softmax(logits_of(config, p, z)) for p, z in ((params, x), (teacher, y))
        )
        return jnp.where(target >= 0, jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1), 0)

    return by_chunks(divergence, x, jax.lax.stop_gradient(y), targets)


@functools.partial(jax.jit, static_argnames=("config", "top"))
def top_predictions(
    config: ModelConfig, params: Any, x: Float[Array, "b s m"], *, top: int
) -> tuple[Int[Array, "b s k"], Float[Array, "b s k+1"]]:
    """Returns the most likely tokens at every position, and their log-probabilities.

    Args:
      config: architecture of a model that predicts tokens.
      params: its parameters; only those outside the blocks are read.
      x: residual stream after the last block.
      top: number k of tokens; at most the vocabulary.

    Returns:
      The k token ids, and k + 1 log-probabilities. The last one is that of all other tokens
      together, ``-inf`` if there are none.
    """

    def best(x: Array) -> tuple[Array, Array]:
        logs = jax.nn.log_softmax(logits_of(config, params, x))
        highest, ids = jax.lax.top_k(logs, top)
        rest = jax.nn.logsumexp(_without(logs, ids, -jnp.inf), axis=-1)
        return ids.astype(jnp.int32), jnp.concatenate([highest, rest[..., None]], axis=-1)

    return by_chunks(best, x)


@functools.partial(jax.jit, static_argnums=0)
def losses_and_divergences(
    config: ModelConfig,
    params: Any,
    x: Float[Array, "b s m"],
    targets: Int[Array, "b s"],
    top_ids: Int[Array, "b s k"],
    top_logs: Float[Array, "b s k+1"],
) -> tuple[Float[Array, "b s"], Float[Array, "b s"]]:
    """Computes the loss and the divergence from a teacher at every target, in nats.

    The divergence is ``KL(teacher || student)`` between distributions over k + 1 outcomes: the
    teacher's k most likely tokens, and any other token. It is a lower bound of the divergence over
    the vocabulary, and equals it if k is the size of the vocabulary.

    Args:
      config: architecture of a model that predicts tokens.
      params: its parameters; only those outside the blocks are read.
      x: residual stream after the last block.
      targets: token ids; see the module's docstring.
      top_ids: the teacher's most likely tokens; see `top_predictions`.
      top_logs: their log-probabilities, and that of all others.

    Returns:
      Losses and divergences; 0 at positions without a target.
    """

    def both(x: Array, target: Array, ids: Array, theirs: Array) -> tuple[Array, Array]:
        logits = logits_of(config, params, x)
        # Finite, because the gradient of a sum over nothing is no number.
        rest = jax.nn.logsumexp(_without(logits, ids, -1e30), axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, ids, axis=-1)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        ours = jnp.concatenate([chosen, rest], axis=-1) - total
        weights = jnp.exp(theirs)
        terms = weights * (jnp.where(weights > 0, theirs, 0) - ours)
        divergence = jnp.sum(jnp.where(weights > 0, terms, 0), axis=-1)
        return nll_of(logits, target), jnp.where(target >= 0, divergence, 0)

    return by_chunks(both, x, targets, top_ids, top_logs)


def _without(
    logits: Float[Array, "*n v"], ids: Int[Array, "*n k"], value: float
) -> Float[Array, "*n v"]:
    """Returns logits with a value in place of those of some tokens."""
    return jnp.put_along_axis(logits, ids, value, axis=-1, inplace=False)
