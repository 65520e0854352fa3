"""Examples to train on and to hold out, and the order in which training reads them.

What is held out is decided document by document, from a hash of the seed and the document's text:
a document that is held out stays so, wherever it stands and whatever comes beside it, and no
document lies in both parts. A document is a file or a line of jsonl for packed text, a row for an
array of token ids, the first question for instructions, the sentence or pair for classification.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lordjax.data import token_windows
from lordjax.data.documents import documents, located
from lordjax.models.config import ModelConfig

VALIDATION = 0.05  # share of the documents that is held out
# Lengths are rounded up to a multiple of it: few shapes, and full tiles.
_MULTIPLE = 64


class Examples(NamedTuple):
    """What a model reads and what it is to answer.

    Attributes:
      tokens: ``[n, L]`` int32.
      targets: ``[n, L]`` int32 ids, of a causal model at i the token at i+1; ``[n, 1]`` classes of
        a classifier. -1 is no target.
      mask: ``[n, L]``, False at padding; None: nothing is padded.
      token_types: ``[n, L]`` int32; None: all are 0.
    """

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray | None = None
    token_types: np.ndarray | None = None

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.tokens)

    def rows(self, indices: Any) -> Examples:
        """Those of some numbers or a Boolean choice ``[n]``, in that order."""
        arrays = {name: a for name, a in self._asdict().items() if a is not None}
        return self._replace(**{name: a[indices] for name, a in arrays.items()})


class Data(NamedTuple):
    """Examples, and ``facts`` for a report: where they come from, counts, settings, checksums."""

    train: Examples
    validation: Examples
    facts: dict[str, Any]


def fingerprint(examples: Examples) -> str:
    """Sha256 of the arrays, little-endian in C order, each behind its name and shape."""
    digest = hashlib.sha256()
    for name, array in examples._asdict().items():
        if array is not None:
            digest.update(f"{name}{list(array.shape)}".encode())
            digest.update(np.ascontiguousarray(array, dtype="<i4").tobytes())
    return digest.hexdigest()


def check(config: ModelConfig, examples: Examples) -> None:
    """Verifies that a model can read examples and answer them.

    Raises:
      ValueError: if they are too long, or an id, a class or a token type is none of the model's.
    """
    length, classes = examples.tokens.shape[1], config.num_classes
    if length > config.max_positions:
        raise ValueError(
            f"examples of {length} tokens, but the model was made for {config.max_positions}; "
            "give a shorter length (--seq-len)"
        )
    token_windows.check_ids(examples.tokens, config.vocab_size, "examples")
    if (classes is None) != (examples.targets.shape[1] == length):
        raise ValueError(
            f"targets {list(examples.targets.shape)} for a model with head {config.head!r}; "
            "expected an id for every token, or of a classifier one class"
        )
    limit, last = classes or config.vocab_size, int(examples.targets.max(initial=-1))
    if last >= limit:
        raise ValueError(f"target {last}; expected 0 to {limit - 1}, what the model can answer")
    types = 0 if examples.token_types is None else int(examples.token_types.max(initial=0))
    if types and types >= config.token_types:
        raise ValueError(
            f"token type {types}, but the model has {config.token_types} "
            "(was the text read with another model's tokenizer?)"
        )


def batch_indices(count: int, batch: int, step: int, seed: int) -> np.ndarray:
    """The examples that a step reads; the step is all there is of a position in the data.

    The permutations of all epochs, ``np.random.default_rng([seed, epoch]).permutation(count)``, are
    one stream, of which step k takes the places from k·batch to (k+1)·batch.

    Args:
      count: number of examples.
      batch: examples a step; may be more than there are.
      step: number of the step, from 0.
      seed: of the order.

    Returns:
      ``[batch]`` numbers of examples.

    Raises:
      ValueError: if there are no examples, the batch is empty, or the step or seed negative.
    """
    if count < 1 or batch < 1 or step < 0 or seed < 0:
        raise ValueError(
            f"{count} examples, batches of {batch}, step {step}, seed {seed}; "
            "expected 1 or more examples and rows, and no negative step or seed"
        )
    places = np.arange(step * batch, (step + 1) * batch)
    epochs = places // count
    order = {int(epoch): _permutation(count, int(epoch), seed) for epoch in np.unique(epochs)}
    return np.concatenate([order[e][places[epochs == e] % count] for e in order])


@functools.lru_cache(maxsize=2)  # a step lies in one epoch or two
def _permutation(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def split_documents(
    texts: Sequence[str | bytes], *, share: float = VALIDATION, seed: int = 0
) -> np.ndarray:
    """Which documents are held out: those whose hash with the seed lies in the first ``share``.

    If there is none, the one with the smallest hash; if all are, all but the one with the largest.

    Args:
      texts: the documents; equal ones stay together.
      share: expected share, 0 to 1; 0: none.
      seed: another one holds out others.

    Returns:
      ``[n]``, True where held out.

    Raises:
      ValueError: if the share is none, or there are not two different documents.
    """
    if not 0 <= share < 1:
        raise ValueError(f"validation share {share}; expected 0 or more and below 1")
    if not share:
        return np.zeros(len(texts), bool)
    hashes = np.array([_hash(text, seed) for text in texts], np.uint64)
    if len(np.unique(hashes)) < 2:
        raise ValueError(
            f"{len(texts)} document(s), not two different ones, so none can be held out; give "
            "validation data of its own, or a validation share of 0"
        )
    # 53 bits, which a float holds exactly.
    held = (hashes < int(share * 2**53)) | (hashes == hashes.min())
    return held & (hashes < hashes.max())


def _hash(text: str | bytes, seed: int) -> int:
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(b"%d\n%b" % (seed, raw)).digest()[:8], "little") >> 11


def packed(
    path: str | Path | Sequence[Path],
    tokenizer: token_windows.Tokenizer | None,
    *,
    seq_len: int,
    vocab_size: int,
    share: float = VALIDATION,
    seed: int = 0,
) -> Data:
    """Text or code for a causal language model, in windows; see `data.load_tokens`.

    Args:
      path: as there.
      tokenizer: turns text into ids; not needed for an array.
      seq_len: length of a window.
      vocab_size: every id must be below it.
      share: of the documents that are held out; 0: none, and `Data.validation` is empty.
      seed: of the split.

    Raises:
      FileNotFoundError: if the path does not exist.
      ValueError: if the content is not what is described there, there are not two documents to
        split, or a part fills no window; says where.
    """
    paths, where = located(path)
    own: dict[str, Any] = {"seq_len": seq_len, "vocab_size": vocab_size}
    if len(paths) == 1 and paths[0].suffix == ".npy":
        tokens = token_windows.load_tokens(path, tokenizer=None, **own)
        texts: list[Any] = [row.tobytes() for row in tokens]
        held = split_documents(texts, share=share, seed=seed)
        parts = [tokens[~held], tokens[held]]
    else:
        texts = [text for text in documents(path) if text]
        held = split_documents(texts, share=share, seed=seed)
        parts = [np.zeros((0, seq_len), np.int32)] * 2
        for i, part in enumerate(("training", "validation")):
            chosen = [text for text, h in zip(texts, held, strict=True) if h == i]
            if chosen or not i:
                name = f"{where} ({part} documents)"
                parts[i] = token_windows.windows(chosen, tokenizer, where=name, **own)
    train, validation = (Examples(t, next_tokens(t, np.ones(t.shape, bool))) for t in parts)
    counts = {"train": int((~held).sum()), "validation": int(held.sum())}
    facts = {"source": where, "documents": counts, "share": share, "seed": seed}
    return described(train, validation, facts)


def next_tokens(tokens: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Targets of a causal model: at i the token at i+1 where that one is ``wanted``, else -1."""
    targets = np.full(tokens.shape, -1, np.int32)
    targets[:, :-1] = np.where(wanted[:, 1:], tokens[:, 1:], -1)
    return targets


