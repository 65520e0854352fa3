"""The model with a key-value cache, traced and lowered block by block."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from lordjax.models.attention import CACHE
from lordjax.models.blocks import Block
from lordjax.models.config import ModelConfig
from lordjax.models.transformer import Transformer
from lordjax.names import layer

# Options of XLA's compiler. For a GPU it would merge products of one input, and for that copy
# matrices of odd widths side by side, for every token.
READ_IN_PLACE = {"xla_gpu_dot_merger_threshold_mb": 0}


def whole(config: ModelConfig, params: Any, *inputs: Any, method: Any) -> Any:
    """Applies a method of the whole model."""
    return Transformer(config).apply({"params": params}, *inputs, method=method)


@functools.partial(jax.jit, static_argnames=("config", "sliding_window"))
def _block(
    params: Any,
    cache: Any,
    x: Float[Array, "b s m"],
    positions: Int[Array, "#b s"],
    *,
    config: ModelConfig,
    sliding_window: int | None,
) -> tuple[Float[Array, "b s m"], Any]:
    """Computes a block's output and its cache.

    It is jitted, so that blocks of equal shapes are traced and lowered once.
    """
    variables = {"params": params} | ({} if cache is None else {CACHE: cache})
    block = Block(config, sliding_window)
    x, made = block.apply(variables, x, positions, mutable=[CACHE])
    return x, made[CACHE]


def hidden(
    config: ModelConfig,
    params: Any,
    tokens: Int[Array, "b s"],
    positions: Int[Array, "#b s"],
    cache: Any,
) -> tuple[Float[Array, "b s m"], Any]:
    """Computes `Transformer.hidden` and the cache with these tokens; None: starts a cache."""
    inputs = (tokens, None, None, positions)
    x, made = whole(config, params, *inputs, method=Transformer.embed_tokens), {}
    for i in range(config.num_layers):
        name = layer(i)
        before = None if cache is None else cache[name]
        how = {"config": config, "sliding_window": config.window(i)}
        x, made[name] = _block(params[name], before, x, positions, **how)
    return x, made
