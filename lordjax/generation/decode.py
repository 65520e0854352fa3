"""Generation: a prompt in one pass, then token by token with a cache of keys and values.

Rows are aligned at their first token: column i of the cache is position i of every row, so a prompt
needs no mask. What is behind a prompt's end is overwritten before it is seen. Lengths of prompts
and caches are rounded up to few sizes (`bucket`), which are compiled once.

What a row gets depends on its prompt, the settings, the seed and its number, not on the rows beside
it (but for rounding, where batches are computed otherwise).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lordjax.generation.sampling import GREEDY, Kind, Sampling, Values, pick
from lordjax.models.attention import CACHE
from lordjax.models.blocks import Block
from lordjax.models.config import ModelConfig
from lordjax.models.transformer import Transformer, default_positions

CHUNK = 16  # tokens between two looks of the host
LEAST = 16  # the smallest bucket
ROOM = 128  # the smallest cache
NOTHING = -1  # where a row has ended


class State(NamedTuple):
    """Between two tokens.

    Attributes:
      cache: keys and values, `models.transformer.CACHE`.
      token: ``[b]`` int32, the last one of every row, which the cache does not hold yet.
      position: ``[b]`` int32, that token's.
      made: ``[b]`` int32, tokens that were generated.
      done: ``[b]``, nothing more is generated.
      occurred: ``[b, vocab]``, in prompt or answer; None without a penalty.
    """

    cache: Any
    token: Int[Array, "b"]
    position: Int[Array, "b"]
    made: Int[Array, "b"]
    done: Bool[Array, "b"]
    occurred: Bool[Array, "b v"] | None


class Order(NamedTuple):
    """What the tokens of a run depend on, apart from model and prompts.

    Attributes:
      values: of `Sampling`.
      stops: ``[n]`` int32, tokens that end a row; -1 is none.
      keys: ``[b]`` random keys of the rows.
      limit: int32, most tokens of a row.
    """

    values: Values
    stops: Int[Array, "n"]
    keys: Any
    limit: Int[Array, ""]


class Generated(NamedTuple):
    """A row's answer.

    Attributes:
      tokens: ids, without the token that ended it.
      reason: ``stop`` (a stop token), ``text`` (a stop string) or ``length``.
    """

    tokens: list[int]
    reason: str


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96 and so on."""
    size = LEAST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _advance(
    logits: Float[Array, "b v"], cache: Any, state: State, order: Order, kind: Kind
) -> State:
    """Takes the token that follows ``state``'s position; rows that are done stay as they are."""
    keys = jax.vmap(jax.random.fold_in)(order.keys, state.made) if kind.drawn else None
    token = pick(logits, state.occurred, keys, kind, order.values)
    ended = state.done | jnp.any(token[:, None] == order.stops[None], axis=1)
    made = jnp.where(ended, state.made, state.made + 1)
    occurred = state.occurred
    if occurred is not None:
        occurred = occurred | jax.nn.one_hot(token, logits.shape[1], dtype=bool)
    return State(
        cache=cache,
        token=jnp.where(ended, NOTHING, token),
        position=jnp.where(state.done, state.position, state.position + 1),
        made=made,
        done=ended | (made >= order.limit),
        occurred=occurred,
    )


def _whole(config: ModelConfig, params: Any, *inputs: Any, method: Any) -> Any:
    """A method of the whole model."""
    return Transformer(config).apply({"params": params}, *inputs, method=method)


@functools.partial(jax.jit, static_argnames=("config", "window"))
def _block(
    params: Any,
    cache: Any,
    x: Float[Array, "b s m"],
    positions: Int[Array, "#b s"],
    *,
    config: ModelConfig,
    window: int | None,
) -> tuple[Float[Array, "b s m"], Any]:
    """A block's output and its cache; jitted, so that equal blocks are traced and lowered once."""
    variables = {"params": params} | ({} if cache is None else {CACHE: cache})
    block = Block(config, window)
    x, made = block.apply(variables, x, positions, mutable=[CACHE])
    return x, made[CACHE]


