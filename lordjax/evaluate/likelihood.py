"""Log-likelihood of continuations: what a text is worth behind its context.

The tokens of a continuation are scored one behind the other::

    log p(continuation | context) = Σ_i log p(token_i | context, tokens before i)

A causal model sees nothing behind a token. So rows are filled up on the right to few widths
(`bucket`), each compiled once, and a row that begins another one is read as part of it:
choices of one token cost nothing. Logits are taken where a continuation is predicted and nowhere
else. Logits are float32, products are at full float32 precision, and sums are float64 on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lordjax.data.token_windows import check_ids
from lordjax.generation.prompt_batch import bucket
from lordjax.models.config import ModelConfig
from lordjax.models.transformer import Transformer
from lordjax.runtime.progress import Progress

BATCH = 16  # rows of a forward pass, where nothing is said
CHUNK = 128  # positions whose logits are held at once

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context and of what continues it


class Score(NamedTuple):
    """What a continuation is worth.

    Attributes:
      log_likelihood: nats, summed over its tokens.
      greedy: whether each of its tokens is the likeliest one.
    """

    log_likelihood: float
    greedy: bool


class _Place(NamedTuple):
    """Where a continuation is predicted: the last ``len(targets)`` of a row's first ``end``."""

    row: int
    end: int
    targets: Sequence[int]


