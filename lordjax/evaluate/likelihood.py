"""Log-likelihood of a continuation after its context.

The log-likelihood is the sum over the tokens of the continuation::

    log p(continuation | context) = Σ_i log p(token_i | context, tokens before i)

A causal model does not see the tokens after a position. So rows are padded on the right to a few
widths (`bucket`), each of which is compiled once. A row that is the beginning of
another row is read as part of it, so choices of one token cost nothing. Logits are computed only
where a continuation is predicted. Logits are float32, matrix products are in full float32
precision, and sums are float64 on the host.
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
from lordjax.models.rope import trained_length
from lordjax.models.transformer import Transformer
from lordjax.runtime.progress import Progress

BATCH = 16  # default number of rows of a forward pass
CHUNK = 128  # positions whose logits are in memory at once

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of its continuation


class Score(NamedTuple):
    """The score of a continuation.

    Attributes:
      log_likelihood: log-likelihood in nats, summed over the tokens.
      greedy: whether every token is the likeliest one at its position.
    """

    log_likelihood: float
    greedy: bool


class _Place(NamedTuple):
    """Where a continuation is predicted.

    Attributes:
      row: index of the row.
      end: end of the positions; they are the last ``len(targets)`` before it.
      targets: token ids of the continuation.
    """

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
    """Scores continuations.

    A pair that is too long is truncated at its start: the model reads the last ``max_length``
    tokens before the last token of the continuation.

    Args:
      config: architecture of a causal model.
      params: the model's parameters; leaves may be kernels of any kind.
      pairs: token ids of contexts and continuations, one id or more in each.
      batch_size: rows of a forward pass; changes the result only by rounding.
      max_length: largest number of tokens the model reads; None: its longest sequence.
      progress: called with ("score", rows done, number of rows).

    Returns:
      The scores, in the order of the pairs.

    Raises:
      ValueError: if the model is not causal, a pair is empty, a continuation is longer than
        ``max_length``, a token id is not in the vocabulary, or a likelihood is not finite; names
        the pair.
    """
    if config.head != "causal" or not config.causal:
        raise ValueError(
            f"a model with head {config.head!r} predicts no next token; expected a causal model"
        )
    most = config.max_positions if max_length is None else max_length
    if batch_size < 1 or not 1 <= most <= config.max_positions:
        raise ValueError(
            f"batch size {batch_size}, sequences of {most} tokens; expected 1 or more, and 1 to "
            f"{config.max_positions}, the model's longest sequence"
        )
    rows, places = _merge_rows(config, pairs, most)
    # Move the weights to the device once, not in every call.
    params = jax.tree.map(jnp.asarray, params)
    sums, greedy = np.zeros(len(places)), np.ones(len(places), bool)
    at: dict[int, list[int]] = {}
    for i, place in enumerate(places):
        at.setdefault(place.row, []).append(i)
    done = 0
    for numbers in _batches(config, rows, batch_size):
        members = [(line, i) for line, row in enumerate(numbers) for i in at[row]]
        tokens = _padded(config, [rows[row] for row in numbers], min(batch_size, len(rows)), most)
        for owners, found, best in _score_batch(config, params, tokens, members, places):
            np.add.at(sums, owners, found)
            np.logical_and.at(greedy, owners, best)
        done += len(numbers)
        if progress is not None:
            progress("score", done, len(rows))
    _check_finite(sums)
    return [Score(float(s), bool(g)) for s, g in zip(sums, greedy, strict=True)]


def _check_finite(sums: np.ndarray) -> None:
    """Raises ValueError if a log-likelihood is not finite; names the first such pair."""
    if not np.isfinite(sums).all():
        first = int(np.flatnonzero(~np.isfinite(sums))[0])
        raise ValueError(
            f"pair {first}: log-likelihood is {sums[first]}, expected a finite number; the weights "
            "hold NaN, or activations overflow in the dtype of the embedding"
        )


def _merge_rows(
    config: ModelConfig, pairs: Sequence[Pair], most: int
) -> tuple[list[list[int]], list[_Place]]:
    """Returns the rows to read, none of which begins another, and the place of each pair."""
    inputs = []
    for i, (context, continuation) in enumerate(pairs):
        if not len(context) or not 1 <= len(continuation) <= most:
            raise ValueError(
                f"pair {i}: {len(context)} tokens of context, {len(continuation)} of continuation; "
                f"expected 1 or more, and 1 to {most}, the largest number that the model reads"
            )
        whole = [*context, *continuation]
        check_ids(np.asarray([whole]), config.vocab_size, f"pair {i}")
        inputs.append(whole[-(most + 1) :][:-1])
    rows: list[list[int]] = []
    owners = [0] * len(inputs)
    # In reverse lexicographic order, the beginning of any row directly follows such a row.
    for i in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        same = bool(rows) and rows[-1][: len(inputs[i])] == inputs[i]
        if not same or _rope_length(config, rows[-1]) != _rope_length(config, inputs[i]):
            rows.append(inputs[i])
        owners[i] = len(rows) - 1
    targets = (list(continuation) for _, continuation in pairs)
    found = zip(owners, inputs, targets, strict=True)
    return rows, [_Place(row, len(ids), target) for row, ids, target in found]


def _original_length(config: ModelConfig) -> int | None:
    """Returns the length above which rotary frequencies depend on the sequence's; None: never."""
    return trained_length((config.rope, config.local_rope), config.max_positions)


