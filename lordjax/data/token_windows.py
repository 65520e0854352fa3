"""Token windows for calibration and evaluation, from text, source trees, jsonl or arrays.

A *document* is one text file, one line of a ``.jsonl`` file, or one entry of a list. Documents are
tokenized one by one without special tokens and joined by the tokenizer's end-of-text token (two
line breaks if it has none). The tokens are cut into windows of equal length; a last, shorter window
is dropped. The same arguments always give the same ids.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lordjax.data.documents import documents, located, walk

# Folders of the standard library without hand-written code: tests, packages, generated tables.
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
)
# More characters than the average token of any usual text has. Only this many characters per
# wanted token are tokenized first.
_CHARS_PER_TOKEN = 16


class Tokenizer(Protocol):
    """The required interface of a tokenizer; every Hugging Face tokenizer has it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Returns the token ids of ``text``."""
        ...


def load_tokens(
    path: str | Path | Sequence[Path],
    *,
    tokenizer: Tokenizer | None,
    seq_len: int,
    vocab_size: int,
    samples: int | None = None,
    document_tokens: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Reads windows of token ids.

    Args:
      path: a text file, a ``.jsonl`` file with ``text``, a directory of text or source files
        (recursively, those with a suffix of `documents.TEXT_SUFFIXES`, not hidden), a list of such
        files, or a ``.npy`` array of integer ids ``[n, len]`` with len ≥ ``seq_len``.
      tokenizer: converts text to token ids; not needed for an array.
      seq_len: tokens per window, 2 or more.
      vocab_size: size of the vocabulary; every id must be below it.
      samples: largest number of windows; None reads all. If given, documents are read in a random
        order drawn with ``seed``; of an array, the first rows are read.
      document_tokens: use only this many first tokens of every document; None uses all.
      seed: seed of the order of the documents.

    Returns:
      ``[n, seq_len]`` int32 token ids, n ≥ 1; fewer than ``samples`` windows if the text is short.

    Raises:
      FileNotFoundError: if the path does not exist.
      ValueError: if the contents are not as described above; says where.
    """
    if seq_len < 2:
        raise ValueError(f"window length {seq_len}: expected 2 or more tokens")
    if samples is not None and samples < 1:
        raise ValueError(f"{samples} windows asked for; expected 1 or more")
    paths, where = located(path)
    if len(paths) == 1 and paths[0].suffix == ".npy":
        tokens = _from_array(paths[0], seq_len, samples)
        check_ids(tokens, vocab_size, where)
        return tokens.astype(np.int32)
    return windows(
        documents(path, None if samples is None else seed),
        tokenizer,
        seq_len=seq_len,
        vocab_size=vocab_size,
        samples=samples,
        document_tokens=document_tokens,
        where=where,
    )


def windows(
    texts: Iterable[str],
    tokenizer: Tokenizer | None,
    *,
    seq_len: int,
    vocab_size: int,
    samples: int | None = None,
    document_tokens: int | None = None,
    where: str = "text",
) -> np.ndarray:
    """Packs documents into windows of token ids.

    Args:
      texts: the documents.
      tokenizer: as for `load_tokens`.
      seq_len: as for `load_tokens`.
      vocab_size: as for `load_tokens`.
      samples: as for `load_tokens`.
      document_tokens: as for `load_tokens`.
      where: name of the documents in error messages.

    Returns:
      ``[n, seq_len]`` int32 token ids.

    Raises:
      ValueError: if there is no tokenizer or too little text, or an id is not in the vocabulary.
    """
    if tokenizer is None:
        raise ValueError(
            f"{where}: text needs a tokenizer, but the model has none; give a .npy array of token "
            "ids"
        )
    limit = None if samples is None else samples * seq_len
    tokens = np.asarray(_pack(texts, tokenizer, limit, document_tokens), np.int64)
    count = len(tokens) // seq_len
    if not len(tokens):
        raise ValueError(f"{where}: no text; all documents are empty")
    if not count:
        raise ValueError(
            f"{where}: {len(tokens)} tokens, fewer than one window of {seq_len}; "
            "give more text, or a shorter window (--seq-len)"
        )
    tokens = tokens[: count * seq_len].reshape(count, seq_len)
    check_ids(tokens, vocab_size, where)
    return tokens.astype(np.int32)


