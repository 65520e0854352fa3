"""The door for files that are read: damage becomes a ValueError that names the file.

A library raises whatever it meets in a damaged file. `reading` turns that into one kind of error.
Sizes are taken from the file's length before they are taken from numbers in it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lordjax.runtime import json_files

LARGEST_JSON = 2**26  # bytes of a JSON file; indices of the largest models have a tenth of it
DEEPEST_JSON = 64  # levels; a reader of trees may go down them by recursion
_LARGEST_NUMBER = 10**36  # of an integer; larger ones overflow in later computations
_LONGEST_NAME = 1000  # characters
_TOLD = 300  # most characters of another library's message


@contextlib.contextmanager
def reading(
    path: str | os.PathLike[str], problem: str, advice: str = "download it again, or write it again"
) -> Iterator[None]:
    """Turns what libraries raise over a damaged file into a ValueError that names the file.

    Errors that begin with the path pass, and so do errors of the operating system that name a file,
    unless there is none.

    Args:
      path: the file or directory.
      problem: what is said about it, such as ``not a plan``.
      advice: what to do about it.

    Raises:
      ValueError: if the block raises another error.
    """
    try:
        yield
    except ImportError:
        raise
    except BaseException as error:
        panic = type(error).__module__ == "pyo3_runtime"  # of Rust: no kind of Exception
        ours = isinstance(error, ValueError | OSError) and str(error).startswith(str(path))
        system = isinstance(error, OSError) and error.filename is not None
        system &= not isinstance(error, FileNotFoundError)
        if ours or system or not (panic or isinstance(error, Exception)):
            raise
        raise ValueError(f"{path}: {problem} ({told(error)}); {advice}") from error


def told(error: BaseException) -> str:
    """Returns the first line of an exception's message, cut and printable, and its type."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    line = next(iter(str(error).strip().splitlines()), "")[:_TOLD]
    line = line.encode("utf-8", "backslashreplace").decode()
    kind = type(error).__name__
    return line if line and isinstance(error, ValueError | OSError) else f"{kind}: {line}"


def size_of(path: Path) -> int:
    """Returns the bytes of a file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no regular file: a directory, a pipe, a device.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file; expected one")
    return size


def read_json(path: Path, advice: str = "is the file complete?") -> dict[str, Any]:
    """Reads the object in a JSON file, which a program or a person wrote.

    Args:
      path: the file.
      advice: what to do about a damaged file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the content is not a JSON object, or has numbers that are not finite.
    """
    if (size := size_of(path)) > LARGEST_JSON:
        raise ValueError(
            f"{path}: {size:,} bytes; expected JSON of at most {LARGEST_JSON:,}; {advice}"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not JSON ({told(error)}); {advice}") from error
    content = parse_json(text, str(path), advice, finite=True)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a JSON object, found a {type(content).__name__}; {advice}"
        )
    return content


def parse_json(text: str, where: str, advice: str = "correct it", *, finite: bool = False) -> Any:
    """Parses JSON.

    Args:
      text: the JSON text.
      where: its file, and line if it is one of several, for error messages.
      advice: what to do about a damaged text.
      finite: whether NaN, infinite and huge numbers are errors.

    Raises:
      ValueError: if the text is not JSON, is nested more than `DEEPEST_JSON` levels deep, or has
        text that is no Unicode; says where.
    """
    hooks: dict[str, Any] = {}
    if finite:
        hooks = {"parse_constant": _finite, "parse_float": _finite, "parse_int": _integer}
    try:
        value = json.loads(text, **hooks)
        if text.count("[") + text.count("{") > DEEPEST_JSON and _depth(value) > DEEPEST_JSON:
            raise RecursionError
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half a character, or a whole one in halves
            json_files.dumps_measured(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({told(error)}); {advice}") from error
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:40]}; expected a finite one")
    return value


def _integer(text: str) -> int:
    if len(text) > 40 or abs(value := int(text)) > _LARGEST_NUMBER:
        raise ValueError(f"number {text[:40]}; expected at most {_LARGEST_NUMBER:.0e}")
    return value


def _depth(value: Any) -> int:
    """Returns how many levels of lists and objects a JSON value has."""
    level, depth = [value], 0
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        level = [
            inner for node in level for inner in (node.values() if isinstance(node, dict) else node)
        ]
    return depth


def inside(directory: Path, name: Any, where: str | Path) -> Path:
    """Returns the path of a file in a directory, which must not leave it.

    A link may lead to another file of the directory, or into the cache of the Hugging Face hub,
    whose directories link to files ``models--OWNER--NAME/blobs/HASH``.

    Args:
      directory: the directory.
      name: name of the file, relative to it.
      where: the file that names it, or the directory, for the error message.

    Raises:
      ValueError: if the name is no relative path, has "..", or is a link that leads elsewhere.
    """
    known = isinstance(name, str) and len(name) < _LONGEST_NAME
    parts = re.split(r"[/\\]", name) if known else [""]
    if not all(part.strip(". ") for part in parts) or re.search(r"[\0:]", name):
        raise ValueError(
            f"{where}: file name {str(name)[:80]!r}; expected the name of a file in {directory}, "
            'without ".." and not absolute'
        )
    path = directory / name
    if path.exists():
        found, root = path.resolve(), directory.resolve()
        cached = found.parent.name == "blobs" and found.parents[1].name.startswith("models--")
        if not (found.is_relative_to(root) or cached):
            raise ValueError(
                f"{where}: {name} is a link to {found}, outside of {directory}; replace it by a "
                "copy of that file"
            )
    return path


def check_no_links(directory: Path, advice: str) -> None:
    """Raises ValueError if a directory, or something below it, is a symbolic link.

    What writes into the directory would write or delete somewhere else.
    """
    for path in (directory, *directory.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path}: a symbolic link, which lordjax does not write; {advice}")