def _hidden(
    config: ModelConfig,
    params: Any,
    tokens: Int[Array, "b s"],
    positions: Int[Array, "#b s"],
    cache: Any,
) -> tuple[Float[Array, "b s m"], Any]:
    """`Transformer.hidden` and the cache behind these tokens; begins one if ``cache`` is None."""
    inputs = (tokens, None, None, positions)
    x, made = _whole(config, params, *inputs, method=Transformer.embed_tokens), {}
    for i in range(config.num_layers):
        name = f"layer_{i}"
        before = None if cache is None else cache[name]
        how = {"config": config, "window": config.window(i)}
        x, made[name] = _block(params[name], before, x, positions, **how)
    return x, made


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def prefill(
    params: Any,
    tokens: Int[Array, "b s"],
    lengths: Int[Array, "b"],
    order: Order,
    *,
    config: ModelConfig,
    kind: Kind,
) -> State:
    """Reads prompts, filled up on the right, and takes the first token of every answer.

    The cache has no room for more: see `widened`.
    """
    x, cache = _hidden(config, params, tokens, default_positions(tokens), None)
    last = x[jnp.arange(x.shape[0]), lengths - 1]
    logits: Any = _whole(config, params, last[:, None], method=Transformer.unembed)
    occurred = None
    if kind.penalised:
        inside = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        rows = jnp.broadcast_to(jnp.arange(tokens.shape[0])[:, None], tokens.shape)
        empty = jnp.zeros((tokens.shape[0], config.vocab_size), bool)
        occurred = empty.at[rows, tokens].max(inside)
    nothing = jnp.zeros_like(lengths)
    before = State(cache, nothing, lengths - 1, nothing, nothing > 0, occurred)
    return _advance(logits[:, 0], cache, before, order, kind)


@functools.partial(jax.jit, static_argnames="capacity")
def widened(cache: Any, *, capacity: int) -> Any:
    """The cache with as many columns as ``capacity``."""

    def fill(a: Array) -> Array:
        return jnp.pad(a, ((0, 0), (0, 0), (0, capacity - a.shape[2]), (0, 0)))

    return jax.tree.map(fill, cache)


@functools.partial(jax.jit, static_argnames=("config", "kind"), donate_argnames="state")
def decode(
    params: Any, state: State, order: Order, steps: Array, *, config: ModelConfig, kind: Kind
) -> tuple[State, Int[Array, "b chunk"]]:
    """The next tokens of every row, at most ``steps`` ≤ `CHUNK`; `NOTHING` where a row has ended.

    The memory of ``state`` is given to the result.
    """

    def unfinished(carry: tuple[Array, State, Array]) -> Array:
        i, state, _ = carry
        return (i < steps) & ~jnp.all(state.done)

    def step(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        i, state, out = carry
        tokens, positions = jnp.maximum(state.token, 0)[:, None], state.position[:, None]
        x, cache = _hidden(config, params, tokens, positions, state.cache)
        logits: Any = _whole(config, params, x, method=Transformer.unembed)
        old = state.done
        state = _advance(logits[:, 0], cache, state, order, kind)
        token = jnp.where(old, NOTHING, state.token)
        return i + 1, state, jax.lax.dynamic_update_slice_in_dim(out, token[:, None], i, axis=1)

    out = jnp.full((state.token.shape[0], CHUNK), NOTHING, jnp.int32)
    _, state, out = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state, out))
    return state, out


def stream(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    rows: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> Iterator[Int[np.ndarray, "b chunk"]]:
    """Generates for a batch of prompts; yields new tokens as they come, -1 where a row has ended.

    Sending a Boolean array ``[b]`` ends those rows.

    Args:
      config: of a causal model.
      params: its parameters; leaves may be kernels of any kind.
      prompts: ids; one at least in each.
      max_new_tokens: per prompt.
      sampling: how tokens are chosen.
      stop_tokens: ids that end a row; they are not part of the answer.
      seed: of what is drawn.
      rows: numbers of the prompts, on which draws depend; None: 0, 1, …
      chunk: most tokens at a time, at most `CHUNK`.

    Raises:
      ValueError: if the model cannot generate, a prompt is empty, an id is not in the vocabulary,
        or prompt and answer are longer than the model's longest sequence.
    """
    tokens, lengths, capacity = _laid_out(config, prompts, max_new_tokens)
    numbers = np.arange(len(lengths)) if rows is None else np.asarray(rows)
    stops = np.full(max(4, bucket(len(stop_tokens))), NOTHING, np.int32)
    stops[: len(stop_tokens)] = stop_tokens
    key = jax.random.key(seed)
    order = Order(
        sampling.values,
        jnp.asarray(stops),
        jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers, jnp.int32)),
        jnp.asarray(max_new_tokens, jnp.int32),
    )
    params = jax.tree.map(jnp.asarray, params)
    same = {"config": config, "kind": sampling.kind}
    state = prefill(params, tokens, lengths, order, **same)
    state = state._replace(cache=widened(state.cache, capacity=capacity))
    ended = yield np.asarray(state.token)[:, None]
    while True:
        if ended is not None:
            state = state._replace(done=state.done | jnp.asarray(ended))
        if bool(jnp.all(state.done)):
            return
        state, out = decode(params, state, order, jnp.asarray(chunk, jnp.int32), **same)
        ended = yield np.asarray(out)[:, :chunk]


