"""Generation: reads prompts in one pass, then decodes token by token with a key-value cache.

Prompts are padded on the right: column i of the cache is position i of every row, so no mask is
needed. Cached padding is overwritten before a query can see it. Lengths of prompts and caches are
rounded up to few sizes (`prompt_batch`), each of which is compiled once.

The answer of a row depends on its prompt, the settings, the seed and the row's number. It does not
depend on the other rows, except for rounding errors where the batch size changes the computation:
a large batch becomes smaller when most of its rows have ended.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lordjax.generation.cached_model import READ_IN_PLACE, hidden, whole
from lordjax.generation.long_rows import LongRows, row_positions
from lordjax.generation.prompt_batch import bucket, pad_prompts
from lordjax.generation.sampling import GREEDY, Kind, Sampling, Values, pick
from lordjax.models.config import ModelConfig
from lordjax.models.transformer import Transformer

CHUNK = 16  # tokens that are decoded before control returns to the host
NOTHING = -1  # stands for a token after a row has ended
# A batch of at least this many rows is cut to a quarter as soon as that holds all unfinished rows.
# Below it a step mostly reads weights, so fewer rows would not pay for another compilation.
CUT_ROWS = 16


class State(NamedTuple):
    """State of decoding between two tokens.

    Attributes:
      cache: keys and values of every layer; see `models.transformer`.
      token: ``[b]`` int32, the last token of every row; the cache does not hold it yet.
      position: ``[b]`` int32, position of that token.
      made: ``[b]`` int32, number of generated tokens.
      done: ``[b]``, whether the row has ended.
      occurred: ``[b, vocab]``, tokens of prompt and answer; None without a repetition penalty.
    """

    cache: Any
    token: Int[Array, "b"]
    position: Int[Array, "b"]
    made: Int[Array, "b"]
    done: Bool[Array, "b"]
    occurred: Bool[Array, "b v"] | None


class RunSettings(NamedTuple):
    """Settings of a run that are arguments of its compiled programs.

    Attributes:
      values: numbers of the sampling; see `Sampling.values`.
      stops: ``[n]`` int32, tokens that end a row; -1 fills unused places.
      keys: ``[b]`` random key of every row.
      limit: int32, largest number of new tokens of a row.
    """

    values: Values
    stops: Int[Array, "n"]
    keys: Any
    limit: Int[Array, ""]


class Generated(NamedTuple):
    """The answer to a prompt.

    Attributes:
      tokens: new token ids, without the stop token that ended the answer.
      reason: why the answer ended: ``stop`` (a stop token), ``text`` (a stop string) or
        ``length``.
    """

    tokens: list[int]
    reason: str


def _advance(
    logits: Float[Array, "b v"], cache: Any, state: State, settings: RunSettings, kind: Kind
) -> State:
    """Chooses the next token of every row from its logits; rows that have ended do not change."""
    keys = jax.vmap(jax.random.fold_in)(settings.keys, state.made) if kind.drawn else None
    token = pick(logits, state.occurred, keys, kind, settings.values)
    ended = state.done | jnp.any(token[:, None] == settings.stops[None], axis=1)
    made = jnp.where(ended, state.made, state.made + 1)
    occurred = state.occurred
    if occurred is not None:
        occurred = occurred | jax.nn.one_hot(token, logits.shape[1], dtype=bool)
    return State(
        cache=cache,
        token=jnp.where(ended, NOTHING, token),
        position=jnp.where(state.done, state.position, state.position + 1),
        made=made,
        done=ended | (made >= settings.limit),
        occurred=occurred,
    )


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def prefill(
    params: Any,
    tokens: Int[Array, "b s"],
    lengths: Int[Array, "b"],
    settings: RunSettings,
    *,
    config: ModelConfig,
    kind: Kind,
) -> State:
    """Reads prompts and chooses the first token of every answer.

    Args:
      params: parameters of the model.
      tokens: prompts, padded on the right.
      lengths: number of tokens of every prompt.
      settings: settings of the run.
      config: the architecture.
      kind: the steps of the sampling.

    Returns:
      State whose cache has as many columns as ``tokens``; `widened` makes room for more.
    """
    x, cache = hidden(config, params, tokens, row_positions(config, tokens, lengths), None)
    last = x[jnp.arange(x.shape[0]), lengths - 1]
    logits: Any = whole(config, params, last[:, None], method=Transformer.unembed)
    occurred = None
    if kind.penalised:
        inside = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        rows = jnp.broadcast_to(jnp.arange(tokens.shape[0])[:, None], tokens.shape)
        empty = jnp.zeros((tokens.shape[0], config.vocab_size), bool)
        occurred = empty.at[rows, tokens].max(inside)
    nothing = jnp.zeros_like(lengths)
    before = State(cache, nothing, lengths - 1, nothing, nothing > 0, occurred)
    return _advance(logits[:, 0], cache, before, settings, kind)


@functools.partial(jax.jit, static_argnames="capacity")
def widened(cache: Any, *, capacity: int) -> Any:
    """Pads the cache with zeros to ``capacity`` columns."""

    def fill(a: Array) -> Array:
        return jnp.pad(a, ((0, 0), (0, 0), (0, capacity - a.shape[2]), (0, 0)))

    return jax.tree.map(fill, cache)


@functools.partial(
    jax.jit,
    static_argnames=("config", "kind"),
    donate_argnames="state",
    compiler_options=READ_IN_PLACE,
)
def decode(
    params: Any,
    state: State,
    settings: RunSettings,
    steps: Array,
    *,
    config: ModelConfig,
    kind: Kind,
) -> tuple[State, Int[Array, "b chunk"]]:
    """Generates the next tokens of every row, until ``steps`` or until every row has ended.

    Args:
      params: parameters of the model.
      state: state of decoding (donated).
      settings: settings of the run.
      steps: largest number of tokens, at most `CHUNK`.
      config: the architecture.
      kind: the steps of the sampling.

    Returns:
      The new state, and the tokens; `NOTHING` where a row has ended.
    """

    def unfinished(carry: tuple[Array, State, Array]) -> Array:
        i, state, _ = carry
        return (i < steps) & ~jnp.all(state.done)

    def step(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        i, state, out = carry
        tokens, positions = jnp.maximum(state.token, 0)[:, None], state.position[:, None]
        x, cache = hidden(config, params, tokens, positions, state.cache)
        logits: Any = whole(config, params, x, method=Transformer.unembed)
        old = state.done
        state = _advance(logits[:, 0], cache, state, settings, kind)
        token = jnp.where(old, NOTHING, state.token)
        return i + 1, state, jax.lax.dynamic_update_slice_in_dim(out, token[:, None], i, axis=1)

    out = jnp.full((state.token.shape[0], CHUNK), NOTHING, jnp.int32)
    _, state, out = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state, out))
    return state, out


@jax.jit
def _taken(batch: Any, places: Int[Array, "n"]) -> Any:
    """Returns some rows of every array."""
    return jax.tree.map(lambda a: a[places], batch)


def begin(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    rows: Sequence[int] | None = None,
) -> tuple[State, RunSettings]:
    """Reads a batch of prompts, and returns what `decode` needs to go on from there.

    Args and errors are those of `stream`.

    Returns:
      The state after the first token of every answer, and the settings of the run.
    """
    tokens, lengths, capacity = pad_prompts(config, prompts, max_new_tokens)
    numbers = np.arange(len(lengths)) if rows is None else np.asarray(rows)
    stops = np.full(max(4, bucket(len(stop_tokens))), NOTHING, np.int32)
    stops[: len(stop_tokens)] = stop_tokens
    key = jax.random.key(seed)
    settings = RunSettings(
        sampling.values,
        jnp.asarray(stops),
        jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers, jnp.int32)),
        jnp.asarray(max_new_tokens, jnp.int32),
    )
    params = jax.tree.map(jnp.asarray, params)
    state = prefill(params, tokens, lengths, settings, config=config, kind=sampling.kind)
    return state._replace(cache=widened(state.cache, capacity=capacity)), settings


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
    """Generates answers to a batch of prompts and yields the new tokens chunk by chunk.

    The caller may send a Boolean array ``[b]``: rows where it is True end.

    Args:
      config: architecture of a causal model.
      params: parameters of the model; leaves may be kernels of any kind.
      prompts: token ids; at least one in each prompt.
      max_new_tokens: largest number of new tokens per prompt.
      sampling: how tokens are chosen.
      stop_tokens: ids that end a row; they are not part of the answer.
      seed: seed of the random draws.
      rows: number of every prompt, on which its draws depend; None: 0, 1, …
      chunk: largest number of tokens per chunk, at most `CHUNK`.

    Yields:
      New tokens, -1 where a row has ended.

    Raises:
      ValueError: if the model cannot generate, a prompt is empty, a token id is outside the
        vocabulary, or prompt and answer are longer than the model's longest sequence.
    """
    params, same = jax.tree.map(jnp.asarray, params), {"config": config, "kind": sampling.kind}
    how = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed}
    state, settings = begin(config, params, prompts, stop_tokens=stop_tokens, rows=rows, **how)
    out, growing = np.asarray(state.token)[:, None], LongRows(config, params, prompts)
    places = np.arange(len(prompts))  # of the state's rows in the batch
    while True:
        growing.append(out)
        new = np.full((len(prompts), out.shape[1]), NOTHING, out.dtype)
        new[places] = out
        ended = yield new
        if ended is not None:
            state = state._replace(done=state.done | jnp.asarray(ended[places]))
        done = np.asarray(state.done)
        if done.all():
            return
        if len(done) >= CUT_ROWS and (~done).sum() <= len(done) // 4:
            kept = np.argsort(done, kind="stable")[: len(done) // 4]
            state, keys = _taken((state, settings.keys), jnp.asarray(kept))
            settings, places = settings._replace(keys=keys), places[kept]
            growing.keep(kept)
        state = state._replace(cache=growing.renewed(state.cache))
        steps = growing.steps(chunk)
        state, out = decode(params, state, settings, jnp.asarray(steps, jnp.int32), **same)
        out = np.asarray(out)[:, :steps]


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
    """Generates answers to a batch of prompts.

    Args:
      config: architecture of a causal model.
      params: parameters of the model; leaves may be kernels of any kind.
      prompts: token ids; at least one in each prompt.
      max_new_tokens: largest number of new tokens per prompt.
      sampling: how tokens are chosen.
      stop_tokens: ids that end a row; they are not part of the answer.
      seed: seed of the random draws.
      rows: number of every prompt, on which its draws depend; None: 0, 1, …
      ended: function of a row's place in the batch and its new tokens so far, which returns
        whether the row ends. It is called after every chunk; stop strings are found with it.

    Returns:
      One answer per prompt, in the order of the prompts.

    Raises:
      ValueError: as `stream`.
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
        ends = zip((len(tokens) == max_new_tokens for tokens in answers), over, strict=True)
        reasons = ["text" if text else "length" if full else "stop" for full, text in ends]
    return [Generated(*both) for both in zip(answers, reasons, strict=True)]
