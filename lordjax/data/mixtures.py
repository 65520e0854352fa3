"""Mixtures of data: ``a.txt:0.5,b/:0.5`` says which data, and which share of the windows of each.

Windows of the parts are interleaved so that every beginning, every k-th window (k up to 8) and
every evenly spread subset holds the parts in proportion, to within a few windows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

_TOLERANCE = 1e-6  # of the sum of the shares
_STRIDES = range(1, 9)  # every k-th window of these k holds the parts in proportion
# Weight of the windows so far, against 1 of every k-th: so that no part is used up early.
_SO_FAR = 2
_EXPECTED = "expected PATH, or a list such as PATH:0.5,PATH:0.5"


class Part(NamedTuple):
    """A part of a mixture.

    Attributes:
      source: a path, or a word that stands for data.
      share: share of the windows, in (0, 1].
    """

    source: str
    share: float


def parse(text: str, words: Collection[str] = ()) -> list[Part]:
    """Reads the parts of a mixture.

    A text, or a part of it, that exists as a path is that path, whatever commas and colons it has.
    Parts without shares get equal shares.

    Args:
      text: the mixture.
      words: words that stand for data and are no paths.

    Returns:
      One part or more; the shares sum to 1.

    Raises:
      ValueError: if a part is empty or given twice, only some parts have shares, a share is not
        positive, or the shares do not sum to 1.
    """
    if text in words or _exists(text):
        return [Part(_expanded(text, words), 1.0)]
    found = [_part(piece, text, words) for piece in text.split(",")]
    sources = [source for source, _ in found]
    for source in sources:
        if sources.count(source) > 1:
            raise ValueError(f"{text}: {source} is given twice; give every part once")
    shares = [share for _, share in found if share is not None]
    if not shares:
        return [Part(source, 1 / len(found)) for source in sources]
    without = [source for source, share in found if share is None]
    if without:
        raise ValueError(
            f"{text}: {without[0]} has no share, but others have; give every part a share or none"
        )
    if abs(math.fsum(shares) - 1) > _TOLERANCE:
        raise ValueError(f"{text}: the shares sum to {math.fsum(shares):.6g}; expected 1")
    return [Part(source, share) for source, share in zip(sources, shares, strict=True)]


def _part(piece: str, text: str, words: Collection[str]) -> tuple[str, float | None]:
    """Reads a part; returns its source, and its share if it has one."""
    if not piece:
        raise ValueError(f"{text}: a part is empty; {_EXPECTED}")
    if piece in words or ":" not in piece or _exists(piece):
        return _expanded(piece, words), None
    source, _, number = piece.rpartition(":")
    try:
        share = float(number)
    except ValueError as error:
        raise ValueError(
            f"{piece}: no such file or directory, and {number!r} is no share; {_EXPECTED}"
        ) from error
    if not source or not 0 < share <= 1:
        raise ValueError(
            f"{piece}: share {number} of {source!r}; expected a path, and a share in (0, 1]"
        )
    return _expanded(source, words), share


def _exists(source: str) -> bool:
    return os.path.exists(os.path.expanduser(source))


def _expanded(source: str, words: Collection[str]) -> str:
    """Returns a source with its ``~``, which a shell expands at the beginning only."""
    return source if source in words else os.path.expanduser(source)


def window_counts(parts: Sequence[Part], samples: int) -> list[int]:
    """Returns the windows of each part: shares of ``samples``, rounded by largest remainder.

    Every part gets at least one window.

    Raises:
      ValueError: if there are fewer windows than parts.
    """
    if samples < len(parts):
        raise ValueError(
            f"{samples} calibration windows for {len(parts)} parts; expected at least one each "
            "(--samples)"
        )
    exact = np.array([part.share * samples for part in parts])
    counts = np.maximum(np.floor(exact + _TOLERANCE).astype(int), 1)
    while counts.sum() < samples:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > samples:  # small parts were raised to one window
        counts[np.argmin(np.where(counts > 1, exact - counts, np.inf))] -= 1
    return counts.tolist()


def interleaved(counts: Sequence[int]) -> np.ndarray:
    """Returns an order of windows that spreads the parts evenly.

    At every place the part is next that the windows so far hold too little of: those before it, and
    of those every k-th, for every k up to 8.

    Args:
      counts: windows of every part.

    Returns:
      ``[n]`` part of every window.
    """
    total = sum(counts)
    shares, left = np.array(counts) / total, np.array(counts)
    got = {k: np.zeros((k, len(counts))) for k in _STRIDES}
    order = np.empty(total, int)
    for i in range(total):
        seen = {k: got[k][i % k] for k in _STRIDES}
        missing = _SO_FAR * (shares * (i + 1) - seen[1])
        for row in seen.values():
            missing += shares * (row.sum() + 1) - row
        part = int(np.argmax(np.where(left > 0, missing, -np.inf)))
        order[i] = part
        left[part] -= 1
        for row in seen.values():
            row[part] += 1
    return order
