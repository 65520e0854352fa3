"""Token windows for calibration and evaluation, from text, source trees, records or arrays.

A *document* is one text file, one record of a file, or one entry of a list. Documents are tokenized
one by one without special tokens and joined by the tokenizer's end-of-text token (two line breaks
if it has none). The tokens are cut into windows of equal length; a last, shorter window is dropped.
The same arguments always give the same ids.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lordjax.data import spread_out
from lordjax.data.documents import Corpus, documents, located, walk
from lordjax.data.record_files import FIELD
from lordjax.data.tokenizing import Tokenizer, first_ids, separator
from lordjax.runtime.input_files import reading

# Folders of the standard library without hand-written code: tests, packages, generated tables.
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
)


class Windows(NamedTuple):
    """Windows of token ids, and how many documents they come from.

    Attributes:
      tokens: ``[n, seq_len]`` int32 token ids.
      documents: number of documents that were read; None for an array of token ids.
    """

    tokens: np.ndarray
    documents: int | None


def load_tokens(
    path: str | Path | Sequence[Path],
    *,
    tokenizer: Tokenizer | None,
    seq_len: int,
    vocab_size: int,
    samples: int | None = None,
    document_tokens: int | None = None,
    seed: int = 0,
    spread: bool = False,
    field: str = FIELD,
) -> np.ndarray:
    """Reads windows of token ids.

    Args:
      path: a text file, a file of records (``.jsonl``, ``.jsonl.gz`` or ``.parquet``), a directory
        of text or source files (recursively, those with a suffix of `documents.TEXT_SUFFIXES`, not
        hidden), a list of such files, or a ``.npy`` array of integer ids ``[n, len]`` with len ≥
        ``seq_len``.
      tokenizer: converts text to token ids; not needed for an array.
      seq_len: tokens per window, 2 or more.
      vocab_size: size of the vocabulary; every id must be below it.
      samples: largest number of windows; None reads all. If given, documents are read in a random
        order drawn with ``seed``; of an array, the first rows are read.
      document_tokens: use only this many first tokens of every document; None uses all, or with
        ``spread`` a fair share.
      seed: seed of the order of the documents.
      spread: take the windows from as many documents, and as many places of a long document, as
        possible; see `spread_out`. It needs ``samples``, and changes nothing where
        ``document_tokens`` is given or the path is an array.
      field: name of the text in a record.

    Returns:
      ``[n, seq_len]`` int32 token ids, n ≥ 1; fewer than ``samples`` windows if the text is short.

    Raises:
      FileNotFoundError: if the path does not exist.
      ValueError: if the contents are not as described above; says where.
    """
    return load_windows(
        path,
        tokenizer=tokenizer,
        seq_len=seq_len,
        vocab_size=vocab_size,
        samples=samples,
        document_tokens=document_tokens,
        seed=seed,
        spread=spread,
        field=field,
    ).tokens


def load_windows(
    path: str | Path | Sequence[Path],
    *,
    tokenizer: Tokenizer | None,
    seq_len: int,
    vocab_size: int,
    samples: int | None = None,
    document_tokens: int | None = None,
    seed: int = 0,
    spread: bool = False,
    field: str = FIELD,
) -> Windows:
    """Reads windows of token ids and counts their documents; arguments as for `load_tokens`.

    Raises:
      FileNotFoundError: if the path does not exist.
      ValueError: as `load_tokens`.
    """
    if seq_len < 2:
        raise ValueError(f"window length {seq_len}: expected 2 or more tokens")
    if samples is not None and samples < 1:
        raise ValueError(f"{samples} windows asked for; expected 1 or more")
    if spread and samples is None:
        raise ValueError("windows can be spread over the documents only if samples says how many")
    paths, where = located(path)
    if len(paths) == 1 and paths[0].suffix == ".npy":
        tokens = _from_array(paths[0], seq_len, samples)
        check_ids(tokens, vocab_size, where)
        return Windows(tokens.astype(np.int32), None)
    tokenizer = _present(tokenizer, where)
    if spread and samples is not None and document_tokens is None:
        drawn = spread_out.draw(
            Corpus.of(path, field), tokenizer, seq_len=seq_len, samples=samples, seed=seed
        )
    else:
        limit = None if samples is None else samples * seq_len
        texts = documents(path, None if samples is None else seed, field)
        drawn = _pack(texts, tokenizer, limit, document_tokens)
    return Windows(_cut(drawn.tokens, seq_len, vocab_size, where), drawn.documents)


def windows(
    texts: Iterable[str],
    tokenizer: Tokenizer | None,
    *,
    seq_len: int,
    vocab_size: int,
    where: str = "text",
) -> np.ndarray:
    """Packs documents into windows of token ids.

    Args:
      texts: the documents.
      tokenizer: as for `load_tokens`.
      seq_len: as for `load_tokens`.
      vocab_size: as for `load_tokens`.
      where: name of the documents in error messages.

    Returns:
      ``[n, seq_len]`` int32 token ids.

    Raises:
      ValueError: if there is no tokenizer or too little text, or an id is not in the vocabulary.
    """
    packed = _pack(texts, _present(tokenizer, where), None, None)
    return _cut(packed.tokens, seq_len, vocab_size, where)


def _present(tokenizer: Tokenizer | None, where: str) -> Tokenizer:
    if tokenizer is None:
        raise ValueError(
            f"{where}: text needs a tokenizer, but the model has none; give a .npy array of token "
            "ids"
        )
    return tokenizer


def _cut(ids: list[int], seq_len: int, vocab_size: int, where: str) -> np.ndarray:
    """Cuts ids into windows ``[n, seq_len]`` int32; a last, shorter window is dropped."""
    count = len(ids) // seq_len
    if not ids:
        raise ValueError(f"{where}: no text; all documents are empty")
    if not count:
        raise ValueError(
            f"{where}: {len(ids)} tokens, fewer than one window of {seq_len}; "
            "give more text, or a shorter window (--seq-len)"
        )
    tokens = np.asarray(ids[: count * seq_len], np.int64).reshape(count, seq_len)
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
    with reading(path, "cannot be read", expected):
        array = np.lib.format.open_memmap(path, "r")
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
) -> spread_out.Drawn:
    """Returns the ids of the documents with a separator between them, at most ``limit`` ids."""
    between = separator(tokenizer)
    tokens: list[int] = []
    count = 0
    for text in texts:
        if not text:
            continue
        wanted = [n for n in (document_tokens, limit and limit - len(tokens)) if n is not None]
        ids = first_ids(tokenizer, text, min(wanted, default=None))
        tokens += (between if tokens else []) + ids
        count += 1
        if limit is not None and len(tokens) >= limit:
            break
    return spread_out.Drawn(tokens[:limit], count)
