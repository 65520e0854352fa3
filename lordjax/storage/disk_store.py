"""A store of finished results on disk, so that a run can be resumed after it was killed.

An entry is a tree of arrays (nested dicts, lists and known dataclasses; see `serialize`) under a
key. The directory holds::

    run.json         the run's identity: what is made of what; equal for the same command
    lock             locked while a process works here; the lock of a killed process is released
    journal.jsonl    a line per finished entry: key, file, size, checksum
    entries/         safetensors files with the structure of the tree in their metadata

A line is written after its file is on disk, so every file that the journal names is complete. A
process that is killed loses only the entry that it was writing.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lordjax.runtime import json_files
from lordjax.runtime.input_files import check_no_links, parse_json, read_json, reading
from lordjax.storage.entry_reader import EntryReader, check_entry, file_name
from lordjax.storage.lock import LOCK, lock_directory, remove_locked
from lordjax.storage.room import no_room
from lordjax.storage.serialize import Types, to_json
from lordjax.storage.tensor_files import (
    TensorFile,
    TensorWriter,
    Written,
    sync_directory,
    write_json,
    write_tensors,
)

RUN, JOURNAL, ENTRIES = "run.json", "journal.jsonl", "entries"


class DiskStore:
    """A store of entries in a directory.

    Args:
      directory: the store's directory; is created, or opened with the entries it has.
      identity: JSON that identifies the run; it must equal that of the run that created the store.
      types: dataclasses that entries may hold, by their names; see `serialize`.

    Raises:
      BlockingIOError: if another process works in the directory.
      FileExistsError: if the directory holds files that are not a store's.
      ValueError: if the directory belongs to another run, or is damaged; says how.
    """

    durable = True

    def __init__(
        self,
        directory: str | os.PathLike[str],
        identity: Mapping[str, Any],
        types: Types | None = None,
    ):
        self.directory = Path(directory).absolute()
        self._types: Types = types or {}
        self._remedy = f"remove {self.directory} to start over"
        self._reader = EntryReader(self.directory, self._types, self._remedy)
        self._entries: dict[str, dict[str, Any]] = {}
        self._streams: list[TensorWriter] = []
        self._count = 0
        check_no_links(self.directory, self._remedy)
        known = {RUN, LOCK, JOURNAL, ENTRIES}
        if self.directory.exists() and not (self.directory / RUN).exists():
            others = {path.name for path in self.directory.iterdir()} - known - {f"{RUN}.new"}
            if others:
                raise FileExistsError(
                    f"{self.directory}: unfinished results are kept here, but it holds "
                    f"{sorted(others)[0]}, which is none; choose another output, or remove it"
                )
        self._lock = lock_directory(self.directory)
        try:
            (self.directory / ENTRIES).mkdir(exist_ok=True)
            self._same(json_files.as_read(identity))
            journal = self.directory / JOURNAL
            with reading(journal, "not a journal of finished results", self._remedy):
                self._read_journal()
        except BaseException:
            if (self.directory / RUN).exists():
                self._lock.release()
            else:  # the disk is full, say, and nothing was here
                self.remove()
            raise

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the directory; its files stay."""
        for writer in self._streams:
            writer.abandon()
        self._lock.release()

    def remove(self) -> None:
        """Removes the directory with all entries, and closes the store."""
        remove_locked(self.directory, self._lock, last=JOURNAL)
        self.close()

    @property
    def empty(self) -> bool:
        """Whether the store has no entry."""
        return not self._entries

    @property
    def open(self) -> bool:
        """Whether this process holds the directory's lock."""
        return self._lock.is_locked

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Any:
        """Returns an entry; its arrays are memory-mapped, not read.

        Raises:
          ValueError: if the file differs from what was written.
        """
        return self._reader.tree(self._entries[key])

    def arrays(self, key: str) -> TensorFile:
        """Returns the file with the arrays of an entry; raises as reading the entry does."""
        return self._reader.arrays(self._entries[key])

    def __setitem__(self, key: str, tree: Any) -> None:
        """Writes an entry to disk; replaces an older one.

        Raises:
          OSError: if the disk is full; then the older entry is still there.
        """
        arrays: dict[str, Any] = {}
        value = to_json(tree, arrays, self._types)
        if not arrays:
            self._record({"key": key, "value": value})
            return
        path = self._path(key)
        self._file(key, path, write_tensors(path, arrays, {"tree": json_files.dumps(value)}))

    def below(self, prefix: str) -> list[str]:
        """Returns the keys with a prefix, oldest first."""
        return [key for key in self._entries if key.startswith(prefix)]

    def release(self, key: str) -> None:
        """Does nothing, because entries on disk take no memory."""

    def discard(self, *keys: str) -> None:
        """Removes entries; keys without an entry are ignored."""
        there = [key for key in keys if key in self._entries]
        if there:
            self._record({"removed": there})

    def link(self, keys: list[str], directory: Path) -> dict[str, dict[str, Any]]:
        """Hard-links the files of entries into another directory on the same disk.

        Args:
          keys: keys of the entries.
          directory: the other directory. Files are numbered in the order of the keys there, so that
            their names do not tell how often the run was interrupted.

        Returns:
          A line like the journal's for each key: ``file`` (relative to the other directory),
          ``bytes`` and ``sha256``; or ``value`` for an entry without arrays.
        """
        (directory / ENTRIES).mkdir(exist_ok=True)
        rows = {}
        for number, key in enumerate(keys, 1):
            row = {name: value for name, value in self._entries[key].items() if name != "key"}
            if "file" in row:
                path = self._reader.checked_path(row)
                row["file"] = f"{ENTRIES}/{_numbered(number, key)}"
                other = directory / row["file"]
                other.unlink(missing_ok=True)  # a killed process may have left it
                _link(path, other)
            rows[key] = row
        sync_directory(directory / ENTRIES)
        return rows

    def stream(self, key: str, shapes: list[Any]) -> Stream:
        """Opens an entry that is a list of arrays, which are written one by one.

        Args:
          key: text for the name of the file; `Stream.close` is given the entry's key.
          shapes: one object with a shape and a dtype per array, in order.
        """
        path, names = self._path(key), [str(j) for j in range(len(shapes))]
        value = json_files.dumps({"list": [{"array": name} for name in names]})
        writer = TensorWriter(path, dict(zip(names, shapes, strict=True)), {"tree": value})
        self._streams = [each for each in self._streams if not each.closed] + [writer]
        return Stream(writer.add, lambda key: self._file(key, path, writer.close()))

    def _broken(self, what: str) -> None:
        raise ValueError(f"{what}; {self._remedy}")

    def _path(self, key: str) -> Path:
        self._count += 1
        return self.directory / ENTRIES / _numbered(self._count, key)

    def _file(self, key: str, path: Path, written: Written) -> None:
        self._reader.intact.add(path.name)
        file = str(path.relative_to(self.directory))
        self._record({"key": key, "file": file, **written._asdict()})

    def _record(self, row: dict[str, Any]) -> None:
        """Appends a line to the journal, then removes the files of entries that it replaces."""
        text = json_files.dumps(row).encode()
        path = self.directory / JOURNAL
        with path.open("ab", buffering=0) as journal:
            end = journal.tell()
            line = b"%08x %s\n" % (zlib.crc32(text), text)
            try:
                if journal.write(line) < len(line):
                    raise OSError("no room for a whole line")
                os.fsync(journal.fileno())
            except OSError as error:
                os.truncate(path, end)
                raise no_room(path, error, len(line)) from error
        for old in self._apply(row):
            (self.directory / old).unlink(missing_ok=True)

    def _apply(self, row: dict[str, Any]) -> list[str]:
        """Applies a line of the journal; returns the files that no entry needs any more."""
        removed = row["removed"] if "removed" in row else [row["key"]]
        old = [self._entries.pop(key, {}).get("file") for key in removed]
        if "key" in row:
            self._entries[row["key"]] = row
        return [file for file in old if file is not None]

    def _same(self, identity: dict[str, Any]) -> None:
        """Writes the run's identity; raises ValueError if the directory has another one."""
        path = self.directory / RUN
        if not path.exists():
            write_json(path, identity)
            return
        before = read_json(path, f"{path} is damaged; {self._remedy}")
        changes = list(differences(before, identity))
        if changes:
            raise ValueError(
                f"{self.directory}: this run was started with other settings (old -> new): "
                f"{'; '.join(changes)}; give the same settings to go on, or remove the directory "
                "to start over"
            )

    def _read_journal(self) -> None:
        """Reads the journal, checks the files that it names, and removes all others."""
        path = self.directory / JOURNAL
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        good = 0
        for number, line in enumerate(lines, 1):
            row = _line(line, f"{path}, line {number}")
            if row is None:
                if number < len(lines):
                    self._broken(f"{path}: line {number} of {len(lines)} is damaged")
                os.truncate(path, good)  # the process was killed while it wrote this line
                break
            good += len(line)
            _check_row(row)
            self._apply(row)
        self._count = len(lines)
        for row in self._entries.values():
            if "file" in row:
                file = self.directory / row["file"]
                if not file.is_file():
                    self._broken(f"{file} is missing, but {path} names it")
                if (size := file.stat().st_size) != row["bytes"]:
                    self._broken(f"{file} has {size} bytes, but {path} says {row['bytes']}")
        useful = {row.get("file") for row in self._entries.values()}
        for file in (self.directory / ENTRIES).iterdir():
            if str(file.relative_to(self.directory)) not in useful:
                file.unlink()  # incomplete or replaced when the process was killed
            else:
                self._count = max(self._count, int(file.name.split("-", 1)[0]))


