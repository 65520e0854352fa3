"""Reads text, and files of records: ``.jsonl``, ``.jsonl.gz`` and ``.parquet``.

Names may be in capitals. A byte order mark and line ends of Windows are no part of a text.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lordjax.runtime.input_files import parse_json, reading, size_of

FIELD = "text"  # of a record that is a document, unless another one is named
LINES, COMPRESSED, PARQUET = ".jsonl", ".jsonl.gz", ".parquet"
RECORDS = frozenset((LINES, COMPRESSED, PARQUET))
# A file may grow when it is read: to so many times its bytes, or to so many bytes if it is small.
# Text of a compressed file has about 4 times its bytes, the most regular records 30 times.
_GROWTH, _SMALL, _PIECE = 50, 2**24, 2**20
_ROWS = 32  # of parquet that are unpacked at a time; they may share one large value


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


def decoded(data: bytes, path: Path, offset: int, what: str = "text") -> str:
    """Decodes the bytes of a file from an offset on.

    Args:
      data: the bytes.
      path: the file, for error messages.
      offset: place of the bytes in the file.
      what: the expected contents, for error messages.

    Raises:
      ValueError: if they are not UTF-8; names the first bad byte and its offset.
    """
    try:
        return data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        bad = f"byte {error.object[error.start]:#04x} at offset {offset + error.start}"
        raise ValueError(
            f"{path}: {bad} is not UTF-8; expected {what} (convert the file or leave it out)"
        ) from error


def read_records(path: Path) -> list[tuple[str, Any]]:
    """Reads all records of a file, each with its file and line or row, from 1.

    Raises:
      ValueError: if the file cannot be read, is packed too much, or a line is not JSON; says where.
      ImportError: if it is a parquet file and pyarrow is not installed.
    """
    return list(_records(path))


def _records(path: Path, digest: Any = None) -> Iterator[tuple[str, Any]]:
    """Yields what `read_records` reads; ``digest`` gets the bytes of the uncompressed file."""
    if suffix_of(path) == PARQUET:
        if digest is not None:
            digest.update(path.read_bytes())
        for number, row in enumerate(_parquet_rows(path), 1):
            yield f"{path}, row {number}", row
        return
    offset = 0
    for number, line in enumerate(_lines(path), 1):
        if digest is not None:
            digest.update(line)
        text = decoded(line, path, offset, "lines of JSON")
        offset += len(line)
        if text.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(text, where)


def _lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file, which may be compressed, with their ends."""
    size_of(path)
    if path.suffix.lower() != ".gz":
        with path.open("rb") as stream:
            yield from stream
        return
    with reading(path, f"cannot be read as {COMPRESSED}"):
        _check_growth(path)
        with gzip.open(path) as stream:
            yield from stream


def _check_growth(path: Path) -> None:
    """Raises ValueError if a gzip file is packed so much that it would fill the memory."""
    most = max(_SMALL, _GROWTH * path.stat().st_size)
    with gzip.open(path) as stream:
        while piece := stream.read(_PIECE):
            most -= len(piece)
            if most < 0:
                raise ValueError(_too_large(path))


def _too_large(path: Path) -> str:
    return (
        f"{path}: holds more than {_GROWTH} times its {path.stat().st_size:,} bytes; expected "
        f"data that is packed less (unpack it, or save it as {LINES})"
    )


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f'{path}: reading parquet needs pyarrow (pip install "lordjax[parquet]"), or save the '
            "data as .jsonl"
        ) from error
    most = max(_SMALL, _GROWTH * size_of(path))
    with reading(path, "cannot be read as parquet"), parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > most:
            raise ValueError(_too_large(path))
        for batch in file.iter_batches(batch_size=_ROWS):
            most -= batch.nbytes
            if most < 0:
                raise ValueError(_too_large(path))
            yield from batch.to_pylist()


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
    found, digest = [], hashlib.sha256()
    for where, record in _records(path, digest):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: {type(record).__name__}; expected a JSON object")
        found.append((where, record))
    if not found:
        raise ValueError(f"{path}: empty; expected a JSON object per line")
    return found, digest.hexdigest()
