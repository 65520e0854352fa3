"""Reads text, and files of records: ``.jsonl``, ``.jsonl.gz`` and ``.parquet``.

Names may be in capitals. A byte order mark and line ends of Windows are no part of a text.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

FIELD = "text"  # of a record that is a document, unless another one is named
LINES, COMPRESSED, PARQUET = ".jsonl", ".jsonl.gz", ".parquet"
RECORDS = frozenset((LINES, COMPRESSED, PARQUET))


def suffix_of(path: Path) -> str:
    """Returns the suffix of a file in lower case; ``.jsonl.gz`` is one."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return COMPRESSED if "".join(suffixes) == COMPRESSED else "".join(suffixes[-1:])


def read_text(path: Path) -> str:
    r"""Returns the text of a file, without a byte order mark, with ``\n`` as line end.

    Raises:
      ValueError: if the file is not UTF-8; names the first bad byte and its offset.
    """
    return decoded(path.read_bytes(), path, 0).replace("\r\n", "\n")


def decoded(data: bytes, path: Path, offset: int) -> str:
    """Decodes the bytes of a file from an offset on.

    Raises:
      ValueError: if they are not UTF-8; names the first bad byte and its offset.
    """
    try:
        return data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        bad = f"byte {error.object[error.start]:#04x} at offset {offset + error.start}"
        raise ValueError(
            f"{path}: {bad} is not UTF-8; expected text (convert the file or leave it out)"
        ) from error


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


def read_records(path: Path) -> list[tuple[str, Any]]:
    """Reads all records of a file, each with its file and line or row, from 1.

    Raises:
      ValueError: if the file cannot be read, or a line is not JSON; says where.
      ImportError: if it is a parquet file and pyarrow is not installed.
    """
    if suffix_of(path) == PARQUET:
        rows = enumerate(_parquet_rows(path), 1)
        return [(f"{path}, row {number}", row) for number, row in rows]
    data = _uncompressed(path)
    try:
        lines = decoded(data, path, 0).split("\n")
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as lines of JSON ({error})") from error
    numbered = ((f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip())
    return [(where, parse_json(line, where)) for where, line in numbered]


def _uncompressed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as .jsonl.gz ({error})") from error


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f'{path}: reading parquet needs pyarrow (pip install "lordjax[parquet]"), or save the '
            "data as .jsonl"
        ) from error
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        raise ValueError(f"{path}: cannot be read as parquet ({error})") from error


def record_text(record: Any, field: str, where: str) -> str:
    """Returns the text of a record.

    Args:
      record: the record.
      field: name of the text's field.
      where: file and line of the record, for error messages.

    Raises:
      ValueError: if there is no text under this name; says where, and which fields there are.
    """
    text = record.get(field) if isinstance(record, dict) else None
    if isinstance(text, str):
        return text
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f'{where}: no "{field}" in a {kind}; expected {{"{field}": "…"}}')
    there = [name for name, value in record.items() if isinstance(value, str)][:10]
    other = f"it has {', '.join(map(repr, there))}" if there else "it has no text at all"
    raise ValueError(
        f'{where}: no "{field}" with a text; {other}; name the field of the text (--field)'
    )


def records(path: str | Path, what: str) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """Reads all records (JSON objects) of a file.

    Args:
      path: the file.
      what: the expected contents, for error messages.

    Returns:
      A list of (file and line, record), and the SHA-256 of the uncompressed file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file cannot be read, is empty, or a line is not a JSON object; says where.
      ImportError: if it is a parquet file and pyarrow is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file ({what}, .jsonl, .jsonl.gz or .parquet)")
    found = read_records(path)
    for where, record in found:
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {type(record).__name__}; expected a JSON object")
    if not found:
        raise ValueError(f"{path}: empty; expected a JSON object per line")
    return found, hashlib.sha256(_uncompressed(path)).hexdigest()
