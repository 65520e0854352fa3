"""Reads the entries that a `DiskStore` wrote, and checks each of their files once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lordjax.runtime.input_files import inside, parse_json, reading
from lordjax.storage.serialize import Types, from_json
from lordjax.storage.tensor_files import TensorFile, Written, checksum

_FILE = re.compile(r"entries[/\\]\d{6,}-[\w.-]+\.safetensors")


def check_entry(row: Mapping[str, Any]) -> None:
    """Checks that a line of a journal describes an entry, whose file is where entries are.

    Raises:
      KeyError: if a part is missing.
      TypeError: if a part has another type.
      ValueError: if the file has another name than a `DiskStore` gives.
    """
    if "file" not in row:
        row["value"]
        return
    if not _FILE.fullmatch(row["file"]):
        raise ValueError(f"{row['file'][:80]!r} is no file of an entry")
    if type(row["bytes"]) is not int or not isinstance(row["sha256"], str):
        raise TypeError(f"{row['file']} has no size and checksum")


def file_name(key: str) -> str:
    """Returns the end of the name of an entry's file, which says what is in it."""
    return re.sub(r"[^\w.]+", "-", key) + ".safetensors"


class EntryReader:
    """Reads entries from a directory, and checks the checksum of every file once.

    Args:
      directory: directory that the paths of the files are relative to.
      types: dataclasses that entries may hold, by their names; see `serialize`.
      remedy: advice at the end of an error message about a damaged file.
      verify: whether checksums are checked.

    Attributes:
      intact: names of the files whose checksums are known to be right.
    """

    def __init__(self, directory: Path, types: Types, remedy: str, *, verify: bool = True):
        self.directory, self._types, self._remedy = directory, types, remedy
        self._verify = verify
        self.intact: set[str] = set()

    def tree(self, row: Mapping[str, Any]) -> Any:
        """Returns the entry of a line of the journal; its arrays are memory-mapped.

        Raises:
          ValueError: if the entry's file is missing, or the entry is not what was written.
        """
        where = row.get("file", "an entry")
        with reading(self.directory, f"{where} is damaged", self._remedy):
            if "file" not in row:
                return from_json(row["value"], {}, self._types)
            file = self.arrays(row)
            text = file.metadata["tree"]
            return from_json(parse_json(text, str(file.path), self._remedy), file, self._types)

    def arrays(self, row: Mapping[str, Any]) -> TensorFile:
        """Returns the file with the arrays of an entry; raises as `tree` does."""
        return TensorFile(self.checked_path(row))

    def checked_path(self, row: Mapping[str, Any]) -> Path:
        """Returns the path of an entry's file; raises as `tree` does."""
        path = inside(self.directory, row["file"], self.directory)
        if path.name in self.intact:
            return path
        if not path.is_file():
            raise ValueError(f"{path} is missing; {self._remedy}")
        if self._verify and checksum(path) != Written(row.get("bytes", 0), row.get("sha256", "")):
            raise ValueError(
                f"{path} is not what was written there (its checksum differs); {self._remedy}"
            )
        self.intact.add(path.name)
        return path