def _laid_out(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[Array, Array, int]:
    """Prompts ``[b, s]`` filled up on the right, their lengths, and the columns of a cache."""
    if config.head != "causal" or not config.causal:
        raise ValueError(f"a model with head {config.head!r} does not generate; take a causal one")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.size or lengths.min() < 1 or max_new_tokens < 1:
        raise ValueError(
            f"prompts of {lengths.tolist()} tokens, {max_new_tokens} new ones: expected 1 or more "
            "of each; begin an empty prompt with the tokenizer's BOS or EOS token"
        )
    total = int(lengths.max()) + max_new_tokens
    most = config.max_positions
    if total > most:
        raise ValueError(
            f"a prompt of {lengths.max()} tokens and {max_new_tokens} new ones are {total}, but "
            f"the model's longest sequence is {most}; shorten the prompt or lower max_new_tokens"
        )
    width = bucket(int(lengths.max()))
    for rope in (config.rope, config.local_rope):
        if rope is None or rope.kind not in ("dynamic", "longrope"):
            continue
        # Frequencies change with the sequence's length; what is cached cannot turn once more.
        trained = rope.original_max_positions or most
        if total <= trained:
            most = min(most, trained)
        elif rope.kind == "dynamic":
            raise ValueError(
                f"{total} tokens, but the frequencies of dynamic rotary positions change with "
                f"every token beyond {trained}, which a cache cannot follow; stay below"
            )
        else:
            width = max(width, trained + 1)
    width, capacity = min(width, most), min(bucket(max(total, width, ROOM)), most)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"ids from {tokens.min()} to {tokens.max()}; the vocabulary has {config.vocab_size}"
        )
    return jnp.asarray(tokens), jnp.asarray(lengths), capacity


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    rows: Sequence[int] | None = None,
    ended: Any = None,
) -> list[Generated]:
    """Answers to a batch of prompts; arguments and errors as of `stream`.

    ``ended``, if given, is asked after every few tokens with a row's number in the batch and its
    tokens so far, and says whether the row has ended: how stop strings are found.
    """
    settings = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed}
    chunks = stream(config, params, prompts, **settings, stop_tokens=stop_tokens, rows=rows)
    answers: list[list[int]] = [[] for _ in prompts]
    over = np.zeros(len(prompts), bool)
    try:
        out = next(chunks)
        while True:
            for i, row in enumerate(out):
                new = [int(token) for token in row if token != NOTHING]
                answers[i] += new
                if ended is not None and new and not over[i]:
                    over[i] = ended(i, answers[i])
            out = chunks.send(over if ended is not None else None)
    except StopIteration:
        reasons = [
            "text" if text else "length" if len(tokens) == max_new_tokens else "stop"
            for tokens, text in zip(answers, over, strict=True)
        ]
    return [Generated(*both) for both in zip(answers, reasons, strict=True)]


def unpadded(tokens: Int[np.ndarray, "b s"], mask: Bool[np.ndarray, "b s"]) -> list[list[int]]:
    """Prompts out of a batch that was padded, on whichever side, as tokenizers make them."""
    kept = (np.asarray(row)[np.asarray(seen, bool)] for row, seen in zip(tokens, mask, strict=True))
    return [row.tolist() for row in kept]
