"""Rows that grow longer than the model was trained on, where rotary frequencies change (LongRoPE).

A row's frequencies depend on its own length. So at the token that makes a row longer than the
trained length, its cached keys and values belong to other frequencies, and they are computed again,
once. Every answer is then that of passes over the whole row, without a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from lordjax.generation.cached_model import hidden
from lordjax.generation.prompt_batch import bucket
from lordjax.models.config import ModelConfig
from lordjax.models.rope import trained_length
from lordjax.models.transformer import default_positions


def row_positions(
    config: ModelConfig, tokens: Int[Array, "b s"], lengths: Int[Array, "b"]
) -> Int[Array, "#b s"]:
    """Returns positions of padded rows; padding repeats the last one where lengths matter."""
    positions = default_positions(tokens)
    if trained_length((config.rope, config.local_rope), config.max_positions) is None:
        return positions
    return jnp.minimum(positions, lengths[:, None] - 1)


class LongRows:
    """The texts of a batch, and the step at which each outgrows the trained length.

    Args:
      config: the model.
      params: its parameters.
      rows: token ids of every row so far.
    """

    def __init__(self, config: ModelConfig, params: Any, rows: Sequence[Sequence[int]]):
        self._config, self._params = config, params
        self._rows = [list(row) for row in rows]
        self._open = [True] * len(self._rows)  # rows that have not ended
        self._trained = trained_length((config.rope, config.local_rope), config.max_positions)

    def append(self, tokens: np.ndarray) -> None:
        """Appends new tokens ``[b, n]`` to the rows; negative ones are none."""
        for i, new in enumerate(tokens.tolist()):
            self._rows[i] += [token for token in new if token >= 0]
            self._open[i] = new[-1] >= 0

    def keep(self, places: np.ndarray) -> None:
        """Keeps the rows at these places of the batch only."""
        self._rows = [self._rows[i] for i in places]
        self._open = [self._open[i] for i in places]

    def steps(self, most: int) -> int:
        """Returns how many tokens can be decoded before a row outgrows the trained length."""
        if self._trained is None:
            return most
        rows = [row for row, own in zip(self._rows, self._open, strict=True) if own]
        return min([most, *(n for row in rows if (n := self._trained + 1 - len(row)) > 0)])

    def renewed(self, cache: Any) -> Any:
        """Returns the cache after the rows that have just outgrown the length are read again."""
        crossed = [
            own and len(row) - 1 == self._trained
            for row, own in zip(self._rows, self._open, strict=True)
        ]
        return renewed(self._config, self._params, cache, self._rows, crossed)


def renewed(
    config: ModelConfig,
    params: Any,
    cache: Any,
    rows: Sequence[Sequence[int]],
    wanted: Sequence[bool],
) -> Any:
    """Returns a cache in which some rows are computed again, all of their tokens at once.

    Args:
      config: the model.
      params: its parameters.
      cache: keys and values of every layer.
      rows: token ids of every row.
      wanted: whether a row is computed again.
    """
    if not any(wanted):
        return cache
    lengths = np.array([len(row) for row in rows], np.int32)
    longest = max(n for n, own in zip(lengths.tolist(), wanted, strict=True) if own)
    capacity = jax.tree.leaves(cache)[0].shape[2]
    tokens = np.zeros((len(rows), min(bucket(longest), capacity)), np.int32)
    for line, row, own in zip(tokens, rows, wanted, strict=True):
        if own:
            line[: len(row)] = row
    given = jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(wanted)
    return _renewed(params, cache, *given, config=config)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _renewed(
    params: Any,
    cache: Any,
    tokens: Int[Array, "b s"],
    lengths: Int[Array, "b"],
    wanted: Bool[Array, "b"],
    *,
    config: ModelConfig,
) -> Any:
    _, fresh = hidden(config, params, tokens, row_positions(config, tokens, lengths), None)

    def put(old: Array, new: Array) -> Array:
        own = wanted[:, None, None, None]
        head = jnp.where(own, new.astype(old.dtype), old[:, :, : new.shape[2]])
        return old.at[:, :, : new.shape[2]].set(head)

    return jax.tree.map(put, cache, fresh)
