"""Loss of every head: what a model predicts, its targets, and their gradient.

``causal``   predicts the next token, at every position
``masked``   predicts the tokens at `SHARE` of the positions; the model reads the mask token there
``classes``  predicts a class; calibration uses the model's own most likely class, which gives the
             empirical Fisher information of its decision
``tokens``   predicts a class at every position; calibration uses the model's own
``span``     predicts where an answer starts and ends; calibration uses the model's own positions

The masked positions are random. The generator is seeded with the ids of the sequence, so that a
sequence is masked in the same way in every batch, subset and evaluation, padded or not.

Targets are token ids ``[sequences, length]``, classes ``[sequences, 1]`` or, one per token,
``[sequences, length]``, or positions ``[sequences, 2]``. `NO_TARGET`, -1, has two meanings:

* for token ids: there is no target at this position; its loss is 0;
* for classes and positions: the target is what the model itself finds most likely (`decides`).
  `PADDING`, -2, says that there is no target.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lordjax.models.config import ModelConfig
from lordjax.models.targets import (
    NO_TARGET,
    SHARE,
    masked_positions,
    masked_tokens,
    next_tokens,
    own_class,
    own_classes,
    own_span,
)
from lordjax.models.transformer import Transformer

# Positions whose logits are in memory at a time: 256 x 49152 float32 are 50 MB.
CHUNK = 256


def inputs(
    config: ModelConfig, tokens: np.ndarray, mask: np.ndarray | None, mask_token: int | None
) -> np.ndarray:
    """Returns the ids that the model reads: the tokens, some of them masked for a masked head.

    Args:
      config: the model.
      tokens: token ids ``[n, len]``, none of them masked.
      mask: False at padding; None: there is no padding.
      mask_token: id of the mask token; None if the model does not predict masked tokens.

    Raises:
      ValueError: if the model predicts masked tokens, and no id of its vocabulary is given.
    """
    if config.head != "masked":
        return tokens
    if mask_token is None or not 0 <= mask_token < config.vocab_size:
        raise ValueError(
            f"mask_token = {mask_token}: this model predicts masked tokens, so the id of its mask "
            f"token is needed, 0 to {config.vocab_size - 1}; see the tokenizer's mask_token_id"
        )
    return np.where(masked_positions(tokens, mask), np.asarray(mask_token, tokens.dtype), tokens)


def targets(config: ModelConfig, tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Returns the targets of a batch; see the module's docstring.

    Args:
      config: the model.
      tokens: token ids ``[n, len]``, none of them masked.
      mask: False at padding; None: there is no padding.

    Raises:
      ValueError: if the model has no head, or only one class.
    """
    return objective_for(config).targets(tokens, mask)


def decides(config: ModelConfig) -> bool:
    """Returns whether calibration takes the model's own decisions for targets."""
    return config.head in ("classes", "tokens", "span")


def protocol(config: ModelConfig, mask_token: int | None) -> dict[str, Any]:
    """Returns what a report says about the objective; nothing for a causal model."""
    if config.head != "masked":
        return {}
    return {"objective": "masked tokens", "masked_share": SHARE, "mask_token": mask_token}


@functools.partial(jax.jit, static_argnums=0)
def losses(
    config: ModelConfig,
    params: Any,
    x: Float[Array, "b s m"],
    targets: Int[Array, "b t"],
    mask: Bool[Array, "b s"] | None = None,
) -> Float[Array, "b t"]:
    """Computes the loss of every target, in nats.

    Args:
      config: the model.
      params: parameters; only those outside the blocks are read.
      x: residual stream after the last block.
      targets: token ids or classes; see the module's docstring.
      mask: False at padding; None: there is no padding.

    Returns:
      Losses; 0 at positions without a target.
    """
    return objective_for(config).losses(config, params, x, targets, mask)