def log_likelihoods(
    config: ModelConfig,
    params: Any,
    pairs: Sequence[Pair],
    *,
    batch_size: int = BATCH,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Scores continuations, in the order of the pairs.

    What is too long loses tokens at its beginning: the model reads the last ``max_length`` before
    the last token of the continuation.

    Args:
      config: of a causal model.
      params: its parameters; leaves may be kernels of any kind.
      pairs: ids of contexts and continuations, one or more in each.
      batch_size: rows of a forward pass; does not change the result beyond rounding.
      max_length: most tokens the model reads; None: its longest sequence.
      progress: called with ("score", rows done, rows in all).

    Raises:
      ValueError: if the model predicts no next token, a pair is empty, a continuation is longer
        than ``max_length``, an id is not in the vocabulary, or a likelihood is not finite; names
        the pair.
    """
    if config.head != "causal" or not config.causal:
        raise ValueError(f"a model with head {config.head!r} predicts no next token")
    most = config.max_positions if max_length is None else max_length
    if batch_size < 1 or not 1 <= most <= config.max_positions:
        raise ValueError(
            f"batch size {batch_size}, sequences of {most} tokens; expected 1 or more, and 1 to "
            f"{config.max_positions}, the model's longest sequence"
        )
    rows, places = _laid_out(config, pairs, most)
    # Once, or every call would move the weights to the device again.
    params = jax.tree.map(jnp.asarray, params)
    sums, greedy = np.zeros(len(places)), np.ones(len(places), bool)
    at: dict[int, list[int]] = {}
    for i, place in enumerate(places):
        at.setdefault(place.row, []).append(i)
    done = 0
    for numbers in _batches(config, rows, batch_size):
        members = [(line, i) for line, row in enumerate(numbers) for i in at[row]]
        tokens = _filled(config, [rows[row] for row in numbers], min(batch_size, len(rows)), most)
        for owners, found, best in _scored(config, params, tokens, members, places):
            np.add.at(sums, owners, found)
            np.logical_and.at(greedy, owners, best)
        done += len(numbers)
        if progress is not None:
            progress("score", done, len(rows))
    if not np.isfinite(sums).all():
        first = int(np.flatnonzero(~np.isfinite(sums))[0])
        raise ValueError(
            f"pair {first}: log-likelihood is {sums[first]}, expected a finite number; the weights "
            "hold NaN, or activations overflow in the dtype of the embedding"
        )
    return [Score(float(s), bool(g)) for s, g in zip(sums, greedy, strict=True)]


def _laid_out(
    config: ModelConfig, pairs: Sequence[Pair], most: int
) -> tuple[list[list[int]], list[_Place]]:
    """The rows to read, none of which begins another, and where each pair stands in them."""
    inputs = []
    for i, (context, continuation) in enumerate(pairs):
        if not len(context) or not 1 <= len(continuation) <= most:
            raise ValueError(
                f"pair {i}: {len(context)} tokens of context, {len(continuation)} of continuation; "
                f"expected 1 or more, and 1 to {most}, the longest sequence"
            )
        whole = [*context, *continuation]
        check_ids(np.asarray([whole]), config.vocab_size, f"pair {i}")
        inputs.append(whole[-(most + 1) :][:-1])
    rows: list[list[int]] = []
    owners = [0] * len(inputs)
    # Backwards in the order of a dictionary, what begins any row begins the one before it.
    for i in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        same = bool(rows) and rows[-1][: len(inputs[i])] == inputs[i]
        if not same or _stretched(config, rows[-1]) != _stretched(config, inputs[i]):
            rows.append(inputs[i])
        owners[i] = len(rows) - 1
    goals = (list(continuation) for _, continuation in pairs)
    return rows, [
        _Place(row, len(ids), goal) for row, ids, goal in zip(owners, inputs, goals, strict=True)
    ]


def _trained(config: ModelConfig) -> int | None:
    """The length beyond which rotary frequencies depend on that of the sequence; None: nowhere."""
    ropes = [r for r in (config.rope, config.local_rope) if r and r.kind in ("dynamic", "longrope")]
    lengths = [rope.original_max_positions or config.max_positions for rope in ropes]
    return min(lengths, default=None)


def _stretched(config: ModelConfig, row: Sequence[int]) -> int:
    """What a row's frequencies depend on; rows that differ in it cannot be read together."""
    trained = _trained(config)
    if trained is None or len(row) <= trained:
        return 0
    dynamic = any(r is not None and r.kind == "dynamic" for r in (config.rope, config.local_rope))
    return len(row) if dynamic else 1


def _batches(
    config: ModelConfig, rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[list[int]]:
    """Numbers of rows that are read together: the longest first, those of about one length."""
    groups: dict[int, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        groups.setdefault(_stretched(config, rows[i]), []).append(i)
    for group in groups.values():
        yield from (group[i : i + batch_size] for i in range(0, len(group), batch_size))


def _filled(
    config: ModelConfig, rows: Sequence[Sequence[int]], count: int, most: int
) -> Int[Array, "b s"]:
    """Rows filled up on the right, and with rows of zeros to ``count``: few shapes are compiled."""
    longest, trained = len(rows[0]), _trained(config)
    width = min(bucket(longest), most)
    if _stretched(config, rows[0]) > 1:
        width = longest
    elif trained is not None and longest <= trained:
        width = min(width, trained)
    tokens = np.zeros((count, width), np.int32)
    for line, row in zip(tokens, rows, strict=False):
        line[: len(row)] = row
    return jnp.asarray(tokens)


def _scored(
    config: ModelConfig,
    params: Any,
    tokens: Int[Array, "b s"],
    members: Sequence[tuple[int, int]],
    places: Sequence[_Place],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Reads a batch; yields numbers of pairs, log-likelihoods, and whether a token is the best.

    ``members`` are the batch's rows and the pairs that stand in them.
    """
    table = np.array(
        [
            (line, column, target, i)
            for line, i in members
            for column, target in enumerate(
                places[i].targets, places[i].end - len(places[i].targets)
            )
        ],
        np.int32,
    )
    with jax.default_matmul_precision("highest"):
        x = _hidden(config, params, tokens)
        for start in range(0, len(table), CHUNK):
            part = table[start : start + CHUNK]
            # A last, shorter part is filled up: another shape would be compiled again.
            filled = np.pad(part, ((0, CHUNK - len(part)), (0, 0)), mode="edge")
            row, column, target = map(jnp.asarray, filled.T[:3])
            found, best = _judged(config, params, _picked(x, row, column), target)
            count = len(part)
            yield part[:, 3], np.asarray(found, np.float64)[:count], np.asarray(best)[:count]


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config: ModelConfig, params: Any, tokens: Int[Array, "b s"]) -> Float[Array, "b s m"]:
    x: Any = Transformer(config).apply({"params": params}, tokens, method=Transformer.hidden)
    return x


@jax.jit
def _picked(
    x: Float[Array, "b s m"], rows: Int[Array, "n"], columns: Int[Array, "n"]
) -> Float[Array, "n m"]:
    return x[rows, columns]


@functools.partial(jax.jit, static_argnums=0)
def _judged(
    config: ModelConfig, params: Any, x: Float[Array, "n m"], targets: Int[Array, "n"]
) -> tuple[Float[Array, "n"], Bool[Array, "n"]]:
    """Log-likelihood of the target behind each position, and whether it is the likeliest token."""
    found: Any = Transformer(config).apply({"params": params}, x[None], method=Transformer.unembed)
    logits = found[0]
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    best = jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets
    return chosen - jax.nn.logsumexp(logits, axis=-1), best
