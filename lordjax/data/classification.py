"""Classification data for encoders: labelled sentences and sentence pairs in GLUE's file format.

A file is tab-separated. It has a header with the names of one of `_LAYOUTS`, or no header and one
of these kinds of rows::

    gj04 <tab> 1 <tab>   <tab> Our friends won't buy this.       CoLA: source, label, mark, sentence
    1 <tab> a moving film                                        a number as label, and a text

For any other file, name the columns. Cells are taken as they are, quotes included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lordjax.data import documents, token_windows
from lordjax.data.examples import VALIDATION, Data, Examples, hold_out, pad
from lordjax.data.record_files import read_text


class Columns(NamedTuple):
    """The columns of a file, by names in its header or by positions from 0.

    Attributes:
      texts: one or two text columns.
      label: the label column.
    """

    texts: tuple[str | int, ...]
    label: str | int


# Column names of GLUE and similar data sets. The first layout whose names are all in the header
# is used.
_LAYOUTS = (
    Columns(("sentence1", "sentence2"), "gold_label"),  # MNLI, SNLI
    Columns(("#1 String", "#2 String"), "Quality"),  # MRPC
    Columns(("question1", "question2"), "is_duplicate"),  # QQP
    Columns(("question", "sentence"), "label"),  # QNLI
    Columns(("sentence1", "sentence2"), "label"),  # RTE, WNLI
    Columns(("premise", "hypothesis"), "label"),
    Columns(("sentence",), "label"),  # SST-2
    Columns(("text",), "label"),
)


def classification(
    path: str | Path,
    tokenizer: Any,
    *,
    seq_len: int,
    vocab_size: int,
    text_columns: Sequence[str | int] | None = None,
    label_column: str | int | None = None,
    labels: Sequence[str] | None = None,
    share: float = VALIDATION,
    seed: int = 0,
) -> Data:
    """Reads classification examples from a tab-separated file.

    The tokenizer adds its special tokens. Sequences are truncated to ``seq_len`` tokens (in a pair,
    the longer text first) and padded to the longest (see `examples.pad`).

    Args:
      path: the file; the module's docstring describes its format.
      tokenizer: a tokenizer of transformers.
      seq_len: largest number of tokens of an example.
      vocab_size: size of the vocabulary; every token id must be below it.
      text_columns: one or two names in the header, or positions from 0; None: a known layout.
      label_column: name or position of the label column; given together with ``text_columns``.
      labels: names of the classes in the order of their numbers. None: the labels in the file,
        sorted, by value if all of them are numbers.
      share: fraction of the texts that is held out for validation; 0 holds out none.
      seed: seed of the split.

    Returns:
      Training and validation examples; ``facts["labels"]`` are the names of the classes.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file has another format, there are fewer than two classes, a label is not
        in ``labels``, or a token id is not in the vocabulary; says where.
    """
    path = Path(path)
    if (text_columns is None) != (label_column is None):
        raise ValueError(f"{path}: give both the text columns and the label column, or neither")
    asked = None
    if text_columns is not None and label_column is not None:
        asked = Columns(tuple(text_columns), label_column)
    texts, found = _cells(path, asked)
    names = _classes(path, found, labels)
    _check_length(path, seq_len, len(texts[0]), tokenizer)
    encoded = tokenizer(
        *map(list, zip(*texts, strict=True)),
        truncation=True,
        max_length=seq_len,
        return_token_type_ids=True,
        return_attention_mask=False,
    )
    tokens, mask = pad(encoded["input_ids"], seq_len)
    token_windows.check_ids(tokens, vocab_size, str(path))
    types, _ = pad(encoded["token_type_ids"], seq_len)
    numbers = np.array([[names.index(label)] for label in found], np.int32)
    examples = Examples(tokens, numbers, mask, types if types.any() else None)
    facts = {"source": str(path), "labels": names}
    return hold_out(examples, ["\t".join(text) for text in texts], share, seed, facts)


def _cells(path: Path, asked: Columns | None) -> tuple[list[tuple[str, ...]], list[str]]:
    """Returns the texts and the label of every row."""
    documents.located(path)
    lines = enumerate(read_text(path).split("\n"), 1)
    rows = [(n, line.rstrip("\r").split("\t")) for n, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path}: no text; expected tab-separated rows with a text and a label")
    columns = _columns(path, [cells for _, cells in rows], asked)
    header = rows[0][1]
    named = isinstance(columns.label, str)
    wanted = (*columns.texts, columns.label)
    positions = [header.index(c) if isinstance(c, str) else c for c in wanted]
    texts, labels = [], []
    for number, cells in rows[named:]:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(cells)} columns; expected {len(header)}, as in the "
                "first line"
            )
        *text, label = (cells[position].strip() for position in positions)
        if not label:
            raise ValueError(
                f"{path}, line {number}: no label; expected one in column {positions[-1]}"
            )
        texts.append(tuple(text))
        labels.append(label)
    if not texts:
        raise ValueError(f"{path}: a header and nothing below it; expected a row per example")
    return texts, labels


def _check_length(path: Path, seq_len: int, texts: int, tokenizer: Any) -> None:
    """Checks the sequence length and the tokenizer.

    Raises:
      ValueError: unless an example has room for the special tokens and a token of every text, and
        the tokenizer separates the texts of a pair.
    """
    special = tokenizer.num_special_tokens_to_add(pair=texts == 2)
    if texts == 2 and not special:
        raise ValueError(
            f"{path}: pairs of texts, but this tokenizer puts nothing between them; use a model "
            "whose tokenizer has a separator token"
        )
    if seq_len < special + texts:
        raise ValueError(
            f"{path}: examples of {seq_len} tokens; expected {special + texts} or more (--seq-len)"
        )


def _columns(path: Path, rows: list[list[str]], asked: Columns | None) -> Columns:
    """Returns the columns that were asked for, or those of a known layout."""
    header = rows[0]
    for columns in _LAYOUTS if asked is None else (asked,):
        kinds = {type(column) for column in (*columns.texts, columns.label)}
        known: Any = header if kinds == {str} else range(len(header))
        one_or_two = len(columns.texts) in (1, 2) and len(kinds) == 1
        if one_or_two and all(column in known for column in (*columns.texts, columns.label)):
            return columns
    if asked is None:
        numeric = [
            all(_is_integer(row[i]) for row in rows if i < len(row)) for i in range(len(header))
        ]
        if len(header) == 4 and numeric[1]:
            return Columns((3,), 1)  # CoLA
        if sorted(numeric) == [False, True]:
            return Columns((numeric.index(False),), numeric.index(True))
    listed = ", ".join(f"{i}: {cell[:40]!r}" for i, cell in enumerate(header))
    problem = "its columns are none of a known kind"
    if asked is not None:
        problem = f"no columns {[*asked.texts, asked.label]}"
    raise ValueError(
        f"{path}: {problem}; name one or two text columns and the label column, all by their names "
        f"in the header or all by their positions from 0. The first line has {listed}"
    )


def _is_integer(cell: str) -> bool:
    return cell.strip().lstrip("-").isdecimal()


def _classes(path: Path, found: list[str], asked: Sequence[str] | None) -> list[str]:
    """Returns the names of the classes in the order of their numbers."""
    own = set(found)
    names = sorted(own, key=int) if all(map(_is_integer, own)) else sorted(own)
    if asked is not None:
        names = list(asked)
        if unknown := sorted(own - set(names)):
            raise ValueError(f"{path}: labels {unknown} are none of {names}, the given classes")
    if scores := [name for name in names if re.fullmatch(r"-?\d*\.\d+", name)]:
        raise ValueError(
            f"{path}: labels like {scores[0]} are scores; expected classes, because regression is "
            "not supported"
        )
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"{path}: labels {names}; expected two different ones or more")
    if asked is None and len(names) > max(2, len(found) // 2):
        raise ValueError(
            f"{path}: {len(names)} different labels on {len(found)} texts, {names[:3]} among them; "
            "expected classes (is it another column?)"
        )
    return names
