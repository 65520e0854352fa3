"""What a model has to predict, and its loss: one row for every head.

``causal``   the next token, at every position
``masked``   the tokens of `SHARE` of a window's positions, all of them read as the mask token
``classes``  the model's own most likely class: the empirical Fisher information of its decision

Which positions are masked is drawn by a generator that is seeded with the ids of the window: a
window is masked alike in every batch, subset and measurement, padded or not.

Targets are ``[windows, length]`` ids, or ``[windows, 1]`` classes; -1 is no target, of a class the
model's own.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lordjax.models.config import ModelConfig
from lordjax.models.transformer import Transformer

SHARE = 0.15  # of a window's tokens is masked, as in BERT's training
# Positions whose logits are held at once: 256 x 49152 float32 are 50 MB.
CHUNK = 256


def inputs(
    config: ModelConfig, tokens: np.ndarray, mask: np.ndarray | None, mask_token: int | None
) -> np.ndarray:
    """The ids ``[n, len]`` that the model reads; arguments as for `targets`.

    Raises:
      ValueError: if the model predicts masked tokens and no mask token of its vocabulary is given.
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
    """What is to be predicted; see the module's docstring.

    Args:
      config: the model.
      tokens: ids ``[n, len]``, none of them masked.
      mask: False at padding.

    Raises:
      ValueError: if the model has no head.
    """
    return objective_for(config).targets(tokens, mask)


def protocol(config: ModelConfig, mask_token: int | None) -> dict[str, Any]:
    """What a report has to say about the objective; nothing of a causal one."""
    if config.head != "masked":
        return {}
    return {"objective": "masked tokens", "masked_share": SHARE, "mask_token": mask_token}