def pad(rows: Sequence[Sequence[int]], seq_len: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows one below the other, filled up on the right with 0, which no token sees.

    Returns:
      ``[n, L]`` int32 and the mask, None if nothing is padded. L is the longest length, rounded up
      to a multiple of 64, and at most ``seq_len``; longer rows are cut.
    """
    longest = max(map(len, rows), default=1)
    length = min(seq_len, -(-longest // _MULTIPLE) * _MULTIPLE)
    out = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row[:length]
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(length) < lengths[:, None]
    return out, None if mask.all() else mask


def hold_out(
    examples: Examples, texts: Sequence[str], share: float, seed: int, facts: Mapping[str, Any]
) -> Data:
    """Examples in two parts by their documents ``[n]``; arguments as for `split_documents`."""
    held = split_documents(texts, share=share, seed=seed)
    facts = {**facts, "share": share, "seed": seed}
    return described(examples.rows(~held), examples.rows(held), facts)


def described(train: Examples, validation: Examples, facts: Mapping[str, Any]) -> Data:
    """The two parts, and facts that say what they are."""
    parts = {"train": train, "validation": validation}
    own = {
        "examples": {name: part.size for name, part in parts.items()},
        "seq_len": train.tokens.shape[1],
        "sha256": {name: fingerprint(part) for name, part in parts.items()},
    }
    return Data(train, validation, {**facts, **own})
