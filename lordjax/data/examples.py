"""Training and validation examples, and the order in which training reads them.

Examples are held out by document: a hash of the seed and the document's text decides. So the same
document is always on the same side, wherever it stands and whatever data is added, and no document
is on both sides. A document is a file or a line of jsonl for packed text, a row for an array of
token ids, the first question for instructions, and the sentence or pair for classification.
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
from lordjax.data.record_files import FIELD
from lordjax.models.config import ModelConfig

VALIDATION = 0.05  # fraction of the documents that is held out
# Lengths are rounded up to this multiple, for few compiled shapes and full tiles.
_MULTIPLE = 64


class Examples(NamedTuple):
    """A batch of inputs and targets.

    Attributes:
      tokens: ``[n, L]`` int32 token ids.
      targets: ``[n, L]`` int32 token ids; a causal model's target at i is the token at i+1. For a
        classifier, ``[n, 1]`` classes. -1 means no target.
      mask: ``[n, L]``, False at padding; None if nothing is padded.
      token_types: ``[n, L]`` int32; None if all are 0.
      top_ids: ``[n, L, k]`` int32, a teacher's most likely next tokens at every position; None
        without one. Read by rows, so that they need not be in memory.
      top_logs: ``[n, L, k + 1]`` float32, their log-probabilities, and that of all others.
    """

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray | None = None
    token_types: np.ndarray | None = None
    top_ids: Any = None
    top_logs: Any = None

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.tokens)

    def rows(self, indices: Any) -> Examples:
        """Returns the examples at some indices, or where a Boolean array ``[n]`` is True."""
        arrays = {name: a for name, a in self._asdict().items() if a is not None}
        return self._replace(**{name: a[indices] for name, a in arrays.items()})


class Data(NamedTuple):
    """Training and validation examples, and facts about them.

    Attributes:
      train: examples to train on.
      validation: held-out examples; may be empty.
      facts: source, counts, settings and checksums, for a report.
    """

    train: Examples
    validation: Examples
    facts: dict[str, Any]


def fingerprint(examples: Examples) -> str:
    """Returns the SHA-256 of the arrays (little-endian, C order), each after its name and shape."""
    digest = hashlib.sha256()
    for name, array in examples._asdict().items():
        if array is not None:
            digest.update(f"{name}{list(array.shape)}".encode())
            kind = "<f4" if np.issubdtype(array.dtype, np.floating) else "<i4"
            digest.update(np.ascontiguousarray(array, dtype=kind).tobytes())
    return digest.hexdigest()


def check(config: ModelConfig, examples: Examples) -> None:
    """Checks that examples fit a model.

    Args:
      config: the model's architecture.
      examples: the examples.

    Raises:
      ValueError: if the examples are longer than the model's positions, or a token id, class or
        token type is out of the model's range.
    """
    length, classes = examples.tokens.shape[1], config.num_classes
    if length > config.max_positions:
        raise ValueError(
            f"examples of {length} tokens, but the model has {config.max_positions} positions; "
            "give a shorter length (--seq-len)"
        )
    token_windows.check_ids(examples.tokens, config.vocab_size, "examples")
    if (classes is None) != (examples.targets.shape[1] == length):
        raise ValueError(
            f"targets {list(examples.targets.shape)} for a model with head {config.head!r}; "
            "expected a token id per position, or for a classifier one class per example"
        )
    limit, last = classes or config.vocab_size, int(examples.targets.max(initial=-1))
    if last >= limit:
        raise ValueError(f"target {last}; expected 0 to {limit - 1}, the model's outputs")
    types = 0 if examples.token_types is None else int(examples.token_types.max(initial=0))
    if types and types >= config.token_types:
        raise ValueError(
            f"token type {types}; expected less than {config.token_types}, the model's number of "
            "token types (was the text read with another model's tokenizer?)"
        )


def batch_indices(count: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Returns the indices of the examples that a step reads, a function of the step number.

    The permutations of all epochs, ``np.random.default_rng([seed, epoch]).permutation(count)``, are
    concatenated to one stream. Step k reads the positions k·batch to (k+1)·batch of this stream.

    Args:
      count: number of examples.
      batch: examples per step; may exceed ``count``.
      step: number of the step, from 0.
      seed: seed of the order.

    Returns:
      ``[batch]`` indices of examples.

    Raises:
      ValueError: if ``count`` or ``batch`` is below 1, or the step or seed is negative.
    """
    if count < 1 or batch < 1 or step < 0 or seed < 0:
        raise ValueError(
            f"{count} examples, batches of {batch}, step {step}, seed {seed}; "
            "expected 1 or more examples, batches of 1 or more, and no negative step or seed"
        )
    places = np.arange(step * batch, (step + 1) * batch)
    epochs = places // count
    order = {int(epoch): _permutation(count, int(epoch), seed) for epoch in np.unique(epochs)}
    return np.concatenate([order[e][places[epochs == e] % count] for e in order])