def masked_positions(tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """True at a fixed `SHARE` of every window's tokens, one at least; never at padding."""
    chosen = np.zeros(tokens.shape, bool)
    for i, window in enumerate(tokens):
        places = np.arange(len(window)) if mask is None else np.flatnonzero(mask[i])
        seed = zlib.crc32(np.ascontiguousarray(window[places], "<i4").tobytes())
        count = max(1, round(SHARE * len(places)))
        chosen[i, np.random.default_rng(seed).permutation(places)[:count]] = True
    return chosen


def _masked_tokens(tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    return np.where(masked_positions(tokens, mask), tokens, np.asarray(-1, tokens.dtype))


def _next_tokens(tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    counts = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    counts = counts & np.roll(counts, -1, axis=1)
    counts[:, -1] = False
    return np.where(counts, np.roll(tokens, -1, axis=1), np.asarray(-1, tokens.dtype))


def _own_class(tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    del mask
    return np.full((len(tokens), 1), -1, np.int32)


@functools.partial(jax.jit, static_argnums=0)
def losses(
    config: ModelConfig, params: Any, x: Float[Array, "b s m"], targets: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """Nats of every target from the residual stream behind the last block; 0 where there is none.

    Of ``params`` only what is outside the blocks is read.
    """
    return objective_for(config).losses(config, params, x, targets)


@functools.partial(jax.jit, static_argnums=0)
def divergences(
    config: ModelConfig,
    params: Any,
    teacher: Any,
    x: Float[Array, "b s m"],
    y: Float[Array, "b s m"],
    targets: Int[Array, "b s"],
) -> Float[Array, "b s"]:
    """``KL(teacher || student)`` in nats at every target; 0 where there is none.

    Args:
      config: the student, which predicts tokens.
      params: of ``params`` and ``teacher`` only what is outside the blocks is read.
      teacher: parameters of a model of the same architecture.
      x: the student's residual stream behind the last block.
      y: the teacher's.
      targets: only whether there is one matters.
    """

    def divergence(x: Array, y: Array, target: Array) -> Array:
        ours, theirs = (
            jax.nn.log_softmax(_logits(config, p, z)) for p, z in ((params, x), (teacher, y))
        )
        return jnp.where(target >= 0, jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1), 0)

    return _chunked(divergence, x, jax.lax.stop_gradient(y), targets)


@functools.partial(jax.jit, static_argnames=("config",))
def loss_gradient(
    rest: Any, x: Float[Array, "b s m"], targets: Int[Array, "b t"], *, config: ModelConfig
) -> Float[Array, "b s m"]:
    """Gradient of the summed loss at the last block's output."""
    return objective_for(config).gradient(config, rest, x, targets)


def _logits(config: ModelConfig, params: Any, x: Float[Array, "b s m"]) -> Any:
    return Transformer(config).apply({"params": params}, x, method=Transformer.unembed)


def _nll(logits: Float[Array, "*n v"], targets: Int[Array, "*n"]) -> Float[Array, "*n"]:
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets >= 0, jax.nn.logsumexp(logits, axis=-1) - chosen, 0)


def _token_losses(
    config: ModelConfig, params: Any, x: Float[Array, "b s m"], targets: Int[Array, "b s"]
) -> Float[Array, "b s"]:
    """Logits are taken chunk by chunk."""
    return _chunked(lambda x, target: _nll(_logits(config, params, x), target), x, targets)


def _chunked(fn: Callable[..., Array], *rows: Float[Array, "b s ..."]) -> Float[Array, "b s"]:
    """``fn`` of a few positions at a time; a gradient computes what it held again."""
    batch, length = rows[0].shape[:2]
    size = min(CHUNK, length)
    chunks = -(-length // size)

    def cut(a: Array) -> Array:
        # The filling of the last chunk is cut off again.
        fill = [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (a.ndim - 2)
        return jnp.moveaxis(jnp.pad(a, fill).reshape(batch, chunks, size, *a.shape[2:]), 1, 0)

    found = jax.lax.map(lambda parts: jax.checkpoint(fn)(*parts), tuple(map(cut, rows)))
    return jnp.moveaxis(found, 0, 1).reshape(batch, -1)[:, :length]


def _token_gradient(
    config: ModelConfig, rest: Any, x: Float[Array, "b s m"], targets: Int[Array, "b s"]
) -> Float[Array, "b s m"]:
    """Positions are independent behind the last block, so a few are done at a time.

    The logits of a whole batch would be the largest array of the run.
    """

    def loss(x: Array, target: Array) -> Array:
        return _nll(_logits(config, rest, x[None, None])[0, 0], target)

    rows = (x.reshape(-1, x.shape[-1]), targets.reshape(-1))
    gradients = jax.lax.map(lambda row: jax.grad(loss)(*row), rows, batch_size=256)
    return gradients.reshape(x.shape)


def _class_losses(
    config: ModelConfig, params: Any, x: Float[Array, "b s m"], targets: Int[Array, "b 1"]
) -> Float[Array, "b 1"]:
    logits = _logits(config, params, x)[:, None]
    return _nll(logits, jnp.where(targets < 0, jnp.argmax(logits, axis=-1), targets))


def _class_gradient(
    config: ModelConfig, rest: Any, x: Float[Array, "b s m"], targets: Int[Array, "b 1"]
) -> Float[Array, "b s m"]:
    return jax.grad(lambda x: jnp.sum(_class_losses(config, rest, x, targets)))(x)


@functools.partial(jax.jit, static_argnums=0)
def decisions(config: ModelConfig, params: Any, x: Float[Array, "b s m"]) -> Int[Array, "b 1"]:
    """The most likely class from the residual stream behind the last block."""
    return jnp.argmax(_logits(config, params, x), axis=-1)[:, None]


class Objective(NamedTuple):
    """What a head is to predict; signatures as of the functions above."""

    targets: Callable[[np.ndarray, np.ndarray | None], np.ndarray]
    losses: Callable[[ModelConfig, Any, Array, Array], Array]
    gradient: Callable[[ModelConfig, Any, Array, Array], Array]


OBJECTIVES = {
    "causal": Objective(_next_tokens, _token_losses, _token_gradient),
    "masked": Objective(_masked_tokens, _token_losses, _token_gradient),
    "classes": Objective(_own_class, _class_losses, _class_gradient),
}


def objective_for(config: ModelConfig) -> Objective:
    """The row of a model's head.

    Raises:
      ValueError: if it predicts nothing, or there is nothing to choose from.
    """
    if config.head not in OBJECTIVES:
        raise ValueError(
            f"a model with head {config.head!r} predicts nothing, so it has no loss; take a method "
            "that needs no gradients, or a checkpoint with a head"
        )
    if config.num_classes == 1:
        raise ValueError(
            "a model with one class decides nothing, so its likelihood has no gradient; take a "
            "method that needs no gradients"
        )
    return OBJECTIVES[config.head]


def check_windows(tokens: np.ndarray) -> None:
    """Raises ValueError unless there is a window with a target."""
    if tokens.ndim != 2 or not tokens.shape[0] or tokens.shape[1] < 2:
        raise ValueError(f"tokens {list(tokens.shape)}; expected [windows ≥ 1, length ≥ 2]")


def check_finite(config: ModelConfig, nll: np.ndarray, first_window: int) -> None:
    """Raises ValueError if a negative log-likelihood is not finite; names window and token."""
    if np.isfinite(nll).all():
        return
    window, position = np.argwhere(~np.isfinite(nll))[0]
    ahead = 1 if config.head == "causal" else 0
    raise ValueError(
        f"window {first_window + window}, token {position + ahead}: negative log-likelihood is "
        f"{nll[window, position]}, expected a finite number; the weights hold NaN, or "
        "activations overflow in the dtype of the embedding"
    )
