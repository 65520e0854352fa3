"""Reads documents: text files and lines of ``.jsonl`` files, in order or shuffled."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_SUFFIXES = (
    ".c .cc .cfg .cpp .cs .css .csv .cu .go .h .hpp .hs .html .ini .java .jl .js .json .jsonl .jsx "
    ".kt .lua .md .ml .php .pl .py .pyi .r .raw .rb .rs .rst .scala .sh .sql .swift .tex .toml "
    ".ts .tsx .txt .xml .yaml .yml .zig"
)
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())


def documents(path: str | Path | Sequence[Path], seed: int | None = None) -> Iterator[str]:
    """Yields texts one by one, so that only the needed part of a large corpus is read.

    Args:
      path: a text file, a ``.jsonl`` file, a directory, or a list of files, as for
        `token_windows.load_tokens`.
      seed: seed of a random order; None keeps the order of the paths and lines.

    Raises:
      FileNotFoundError: if the path does not exist.
      ValueError: if a file cannot be read as text or has no "text" in a line; says where.
    """
    files = _files(path)
    shuffle = np.random.default_rng(seed).permutation
    for i in range(len(files)) if seed is None else shuffle(len(files)):
        if files[i].suffix != ".jsonl":
            yield read_text(files[i])
            continue
        lines = json_lines(files[i])
        for j in range(len(lines)) if seed is None else shuffle(len(lines)):
            yield _jsonl_text(files[i], *lines[j])


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of a path, each read by its number.

    Files are listed and lines of jsonl are counted; a document is parsed when it is asked for.

    Attributes:
      files: the files.
      places: ``[n, 4]`` int64, for every document: its file, its line from 1 (0: the whole file),
        and the first byte and the end of that line.
    """

    files: list[Path]
    places: np.ndarray

    @classmethod
    def of(cls, path: str | Path | Sequence[Path]) -> Corpus:
        """Returns the corpus of a path; see `documents`.

        Raises:
          FileNotFoundError: if the path does not exist.
          ValueError: if there is no text file in a directory.
        """
        files = _files(path)
        places = [
            np.array([(i, 0, 0, 0)])
            if file.suffix != ".jsonl"
            else np.insert(_line_places(file), 0, i, axis=1)
            for i, file in enumerate(files)
        ]
        return cls(files, np.concatenate(places).astype(np.int64))

    def __len__(self) -> int:
        return len(self.places)

    def text(self, i: int) -> str:
        """Returns a document.

        Raises:
          ValueError: if it cannot be read as text, or has no "text" in a line; says where.
        """
        file, line, start, end = self.places[i].tolist()
        path = self.files[file]
        if not line:
            return read_text(path)
        with path.open("rb") as opened:
            opened.seek(start)
            return _jsonl_text(path, line, _decoded(opened.read(end - start), path, start))


def _files(path: str | Path | Sequence[Path]) -> list[Path]:
    paths, where = located(path)
    files = [f for p in paths for f in (sorted(walk(p, TEXT_SUFFIXES)) if p.is_dir() else [p])]
    if not files:
        known = " ".join(sorted(TEXT_SUFFIXES))
        raise ValueError(f"{where}: no text file in it; expected files with one of {known}")
    return files


def _line_places(path: Path) -> np.ndarray:
    """Returns number, first byte and end ``[n, 3]`` of the non-empty lines of a jsonl file."""
    found, start = [], 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                found.append((number, start, start + len(line)))
            start += len(line)
    return np.array(found, np.int64).reshape(-1, 3)


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
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
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


def read_text(path: Path) -> str:
    """Returns the text of a file, without a byte order mark.

    Raises:
      ValueError: if the file is not UTF-8; names the first bad byte and its offset.
    """
    return _decoded(path.read_bytes(), path, 0)


def _decoded(data: bytes, path: Path, offset: int) -> str:
    """Decodes the bytes of a file from an offset on."""
    try:
        return data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        bad = f"byte {error.object[error.start]:#04x} at offset {offset + error.start}"
        raise ValueError(
            f"{path}: {bad} is not UTF-8; expected text (convert the file or leave it out)"
        ) from error


def json_lines(path: Path) -> list[tuple[int, str]]:
    """Returns the non-empty lines of a ``.jsonl`` file, each with its line number from 1."""
    return [(n, s) for n, s in enumerate(read_text(path).split("\n"), 1) if s.strip()]


def parse_json(text: str, where: str) -> Any:
    """Parses JSON.

    Args:
      text: the JSON text.
      where: its file and line, for error messages.

    Raises:
      ValueError: if the text is not JSON; says where.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def records(path: str | Path, what: str) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """Reads all records (JSON objects) of a ``.jsonl`` or ``.jsonl.gz`` file.

    Args:
      path: the file.
      what: the expected contents, for error messages.

    Returns:
      A list of (file and line, record), and the SHA-256 of the uncompressed file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file cannot be read, is empty, or a line is not a JSON object; says where.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file ({what}, .jsonl or .jsonl.gz)")
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        lines = data.decode("utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as .jsonl or .jsonl.gz ({error})") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            record = parse_json(line, where)
            if not isinstance(record, dict):
                raise ValueError(f"{where}: {type(record).__name__}; expected a JSON object")
            found.append((where, record))
    if not found:
        raise ValueError(f"{path}: empty; expected a JSON object per line")
    return found, hashlib.sha256(data).hexdigest()


def _jsonl_text(path: Path, number: int, line: str) -> str:
    record = parse_json(line, f"{path}, line {number}")
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{path}, line {number}: no "text"; expected {{"text": "…"}} in each line')
    return text