def check_ids(tokens: np.ndarray, vocab_size: int, where: str = "tokens") -> None:
    """Checks that token ids ``[n, len]`` are in the vocabulary.

    Raises:
      ValueError: if an id is negative or ≥ ``vocab_size``; names the first one and its position.
    """
    if int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size:
        return
    window, position = np.argwhere((tokens < 0) | (tokens >= vocab_size))[0]
    raise ValueError(
        f"{where}: token id {tokens[window, position]} at window {window}, position {position}; "
        f"expected 0 to {vocab_size - 1}, the model's vocabulary "
        "(were the ids made with another tokenizer?)"
    )


def fingerprint(tokens: np.ndarray) -> str:
    """Returns the SHA-256 of token ids (little-endian int32, C order); reports name data by it."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<i4").tobytes()).hexdigest()


def array_length(path: str | Path) -> int | None:
    """Returns the row length of a ``.npy`` array ``[n, len]``; None if ``path`` is no array."""
    path = Path(path)
    if path.suffix != ".npy" or not path.is_file():
        return None
    return _open_array(path).shape[1]


def standard_library(first: str = "a", last: str = "z") -> list[Path]:
    """Returns the source files of Python's standard library, a code corpus that is always there.

    Args:
      first: first letter of the first top-level module; private modules are left out.
      last: first letter of the last top-level module.

    Returns:
      Sorted paths, without tests, installed packages and generated tables.

    Raises:
      FileNotFoundError: if this Python installation has no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path
        for path in walk(root, frozenset({".py"}), _NOT_LIBRARY)
        if first <= path.relative_to(root).parts[0][0].lower() <= last
    )
    if not files:
        raise FileNotFoundError(
            f"{root}: this Python installation has no sources of the standard library; "
            "give a corpus with --calibration"
        )
    return files


def _open_array(path: Path) -> np.ndarray:
    expected = "expected a .npy array of integer token ids [n, len]"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); {expected}") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer) or not array.size:
        raise ValueError(f"{path}: {array.dtype} {list(array.shape)}; {expected}")
    return array


def _from_array(path: Path, seq_len: int, samples: int | None) -> np.ndarray:
    array = _open_array(path)
    if array.shape[1] < seq_len:
        raise ValueError(
            f"{path}: rows of {array.shape[1]} ids, fewer than one window of {seq_len}; "
            "give longer rows, or a shorter window (--seq-len)"
        )
    return np.array(array[:samples, :seq_len])


def _pack(
    texts: Iterable[str], tokenizer: Tokenizer, limit: int | None, document_tokens: int | None
) -> list[int]:
    """Returns the ids of the documents with a separator between them, at most ``limit`` ids."""
    end = getattr(tokenizer, "eos_token_id", None)
    separator = [end] if end is not None else tokenizer.encode("\n\n", add_special_tokens=False)
    tokens: list[int] = []
    for text in texts:
        if not text:
            continue
        wanted = [n for n in (document_tokens, limit and limit - len(tokens)) if n is not None]
        ids = _tokenize(tokenizer, text, min(wanted, default=None))
        tokens += (separator if tokens else []) + ids
        if limit is not None and len(tokens) >= limit:
            break
    return tokens[:limit]


def _tokenize(tokenizer: Tokenizer, text: str, wanted: int | None) -> list[int]:
    """Returns the first ``wanted`` ids of a text (None: all), without tokenizing much more."""
    if wanted is not None:
        head = text[: _CHARS_PER_TOKEN * wanted + 1024]
        ids = tokenizer.encode(head, add_special_tokens=False)
        # Cutting the text may change the last ids, but not those well before the cut.
        if len(head) == len(text) or len(ids) >= wanted + 32:
            return list(ids[:wanted])
    return list(tokenizer.encode(text, add_special_tokens=False))[:wanted]
