"""Reads the entries that a `DiskStore` wrote, and checks each of their files once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lordjax.storage.serialize import Types, from_json
from lordjax.storage.tensor_files import TensorFile, Written, checksum


class EntryReader:
    """Reads entries from a directory, and checks the checksum of every file once.

    Args:
      directory: directory that the paths of the files are relative to.
      types: dataclasses that entries may hold, by their names; see `serialize`.
      remedy: advice at the end of an error message about a damaged file.

    Attributes:
      intact: names of the files whose checksums are known to be right.
    """

    def __init__(self, directory: Path, types: Types, remedy: str):
        self.directory, self._types, self._remedy = directory, types, remedy
        self.intact: set[str] = set()

    def tree(self, row: Mapping[str, Any]) -> Any:
        """Returns the entry of a line of the journal; its arrays are memory-mapped.

        Raises:
          ValueError: if the entry's file is missing, or differs from what was written.
        """
        if "file" not in row:
            return from_json(row["value"], {}, self._types)
        file = self.arrays(row)
        return from_json(json.loads(file.metadata["tree"]), file, self._types)

    def arrays(self, row: Mapping[str, Any]) -> TensorFile:
        """Returns the file with the arrays of an entry; raises as `tree` does."""
        return TensorFile(self.checked_path(row))

    def checked_path(self, row: Mapping[str, Any]) -> Path:
        """Returns the path of an entry's file; raises as `tree` does."""
        path = self.directory / row["file"]
        if path.name in self.intact:
            return path
        if not path.is_file():
            raise ValueError(f"{path} is missing; {self._remedy}")
        if checksum(path) != Written(row["bytes"], row["sha256"]):
            raise ValueError(
                f"{path} is not what was written there (its checksum differs); {self._remedy}"
            )
        self.intact.add(path.name)
        return path
