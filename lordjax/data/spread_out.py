"""Draws tokens from as many documents, and as many places of long documents, as possible.

With n documents and ``samples * seq_len`` tokens wanted, a document's fair share is wanted / n. No
document gives more than that, or than `FLOOR` tokens if these are more. Where the text would be too
short, the limit rises until it suffices. A document that may give two windows or more gives them in
pieces of about one window, spread evenly over it; so a single long file gives every window from
another place. Documents are tokenized when they are drawn, so a large corpus costs little.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lordjax.data.documents import Corpus
from lordjax.data.tokenizing import Tokenizer, first_ids, separator

FLOOR = 256  # tokens that a document may always give
_RISE = 8  # the limit rises by this fraction of itself at least, so that few rounds are needed
_SEARCHED = 8  # a piece may begin this fraction of the distance between pieces later, at a new line


class Drawn(NamedTuple):
    """Token ids, and the number of documents that they come from."""

    tokens: list[int]
    documents: int


def draw(corpus: Corpus, tokenizer: Tokenizer, *, seq_len: int, samples: int, seed: int) -> Drawn:
    """Draws token ids for windows, in a random order of the documents.

    Args:
      corpus: the documents.
      tokenizer: converts text to token ids.
      seq_len: tokens of a window.
      samples: number of windows.
      seed: seed of the order of the documents.

    Returns:
      At most ``samples * seq_len`` ids; fewer if all of the text is shorter.

    Raises:
      ValueError: if a document cannot be read; says where.
    """
    wanted = samples * seq_len
    order = np.random.default_rng(seed).permutation(len(corpus)).tolist()
    limit = min(max(FLOOR, -(-wanted // max(len(corpus), 1))), wanted)
    while True:
        drawn, limited = _draw(corpus, order, tokenizer, seq_len, wanted, limit)
        missing = wanted - len(drawn.tokens)
        if missing <= 0 or not limited:
            return drawn
        # What is missing is shared by the documents that have more, as far as is known.
        limit = max(limit + -(-missing // limited), limit + limit // _RISE)


def _draw(
    corpus: Corpus, order: list[int], tokenizer: Tokenizer, seq_len: int, wanted: int, limit: int
) -> tuple[Drawn, int]:
    """Draws with a limit of tokens per document; also returns how many documents reached it."""
    # Pieces of a single document are whole windows, so nothing has to separate them.
    between = separator(tokenizer) if len(order) > 1 else []
    tokens: list[int] = []
    count = limited = 0
    for i in order:
        pieces = _pieces(corpus.text(i), tokenizer, limit, max(1, limit // seq_len))
        for piece in pieces:
            tokens += (between if tokens else []) + piece
        count += bool(pieces)
        limited += sum(map(len, pieces)) >= limit
        if len(tokens) >= wanted:
            break
    return Drawn(tokens[:wanted], count), limited


def _pieces(text: str, tokenizer: Tokenizer, limit: int, count: int) -> list[list[int]]:
    """Returns ``limit`` ids of a text or a few more, in pieces; all ids if there are less."""
    if count < 2:
        return [first_ids(tokenizer, text, limit)] if text else []
    length = -(-limit // count)
    edges = np.linspace(0, len(text), count + 1).astype(int).tolist()
    starts = [0, *(_line_start(text, edge, edges[1] // _SEARCHED) for edge in edges[1:-1])]
    pieces = [
        first_ids(tokenizer, text[start:end], length)
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True)
    ]
    if all(len(piece) == length for piece in pieces):
        return pieces
    # There is little more text than is wanted, or nothing more.
    ids = first_ids(tokenizer, text, None)
    whole = len(ids) // length
    if whole <= count:
        return [ids[:limit]] if ids else []
    chosen = np.linspace(0, whole - 1, count).round().astype(int).tolist()
    return [ids[i * length : (i + 1) * length] for i in chosen]


def _line_start(text: str, place: int, most: int) -> int:
    """Returns the first start of a line, or else of a word, within ``most`` characters."""
    for mark in ("\n", " "):
        found = text.find(mark, place, place + most)
        if found >= 0:
            return found + 1
    return place