@dataclasses.dataclass(frozen=True)
class Stream:
    """An entry that is being written.

    Attributes:
      add: function that writes the next array.
      close: function that finishes the entry under a key and syncs it to disk.
    """

    add: Callable[[Any], None]
    close: Callable[[str], None]


def _numbered(number: int, key: str) -> str:
    """Returns the name of an entry's file."""
    return f"{number:06d}-{file_name(key)}"


def _link(path: Path, other: Path) -> None:
    """Hard-links a file; copies it where the file system has no hard links."""
    try:
        os.link(path, other)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EMLINK):
            raise
        shutil.copyfile(path, other)


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Yields a text ``path: old -> new`` for every place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        shown = [json_files.dumps_measured(value) for value in (old, new)]
        yield f"{path}: {shown[0]} -> {shown[1]}"


def _check_row(row: Mapping[str, Any]) -> None:
    """Raises an error if a line of the journal neither adds an entry nor removes some."""
    keys = row["removed"] if "removed" in row else [row["key"]]
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise TypeError(f"the keys {str(keys)[:80]} are no texts")
    if "key" in row:
        check_entry(row)


def _line(line: bytes, where: str) -> dict[str, Any] | None:
    """Returns the contents of a line of the journal; None if its checksum is wrong."""
    head, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or head != b"%08x" % zlib.crc32(text):
        return None
    return parse_json(text.decode(), where)