@functools.lru_cache(maxsize=2)  # a step usually reads one epoch or two
def _permutation(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def split_documents(
    texts: Sequence[str | bytes], *, share: float = VALIDATION, seed: int = 0
) -> np.ndarray:
    """Chooses the documents that are held out, by a hash of the seed and the text.

    A document is held out if its hash is below ``share`` of the range. At least the document with
    the smallest hash is held out, and never the one with the largest.

    Args:
      texts: the documents; equal documents are on the same side.
      share: expected fraction that is held out, in [0, 1); 0 holds out none.
      seed: seed of the hash; another seed holds out other documents.

    Returns:
      ``[n]`` Booleans, True where a document is held out.

    Raises:
      ValueError: if ``share`` is out of range, or there are not two different documents.
    """
    if not 0 <= share < 1:
        raise ValueError(f"validation share {share}; expected 0 or more and below 1")
    if not share:
        return np.zeros(len(texts), bool)
    hashes = np.array([_hash(text, seed) for text in texts], np.uint64)
    if len(np.unique(hashes)) < 2:
        raise ValueError(
            f"{len(texts)} document(s), not two different ones, so none can be held out; give "
            "separate validation data, or a validation share of 0"
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
    field: str = FIELD,
) -> Data:
    """Reads text or code for a causal language model, packed into windows of equal length.

    Args:
      path: text files, files of records, directories or a ``.npy`` array; see
        `token_windows.load_tokens`.
      tokenizer: converts text to token ids; not needed for an array.
      seq_len: tokens per window.
      vocab_size: size of the vocabulary; every token id must be below it.
      share: fraction of the documents that is held out; 0 leaves `Data.validation` empty.
      seed: seed of the split.
      field: name of the text in a record.

    Returns:
      Training and validation examples.

    Raises:
      FileNotFoundError: if the path does not exist.
      ValueError: if the contents are not as described, there are not two different documents to
        split, or one side has fewer tokens than a window; says where.
    """
    paths, where = located(path)
    own: dict[str, Any] = {"seq_len": seq_len, "vocab_size": vocab_size}
    if len(paths) == 1 and paths[0].suffix == ".npy":
        tokens = token_windows.load_tokens(path, tokenizer=None, **own)
        texts: list[Any] = [row.tobytes() for row in tokens]
        held = split_documents(texts, share=share, seed=seed)
        sides = [tokens[~held], tokens[held]]
    else:
        texts = [text for text in documents(path, field=field) if text]
        held = split_documents(texts, share=share, seed=seed)
        sides = [np.zeros((0, seq_len), np.int32)] * 2
        for i, part in enumerate(("training", "validation")):
            chosen = [text for text, h in zip(texts, held, strict=True) if h == i]
            if chosen or not i:
                name = f"{where} ({part} documents)"
                sides[i] = token_windows.windows(chosen, tokenizer, where=name, **own)
    train, validation = (Examples(t, next_tokens(t, np.ones(t.shape, bool))) for t in sides)
    counts = {"train": int((~held).sum()), "validation": int(held.sum())}
    facts = {"source": where, "documents": counts, "share": share, "seed": seed}
    return described(train, validation, facts)


def next_tokens(tokens: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns a causal model's targets: at i the token at i+1 if it is ``wanted``, else -1."""
    targets = np.full(tokens.shape, -1, np.int32)
    targets[:, :-1] = np.where(wanted[:, 1:], tokens[:, 1:], -1)
    return targets


def pad(rows: Sequence[Sequence[int]], seq_len: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Stacks rows and pads them on the right with 0.

    Args:
      rows: token ids of each row.
      seq_len: largest number of tokens of a row; longer rows are truncated.

    Returns:
      ``[n, L]`` int32 token ids, and the mask ``[n, L]``, False at padding (None if nothing is
      padded). L is the longest length, rounded up to a multiple of 64, and at most ``seq_len``.
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
    """Splits examples by their documents ``texts [n]``; arguments as for `split_documents`."""
    held = split_documents(texts, share=share, seed=seed)
    facts = {**facts, "share": share, "seed": seed}
    return described(examples.rows(~held), examples.rows(held), facts)


def described(train: Examples, validation: Examples, facts: Mapping[str, Any]) -> Data:
    """Adds counts, length and checksums to ``facts``, and returns all as `Data`."""
    splits = {"train": train, "validation": validation}
    own = {
        "examples": {name: split.size for name, split in splits.items()},
        "seq_len": train.tokens.shape[1],
        "sha256": {name: fingerprint(split) for name, split in splits.items()},
    }
    return Data(train, validation, {**facts, **own})