def _rope_length(config: ModelConfig, row: Sequence[int]) -> int:
    """Returns a key of a row's rotary frequencies; a batch has rows of one key only."""
    original = _original_length(config)
    if original is None or len(row) <= original:
        return 0
    dynamic = any(r is not None and r.kind == "dynamic" for r in (config.rope, config.local_rope))
    return len(row) if dynamic else 1


def _batches(
    config: ModelConfig, rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[list[int]]:
    """Yields the indices of rows that are read together: of similar length, longest first."""
    by_key: dict[int, list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        by_key.setdefault(_rope_length(config, rows[i]), []).append(i)
    for alike in by_key.values():
        yield from (alike[i : i + batch_size] for i in range(0, len(alike), batch_size))


def _padded(
    config: ModelConfig, rows: Sequence[Sequence[int]], count: int, most: int
) -> Int[Array, "b s"]:
    """Pads rows on the right, and adds rows of zeros up to ``count``, for few compiled shapes."""
    longest, original = len(rows[0]), _original_length(config)
    width = min(bucket(longest), most)
    if _rope_length(config, rows[0]) > 1:
        width = longest
    elif original is not None and longest <= original:
        width = min(width, original)
    tokens = np.zeros((count, width), np.int32)
    for line, row in zip(tokens, rows, strict=False):
        line[: len(row)] = row
    return jnp.asarray(tokens)


def _score_batch(
    config: ModelConfig,
    params: Any,
    tokens: Int[Array, "b s"],
    members: Sequence[tuple[int, int]],
    places: Sequence[_Place],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Scores every target token of a batch, in chunks.

    Args:
      config: the model's architecture.
      params: the model's parameters.
      tokens: the batch.
      members: indices of the batch's rows, each with a pair that is in it.
      places: where each pair is predicted.

    Yields:
      Indices of pairs, log-likelihoods of tokens, and whether each is the likeliest token.
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
            # Pad a last, shorter chunk: another shape would be compiled again.
            padded = np.pad(part, ((0, CHUNK - len(part)), (0, 0)), mode="edge")
            row, column, target = map(jnp.asarray, padded.T[:3])
            found, best = _score_tokens(config, params, _gather(x, row, column), target)
            count = len(part)
            yield part[:, 3], np.asarray(found, np.float64)[:count], np.asarray(best)[:count]


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config: ModelConfig, params: Any, tokens: Int[Array, "b s"]) -> Float[Array, "b s m"]:
    x: Any = Transformer(config).apply({"params": params}, tokens, method=Transformer.hidden)
    return x


@jax.jit
def _gather(
    x: Float[Array, "b s m"], rows: Int[Array, "n"], columns: Int[Array, "n"]
) -> Float[Array, "n m"]:
    return x[rows, columns]


@functools.partial(jax.jit, static_argnums=0)
def _score_tokens(
    config: ModelConfig, params: Any, x: Float[Array, "n m"], targets: Int[Array, "n"]
) -> tuple[Float[Array, "n"], Bool[Array, "n"]]:
    """Returns the log-likelihood of each target, and whether it is the likeliest token."""
    found: Any = Transformer(config).apply({"params": params}, x[None], method=Transformer.unembed)
    logits = found[0]
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    best = jnp.argmax(logits, axis=-1).astype(targets.dtype) == targets
    return chosen - jax.nn.logsumexp(logits, axis=-1), best
