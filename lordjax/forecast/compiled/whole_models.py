"""Programs of a whole model, compiled with few blocks: decoding, and a fine-tuning step.

Programs of whole models are unrolled over the blocks, so their compilation takes as long as the
model is deep. Blocks of equal shapes add the same to every number, so each number of the whole
model is extrapolated by a line through those of two and of three blocks; arguments are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lordjax.finetune import recipes, step
from lordjax.finetune.memory import abstract_state
from lordjax.finetune.recipes import Recipe
from lordjax.finetune.step import Settings
from lordjax.forecast.compiled.programs import Compiled, Compiler, extrapolated
from lordjax.forecast.compiled.roofline import least_seconds
from lordjax.generation import decode
from lordjax.generation.sampling import GREEDY
from lordjax.models.config import ModelConfig
from lordjax.names import layer
from lordjax.runtime import flops
from lordjax.runtime.cards import Card

BLOCKS = (2, 3)


def shallow(config: ModelConfig, params: Mapping[str, Any], blocks: int) -> tuple[Any, Any]:
    """Returns the config and the parameters of a model with its first blocks only."""
    windows = None if config.windows is None else config.windows[:blocks]
    dropped = {layer(i) for i in range(blocks, config.num_layers)}
    few = dataclasses.replace(config, num_layers=blocks, windows=windows)
    return few, {name: value for name, value in params.items() if name not in dropped}


def decoding(
    config: ModelConfig, params: Any, compiler: Compiler, card: Card, batch: int, length: int
) -> dict[str, Any]:
    """Returns memory and least time of decoding a token per row, of all blocks.

    Args:
      config: the architecture.
      params: shapes of the parameters.
      compiler: compiles for one device.
      card: the GPU.
      batch: number of rows.
      length: tokens that the cache holds.
    """

    def trace(few: ModelConfig, params: Any) -> tuple[Any, Any, tuple[Any, ...]]:
        state, settings = begun_shapes(few, params, batch, length)
        args = compiler.placed((params, state, settings, _ids()))
        same = {"config": few, "kind": GREEDY.kind}
        counted = _one_token(few)
        return decode.decode.trace(*args, **same), counted, (params, state, settings)

    return _of_all_blocks(config, params, compiler, card, trace)


def begun_shapes(
    config: ModelConfig, params: Any, batch: int, length: int
) -> tuple[decode.State, decode.RunSettings]:
    """Returns the shapes of a state of greedy decoding, and of its settings."""
    number, ids = jax.ShapeDtypeStruct((), jnp.float32), _ids(4)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    values = jax.tree.map(lambda _: number, GREEDY.values)
    settings = decode.RunSettings(values, ids, keys, _ids())
    tokens, lengths = _ids(batch, length), _ids(batch)

    def read(*args: Any) -> decode.State:
        return decode.prefill(*args, config=config, kind=GREEDY.kind)

    return jax.eval_shape(read, params, tokens, lengths, settings), settings


def _ids(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _one_token(config: ModelConfig) -> Callable[..., Any]:
    """A program that computes one token's logits, as decoding does in its loop."""
    from lordjax.generation.cached_model import hidden, whole
    from lordjax.models.transformer import Transformer

    def run(params: Any, state: decode.State, settings: Any) -> Any:
        del settings
        tokens, positions = state.token[:, None], state.position[:, None]
        x, _ = hidden(config, params, tokens, positions, state.cache)
        return whole(config, params, x, method=Transformer.unembed)

    return run


def fine_tuning(
    config: ModelConfig,
    params: Any,
    compiler: Compiler,
    card: Card,
    recipe: Recipe,
    settings: Settings,
    length: int,
) -> dict[str, Any]:
    """Returns memory and least time of a fine-tuning step, of all blocks.

    Args:
      config: the architecture.
      params: shapes of the parameters.
      compiler: compiles for one device.
      card: the GPU.
      recipe: what is trained, and how.
      settings: settings of the run.
      length: tokens per example.
    """

    def trace(few: ModelConfig, params: Any) -> tuple[Any, Any, tuple[Any, ...]]:
        args = abstract_state(few, params, recipe, settings, length)
        update: Any = step.make_step(
            few, recipes.optimizer(recipe, settings.steps), dtype=settings.dtype
        )
        return update.trace(*compiler.placed(args)), update, args

    return _of_all_blocks(config, params, compiler, card, trace)


def _of_all_blocks(
    config: ModelConfig, params: Any, compiler: Compiler, card: Card, trace: Callable[..., Any]
) -> dict[str, Any]:
    made: list[Compiled] = []
    seconds = []
    for blocks in BLOCKS:
        traced, counted, args = trace(*shallow(config, params, blocks))
        made.append(compiler.compile_traced(traced))
        facts = made[-1].facts
        ops = flops.count_ops(counted, *args)
        seconds.append(least_seconds(card, ops, facts.nbytes, facts.sent))
    few, more = made

    def whole(read: Callable[[Compiled], float]) -> int:
        return extrapolated(round(read(few)), round(read(more)), BLOCKS, config.num_layers)

    parts = {
        name: whole(lambda c, name=name: getattr(c, name))
        for name in ("arguments", "outputs", "temporaries")
    }
    each = seconds[1] - seconds[0]
    return parts | {
        "bytes": sum(parts.values()),
        "seconds": seconds[0] + each * (config.num_layers - BLOCKS[0]),
        "launches": whole(lambda c: c.facts.total_launches),
        "moved": whole(lambda c: c.facts.nbytes),
        "calls": dict(more.facts.calls),
    }
