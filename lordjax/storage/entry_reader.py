"""Reads the entries that a `DiskStore` wrote, and checks each of their files once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lordjax.storage.serialize import Types, from_json
from lordjax.storage.tensor_files import TensorFile, Written, checksum


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
        file = self.arrays(row) if "file" in row else {}
        try:
            value = (
                json.loads(file.metadata["tree"]) if isinstance(file, TensorFile) else row["value"]
            )
            return from_json(value, file, self._types)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            where = row.get("file", "an entry")
            raise ValueError(
                f"{self.directory}: {where} is damaged ({error!r}); {self._remedy}"
            ) from error

    def arrays(self, row: Mapping[str, Any]) -> TensorFile:
        """Returns the file with the arrays of an entry; raises as `tree` does."""
        return TensorFile(self.checked_path(row))

    def checked_path(self, row: Mapping[str, Any]) -> Path:
        """Returns the path of an entry's file; raises as `tree` does."""
        path = self.directory / str(row["file"])
        if not path.resolve().is_relative_to(self.directory.resolve()):
            raise ValueError(f"{path}: is not a file below {self.directory}; {self._remedy}")
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
