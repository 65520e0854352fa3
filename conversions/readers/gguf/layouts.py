"""Turns tensors from llama.cpp's layout into Hugging Face's.

Every function takes the values of a tensor and the numbers of heads, and returns the values in
Hugging Face's layout. `INVERSES` do what llama.cpp's ``convert_hf_to_gguf.py`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Heads(NamedTuple):
    """Numbers of query heads and of key/value heads."""

    queries: int
    keys: int


def query_halves(values: np.ndarray, heads: Heads) -> np.ndarray:
    """Moves the rows of a rotary pair of queries from neighbours to half a head apart."""
    return _halves(values, heads.queries)


def key_halves(values: np.ndarray, heads: Heads) -> np.ndarray:
    """Moves the rows of a rotary pair of keys from neighbours to half a head apart."""
    return _halves(values, heads.keys)


def _halves(values: np.ndarray, heads: int) -> np.ndarray:
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])  # [head, pair, first/second, in]
    return pairs.swapaxes(1, 2).reshape(values.shape)


def by_head(values: np.ndarray, heads: Heads) -> np.ndarray:
    """Sorts the rows of all queries, all keys, all values by head: q, k and v of the first one."""
    parts = values.reshape(3, heads.queries, -1, *values.shape[1:])
    return parts.swapaxes(0, 1).reshape(values.shape)


def transposed(values: np.ndarray, heads: Heads) -> np.ndarray:
    """Transposes a matrix; GPT-2's are ``[in, out]``."""
    del heads
    return values.T


def minus_one(values: np.ndarray, heads: Heads) -> np.ndarray:
    """Subtracts the 1 that Gemma's norms add to their scale."""
    del heads
    return values - np.float32(1)


def _neighbours(values: np.ndarray, heads: int) -> np.ndarray:
    halves = values.reshape(heads, 2, -1, *values.shape[1:])  # [head, first/second, pair, in]
    return halves.swapaxes(1, 2).reshape(values.shape)


# Layout -> what turns Hugging Face's values into llama.cpp's.
INVERSES: dict[Callable[..., np.ndarray], Callable[[np.ndarray, Heads], np.ndarray]] = {
    query_halves: lambda values, heads: _neighbours(values, heads.queries),
    key_halves: lambda values, heads: _neighbours(values, heads.keys),
    minus_one: lambda values, heads: values + np.float32(1),
}
