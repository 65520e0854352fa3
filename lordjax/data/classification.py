"""Sentences and pairs with a label, for encoders that classify: tab-separated files as of GLUE.

A file has a header with names of `_LAYOUTS`, or none and one of these kinds of rows::

    gj04 <tab> 1 <tab>   <tab> Our friends won't buy this.       CoLA: source, label, mark, sentence
    1 <tab> a moving film                                        one column of numbers, one of text

Any other is read when the columns are named. Cells are taken as they are, quotes included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lordjax.data import documents, token_windows
from lordjax.data.examples import VALIDATION, Data, Examples, hold_out, pad


class Columns(NamedTuple):
    """One text or two, and the label; names of a header, or places from 0."""

    texts: tuple[str | int, ...]
    label: str | int


# Headers of GLUE and of sets like those; the first of which all names are there.
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
    """Reads a tab-separated file.

    Sequences begin and end as the tokenizer says. They are cut at ``seq_len`` (of a pair the longer
    text) and filled up to the longest (see `examples.pad`). ``facts["labels"]`` are the names of
    the classes.

    Args:
      path: see the module's docstring.
      tokenizer: a tokenizer of transformers.
      seq_len: most tokens of an example.
      vocab_size: every id must be below it.
      text_columns: one or two columns: names of a header, or places from 0 where there is none.
      label_column: likewise, given together with ``text_columns``.
      labels: names of the classes in the order of their numbers; None: those of the file, sorted,
        as numbers if all of them are.
      share: of the texts that are held out; 0: none.
      seed: of the split.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not as described, there are fewer than two classes or not those of
        ``labels``, or an id is not in the vocabulary; says where.
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
    """The texts and the label of every row."""
    documents.located(path)
    lines = enumerate(documents.read_text(path).split("\n"), 1)
    rows = [(n, line.rstrip("\r").split("\t")) for n, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path}: no text")
    columns = _columns(path, [cells for _, cells in rows], asked)
    header = rows[0][1]
    named = isinstance(columns.label, str)
    places = [header.index(c) if isinstance(c, str) else c for c in (*columns.texts, columns.label)]
    texts, labels = [], []
    for number, cells in rows[named:]:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(cells)} columns; expected {len(header)}, as in the "
                "first line"
            )
        *text, label = (cells[place].strip() for place in places)
        if not label:
            raise ValueError(f"{path}, line {number}: no label")
        texts.append(tuple(text))
        labels.append(label)
    if not texts:
        raise ValueError(f"{path}: a header and nothing below it")
    return texts, labels


def _check_length(path: Path, seq_len: int, texts: int, tokenizer: Any) -> None:
    """Raises ValueError unless there is room for a token of every text, and an end between two."""
    ends = tokenizer.num_special_tokens_to_add(pair=texts == 2)
    if texts == 2 and not ends:
        raise ValueError(f"{path}: pairs of texts, but this tokenizer puts nothing between them")
    if seq_len < ends + texts:
        raise ValueError(f"{path}: examples of {seq_len} tokens; expected {ends + texts} or more")


def _columns(path: Path, rows: list[list[str]], asked: Columns | None) -> Columns:
    """Those that were asked for, or those of a known kind of file."""
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
    wanted = "its columns are none of a known kind" if asked is None else f"no columns {asked}"
    raise ValueError(
        f"{path}: {wanted}; name one or two text columns and the label column, all of them as in "
        f"a header or by their places. The first line has {listed}"
    )


def _is_integer(cell: str) -> bool:
    return cell.strip().lstrip("-").isdecimal()


def _classes(path: Path, found: list[str], asked: Sequence[str] | None) -> list[str]:
    """Names of the classes in the order of their numbers."""
    own = set(found)
    names = sorted(own, key=int) if all(map(_is_integer, own)) else sorted(own)
    if asked is not None:
        names = list(asked)
        if unknown := sorted(own - set(names)):
            raise ValueError(f"{path}: labels {unknown} are none of {names}")
    if scores := [name for name in names if re.fullmatch(r"-?\d*\.\d+", name)]:
        raise ValueError(f"{path}: labels like {scores[0]} are scores; expected classes")
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"{path}: labels {names}; expected two different ones or more")
    if asked is None and len(names) > max(2, len(found) // 2):
        raise ValueError(
            f"{path}: {len(names)} different labels on {len(found)} texts, {names[:3]} among them; "
            "expected classes (is it another column?)"
        )
    return names
