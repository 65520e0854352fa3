"""Reads the entries beside an elastic model, which a `DiskStore` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lordjax.runtime.input_files import inside, read_json, reading
from lordjax.storage.checksums import MANIFEST, Manifest
from lordjax.storage.entry_reader import EntryReader, check_entry, file_name
from lordjax.storage.serialize import Types
from lordjax.storage.store import MemoryStore

DIRECTORY, INDEX = "elastic", "index.json"
FACTS = "elastic"  # entry: everything besides the factors
FORMAT = 1  # version of the directory `DIRECTORY`
REMEDY = "the elastic model is damaged: make it again with lordjax compress --elastic"


class Archive(MemoryStore):
    """Entries that a `DiskStore` wrote, for reading only; new entries stay in memory.

    Args:
      directory: an elastic model.
      types: dataclasses that entries may hold, by their names; see `serialize`.
      verify: whether checksums are checked.

    Raises:
      ValueError: if the directory is no elastic model, or is damaged.
    """

    def __init__(self, directory: Path, types: Types, *, verify: bool = True):
        super().__init__()
        index = inside(directory, f"{DIRECTORY}/{INDEX}", directory)
        with reading(index, "unreadable", REMEDY):
            content = read_json(index, REMEDY)
            version = content["format"]
            if type(version) is not int or version > FORMAT:
                raise ValueError(
                    f"{index}: format {version}; this version reads up to {FORMAT}, upgrade lordjax"
                )
            self._rows: dict[str, dict[str, Any]] = content["entries"]
            if FACTS not in self._rows:
                raise ValueError("not a list of entries")
            for key, row in self._rows.items():
                _check_row(key, row)
        if verify and (directory / MANIFEST).exists():
            manifest = Manifest.read(directory)
            manifest.check_listed([f"{DIRECTORY}/{INDEX}"])
            manifest.check_files()
        self._reader = EntryReader(directory / DIRECTORY, types, REMEDY, verify=verify)

    def __contains__(self, key: str) -> bool:
        return key in self._rows or super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        """Returns an entry; its arrays are mapped, not read.

        Raises:
          ValueError: if the entry's file is missing or is not what was written.
        """
        if key not in self._rows:
            return super().__getitem__(key)
        return self._reader.tree(self._rows[key])

    def below(self, prefix: str) -> list[str]:
        """Returns the keys that begin with a prefix, the oldest first."""
        return [key for key in self._rows if key.startswith(prefix)] + super().below(prefix)


def _check_row(key: str, row: Mapping[str, Any]) -> None:
    """Raises an error unless a key has a value, or a file that was written for this key."""
    check_entry(row)
    if "file" in row and not row["file"].endswith(f"-{file_name(key)}"):
        raise ValueError(f"the file of {key[:80]} is {row['file']}, which is not its own")
