"""Documents: one text file, one line of a ``.jsonl`` file, in a fixed or a drawn order."""

from __future__ import annotations

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
    """Texts one by one, so that a large corpus is read only as far as it is needed.

    Args:
      path: as for `data.load_tokens`, without arrays.
      seed: of the order; None: that of the paths.

    Raises:
      FileNotFoundError: if the path does not exist.
      ValueError: if the content is not what is described there; says where.
    """
    paths, where = located(path)
    files = [f for p in paths for f in (sorted(walk(p, TEXT_SUFFIXES)) if p.is_dir() else [p])]
    if not files:
        known = " ".join(sorted(TEXT_SUFFIXES))
        raise ValueError(f"{where}: no text file in it; expected files with one of {known}")
    shuffle = np.random.default_rng(seed).permutation
    for i in range(len(files)) if seed is None else shuffle(len(files)):
        if files[i].suffix != ".jsonl":
            yield read_text(files[i])
            continue
        lines = json_lines(files[i])
        for j in range(len(lines)) if seed is None else shuffle(len(lines)):
            yield _jsonl_text(files[i], *lines[j])


def walk(
    root: Path, suffixes: frozenset[str], skipped: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """Files below a folder with one of some suffixes, without hidden ones and skipped folders."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                yield Path(folder, name)


def located(path: str | Path | Sequence[Path]) -> tuple[list[Path], str]:
    """Paths that exist, and what error messages call them."""
    paths = [Path(p) for p in ([path] if isinstance(path, str | Path) else path)]
    for p in paths:
        if not p.exists():
            raise FileNotFoundError(f"{p}: no such file or directory (text or token ids)")
    return paths, str(paths[0]) if len(paths) == 1 else f"{len(paths)} files"


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
      ValueError: if it is not UTF-8; says where.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.object[error.start]:#04x} at offset {error.start} is not UTF-8; "
            "expected text (convert the file or leave it out)"
        ) from error


def json_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a ``.jsonl`` file that are not empty, each with its number, from 1."""
    return [(n, s) for n, s in enumerate(read_text(path).split("\n"), 1) if s.strip()]


def parse_json(text: str, where: str) -> Any:
    """The value; raises ValueError, which says where, if the text is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def records(path: str | Path, what: str) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """Every record of a ``.jsonl`` or ``.jsonl.gz`` file with the place where it stands.

    Args:
      path: the file.
      what: it should hold, for error messages.

    Returns:
      The records, and the sha256 of the file's text, unpacked.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not such a file or empty; says where.
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
                raise ValueError(f"{where}: {type(record).__name__}; expected a record")
            found.append((where, record))
    if not found:
        raise ValueError(f"{path}: empty; expected a record a line")
    return found, hashlib.sha256(data).hexdigest()


def _jsonl_text(path: Path, number: int, line: str) -> str:
    record = parse_json(line, f"{path}, line {number}")
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{path}, line {number}: no "text"; expected {{"text": "…"}} a line')
    return text