@functools.partial(jax.jit, static_argnames=("config",))
def loss_gradient(
    non_block_params: Any,
    x: Float[Array, "b s m"],
    targets: Int[Array, "b t"],
    mask: Bool[Array, "b s"] | None = None,
    *,
    config: ModelConfig,
) -> Float[Array, "b s m"]:
    """Computes the gradient of the summed loss by the residual stream after the last block.

    Args:
      non_block_params: parameters outside the blocks.
      x: residual stream after the last block.
      targets: token ids or classes; see the module's docstring.
      mask: False at padding; None: there is no padding.
      config: the model.
    """
    return objective_for(config).gradient(config, non_block_params, x, targets, mask)


def logits_of(config: ModelConfig, params: Any, x: Float[Array, "b s m"], mask: Any = None) -> Any:
    """Returns what the head says of the residual stream after the last block, in float32."""
    return Transformer(config).apply({"params": params}, x, mask, method=Transformer.unembed)


def nll_of(logits: Float[Array, "*n v"], targets: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns the negative log-likelihood of every target; 0 where there is none."""
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets >= 0, jax.nn.logsumexp(logits, axis=-1) - chosen, 0)


def _position_nll(
    config: ModelConfig, params: Any, x: Float[Array, "b s m"], targets: Int[Array, "b s"]
) -> Float[Array, "b s"]:
    """Losses of positions, each of which has a target of its own."""
    logits = logits_of(config, params, x)
    if config.head == "tokens":
        targets = jnp.where(targets == NO_TARGET, jnp.argmax(logits, axis=-1), targets)
    return nll_of(logits, targets)


def _token_losses(
    config: ModelConfig,
    params: Any,
    x: Float[Array, "b s m"],
    targets: Int[Array, "b s"],
    mask: Any,
) -> Float[Array, "b s"]:
    """Losses of a target per position; logits are computed chunk by chunk."""
    del mask  # the targets say where padding is
    return by_chunks(functools.partial(_position_nll, config, params), x, targets)


def by_chunks(fn: Callable[..., Any], *rows: Float[Array, "b s ..."]) -> Any:
    """Applies ``fn`` to `CHUNK` positions at a time; the backward pass computes it again.

    Every array of the result is ``[b, s, …]``.
    """
    batch, length = rows[0].shape[:2]
    size = min(CHUNK, length)
    chunks = -(-length // size)

    def cut(a: Array) -> Array:
        # The padding of the last chunk is cut off below.
        fill = [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (a.ndim - 2)
        return jnp.moveaxis(jnp.pad(a, fill).reshape(batch, chunks, size, *a.shape[2:]), 1, 0)

    found = jax.lax.map(lambda parts: jax.checkpoint(fn)(*parts), tuple(map(cut, rows)))

    def join(a: Array) -> Array:
        return jnp.moveaxis(a, 0, 1).reshape(batch, -1, *a.shape[3:])[:, :length]

    return jax.tree.map(join, found)


def _token_gradient(
    config: ModelConfig,
    params: Any,
    x: Float[Array, "b s m"],
    targets: Int[Array, "b s"],
    mask: Any,
) -> Float[Array, "b s m"]:
    """Gradient of the losses of a target per position, a few positions at a time.

    Positions are independent after the last block. The logits of a whole batch would be the largest
    array of the run.
    """
    del mask  # the targets say where padding is

    def loss(x: Array, target: Array) -> Array:
        return _position_nll(config, params, x[None, None], target[None, None])[0, 0]

    rows = (x.reshape(-1, x.shape[-1]), targets.reshape(-1))
    gradients = jax.lax.map(lambda row: jax.grad(loss)(*row), rows, batch_size=256)
    return gradients.reshape(x.shape)


def _choices(config: ModelConfig, params: Any, x: Float[Array, "b s m"], mask: Any) -> Any:
    """Logits of the choices of a classifier ``[b, 1, classes]``, or of a span ``[b, 2, s]``."""
    logits = logits_of(config, params, x, mask)
    if config.head == "classes":
        return logits[:, None]
    logits = jnp.swapaxes(logits, 1, 2)
    return logits if mask is None else jnp.where(mask[:, None], logits, -jnp.inf)


def _choice_losses(
    config: ModelConfig,
    params: Any,
    x: Float[Array, "b s m"],
    targets: Int[Array, "b t"],
    mask: Any,
) -> Float[Array, "b t"]:
    logits = _choices(config, params, x, mask)
    return nll_of(logits, jnp.where(targets < 0, jnp.argmax(logits, axis=-1), targets))


def _choice_gradient(
    config: ModelConfig,
    params: Any,
    x: Float[Array, "b s m"],
    targets: Int[Array, "b t"],
    mask: Any,
) -> Float[Array, "b s m"]:
    return jax.grad(lambda x: jnp.sum(_choice_losses(config, params, x, targets, mask)))(x)


@functools.partial(jax.jit, static_argnums=0)
def decisions(config: ModelConfig, params: Any, x: Float[Array, "b s m"]) -> Int[Array, "b t"]:
    """Returns the most likely targets, from the residual stream after the last block."""
    if config.head == "tokens":
        return jnp.argmax(logits_of(config, params, x), axis=-1)
    return jnp.argmax(_choices(config, params, x, None), axis=-1)


class Objective(NamedTuple):
    """Targets, losses and gradient of a head.

    Attributes:
      targets: function of (tokens, mask).
      losses: function of (config, params, x, targets, mask).
      gradient: function of (config, params, x, targets, mask).
    """

    targets: Callable[[np.ndarray, np.ndarray | None], np.ndarray]
    losses: Callable[[ModelConfig, Any, Array, Array, Any], Array]
    gradient: Callable[[ModelConfig, Any, Array, Array, Any], Array]


OBJECTIVES = {
    "causal": Objective(next_tokens, _token_losses, _token_gradient),
    "masked": Objective(masked_tokens, _token_losses, _token_gradient),
    "classes": Objective(own_class, _choice_losses, _choice_gradient),
    "tokens": Objective(own_classes, _token_losses, _token_gradient),
    "span": Objective(own_span, _choice_losses, _choice_gradient),
}


def objective_for(config: ModelConfig) -> Objective:
    """Returns the objective of a model's head.

    Raises:
      ValueError: if the model has no head, or only one class.
    """
    if config.head not in OBJECTIVES:
        raise ValueError(
            f"a model with head {config.head!r} predicts nothing, so it has no loss; choose a "
            "method that needs no gradients, or a checkpoint with a head"
        )
    if config.num_classes == 1 and config.head != "span":
        raise ValueError(
            "a model with one class has nothing to decide, so its loss has no gradient; choose a "
            "method that needs no gradients"
        )
    return OBJECTIVES[config.head]


def check_windows(tokens: np.ndarray) -> None:
    """Raises ValueError unless there is at least one sequence of at least two tokens."""
    if tokens.ndim != 2 or not tokens.shape[0] or tokens.shape[1] < 2:
        raise ValueError(f"tokens {list(tokens.shape)}; expected [windows ≥ 1, length ≥ 2]")


def check_finite(config: ModelConfig, nll: np.ndarray, first_window: int) -> None:
    """Raises ValueError if a loss is not finite; the error names window and token.

    Args:
      config: the model.
      nll: losses ``[windows, targets]``.
      first_window: number of the first of these windows.
    """
    if np.isfinite(nll).all():
        return
    window, position = np.argwhere(~np.isfinite(nll))[0]
    ahead = 1 if config.head == "causal" else 0
    raise ValueError(
        f"window {first_window + window}, token {position + ahead}: negative log-likelihood is "
        f"{nll[window, position]}, expected a finite number; the weights hold NaN, or "
        "activations overflow in the dtype of the embedding"
    )
