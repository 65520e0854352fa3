"""Targets of every head, from token ids ``[n, len]`` and a mask that is False at padding."""

from __future__ import annotations

import zlib

import numpy as np

SHARE = 0.15  # share of a sequence's tokens that are masked, as in BERT's training
NO_TARGET = -1  # see `models.objective`: it means something else for classes
PADDING = -2  # heads that take the model's own decisions: there is no target


def masked_positions(tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Returns True at `SHARE` of every sequence's tokens, at least one; never at padding."""
    chosen = np.zeros(tokens.shape, bool)
    for i, sequence in enumerate(tokens):
        places = np.arange(len(sequence)) if mask is None else np.flatnonzero(mask[i])
        seed = zlib.crc32(np.ascontiguousarray(sequence[places], "<i4").tobytes())
        count = max(1, round(SHARE * len(places)))
        chosen[i, np.random.default_rng(seed).permutation(places)[:count]] = True
    return chosen


def masked_tokens(tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Returns the tokens that are masked, and no target elsewhere."""
    return np.where(masked_positions(tokens, mask), tokens, np.asarray(NO_TARGET, tokens.dtype))


def next_tokens(tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Returns the token after each one; the last one has no target."""
    counts = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask)
    counts = counts & np.roll(counts, -1, axis=1)
    counts[:, -1] = False
    return np.where(counts, np.roll(tokens, -1, axis=1), np.asarray(NO_TARGET, tokens.dtype))


def own_class(tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Returns that each sequence's target is the model's own class."""
    del mask
    return np.full((len(tokens), 1), NO_TARGET, np.int32)


def own_classes(tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Returns that each token's target is the model's own class; padding has none."""
    own = np.full(tokens.shape, NO_TARGET, np.int32)
    return own if mask is None else np.where(mask, own, np.int32(PADDING))


def own_span(tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Returns that start and end of the answer are the model's own."""
    del mask
    return np.full((len(tokens), 2), NO_TARGET, np.int32)
