"""Reads documents: text files and records of files of them, in order or shuffled."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lordjax.data.record_files import (
    FIELD,
    LINES,
    RECORDS,
    decoded,
    read_records,
    read_text,
    record_text,
    suffix_of,
)
from lordjax.runtime.input_files import parse_json

_SUFFIXES = (
    ".c .cc .cfg .cpp .cs .css .csv .cu .go .h .hpp .hs .html .ini .java .jl .js .json .jsonl .jsx "
    ".kt .lua .md .ml .php .pl .py .pyi .r .raw .rb .rs .rst .scala .sh .sql .swift .tex .toml "
    ".ts .tsx .txt .xml .yaml .yml .zig"
)
TEXT_SUFFIXES = frozenset(_SUFFIXES.split()) | RECORDS


def documents(
    path: str | Path | Sequence[Path], seed: int | None = None, field: str = FIELD
) -> Iterator[str]:
    """Yields texts one by one, so that only the needed part of a large corpus is read.

    Args:
      path: a text file, a file of records, a directory, or a list of files, as for
        `token_windows.load_tokens`.
      seed: seed of a random order; None keeps the order of the paths and lines.
      field: name of the text in a record.

    Raises:
      FileNotFoundError: if the path does not exist.
      ValueError: if a file cannot be read as text or a record has no such field; says where.
      ImportError: if a file is parquet and pyarrow is not installed.
    """
    files = _files(path)
    shuffle = np.random.default_rng(seed).permutation
    for i in range(len(files)) if seed is None else shuffle(len(files)):
        if suffix_of(files[i]) not in RECORDS:
            yield read_text(files[i])
            continue
        corpus = Corpus.of(files[i : i + 1], field)
        for j in range(len(corpus)) if seed is None else shuffle(len(corpus)):
            yield corpus.text(j)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of a path, each read by its number.

    Files are listed and lines of jsonl are counted; a document is parsed when it is asked for.
    Records of compressed files and of parquet are held in memory.

    Attributes:
      files: the files.
      places: ``[n, 4]`` int64, for every document: its file, its line or record from 1 (0: the
        whole file), and the first byte and the end of that line.
      field: name of the text in a record.
      held: number of a file -> its records, each with its place in the file.
    """

    files: list[Path]
    places: np.ndarray
    field: str = FIELD
    held: dict[int, list[tuple[str, Any]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, path: str | Path | Sequence[Path], field: str = FIELD) -> Corpus:
        """Returns the corpus of a path; see `documents`.

        Raises:
          FileNotFoundError: if the path does not exist.
          ValueError: if there is no text file in a directory, or a file cannot be read.
          ImportError: if a file is parquet and pyarrow is not installed.
        """
        files, places = _files(path), []
        kinds = [suffix_of(file) for file in files]
        held = {
            i: read_records(file)
            for i, file in enumerate(files)
            if kinds[i] in RECORDS and kinds[i] != LINES
        }
        for i, file in enumerate(files):
            if i in held:
                own = [(number, 0, 0) for number in range(1, len(held[i]) + 1)]
            else:
                own = _line_places(file) if kinds[i] == LINES else [(0, 0, 0)]
            places.append(np.insert(np.array(own, np.int64).reshape(-1, 3), 0, i, axis=1))
        return cls(files, np.concatenate(places), field, held)

    def __len__(self) -> int:
        return len(self.places)

    def text(self, i: int) -> str:
        """Returns a document.

        Raises:
          ValueError: if it cannot be read as text, or has no such field; says where.
        """
        file, line, start, end = self.places[i].tolist()
        path = self.files[file]
        if file in self.held:
            where, record = self.held[file][line - 1]
            return record_text(record, self.field, where)
        if not line:
            return read_text(path)
        with path.open("rb") as opened:
            opened.seek(start)
            where, text = f"{path}, line {line}", decoded(opened.read(end - start), path, start)
        return record_text(parse_json(text, where), self.field, where)


def _files(path: str | Path | Sequence[Path]) -> list[Path]:
    paths, where = located(path)
    files = [f for p in paths for f in (sorted(walk(p, TEXT_SUFFIXES)) if p.is_dir() else [p])]
    if not files:
        known = " ".join(sorted(TEXT_SUFFIXES))
        raise ValueError(f"{where}: no text file in it; expected files with one of {known}")
    return files


def _line_places(path: Path) -> list[tuple[int, int, int]]:
    """Returns number, first byte and end of the non-empty lines of a jsonl file."""
    found, start = [], 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                found.append((number, start, start + len(line)))
            start += len(line)
    return found


def walk(
    root: Path, suffixes: frozenset[str], skipped: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """Yields the files below a folder that have one of the suffixes.

    Args:
      root: the folder.
      suffixes: suffixes in lower case, with the dot.
      skipped: names of folders that are left out; hidden files and folders are left out, too.
    """
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        for name in names:
            if not name.startswith(".") and suffix_of(Path(name)) in suffixes:
                yield Path(folder, name)


def located(path: str | Path | Sequence[Path]) -> tuple[list[Path], str]:
    """Returns a list of paths, and a name for them in error messages.

    Raises:
      FileNotFoundError: if a path does not exist.
    """
    paths = [Path(p) for p in ([path] if isinstance(path, str | Path) else path)]
    for p in paths:
        if not p.exists():
            raise FileNotFoundError(f"{p}: no such file or directory; expected text or token ids")
    return paths, str(paths[0]) if len(paths) == 1 else f"{len(paths)} files"
