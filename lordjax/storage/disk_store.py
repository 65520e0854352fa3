"""Work that is kept on disk, so that it can go on after it was killed.

An entry is a tree of arrays - nested dicts, lists, and the dataclasses of `entries` - under a key::

    run.json         what is being made, and of what: the same command has the same
    lock             held as long as a process works here; a killed one lets go of it
    journal.jsonl    a line per entry that is finished: key, file, size, checksum
    entries/         safetensors with the shape of the tree in their metadata

A line is written when its file is on disk, so that whatever the journal names is whole. A process
that is killed loses the entry it was making, no other.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lordjax.storage.serialize import Types, from_json, to_json
from lordjax.storage.tensor_files import (
    TensorFile,
    TensorWriter,
    Written,
    checksum,
    sync_directory,
    write_json,
    write_tensors,
)

RUN, LOCK, JOURNAL, ENTRIES = "run.json", "lock", "journal.jsonl", "entries"


class DiskStore:
    """Entries in a directory.

    Args:
      directory: is made, or taken up where it was left.
      identity: JSON that says what is made of what; all of it decides whether this is the same.
      types: dataclasses that entries may hold, by their names; see `serialize`.

    Raises:
      BlockingIOError: if another process works there.
      FileExistsError: if the directory holds something else.
      ValueError: if the directory is that of another run, or is damaged; says how.
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
        self._entries: dict[str, dict[str, Any]] = {}
        self._checked: set[str] = set()
        self._streams: list[TensorWriter] = []
        self._count = 0
        known = {RUN, LOCK, JOURNAL, ENTRIES}
        if self.directory.exists() and not (self.directory / RUN).exists():
            others = {path.name for path in self.directory.iterdir()} - known - {f"{RUN}.new"}
            if others:
                raise FileExistsError(
                    f"{self.directory}: is where the work is kept, but holds {sorted(others)[0]}; "
                    "choose another output or remove it"
                )
        (self.directory / ENTRIES).mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.directory)
        try:
            self._same(json.loads(json.dumps(identity)))
            self._read_journal()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the directory, which stays."""
        for writer in self._streams:
            writer.abandon()
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def remove(self) -> None:
        """Removes the directory: its work is done, or there is none."""
        shutil.rmtree(self.directory)
        sync_directory(self.directory.parent)
        self.close()

    @property
    def empty(self) -> bool:
        """Whether nothing is finished."""
        return not self._entries

    @property
    def open(self) -> bool:
        """Whether this process still holds the directory."""
        return self._lock >= 0

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Any:
        """An entry; its arrays are mapped, not read.

        Raises:
          ValueError: if its file is not what was written.
        """
        if "file" not in self._entries[key]:
            return from_json(self._entries[key]["value"], {}, self._types)
        file = self.arrays(key)
        return from_json(json.loads(file.metadata["tree"]), file, self._types)

    def arrays(self, key: str) -> TensorFile:
        """The arrays of an entry, in their order; errors as of reading it."""
        row = self._entries[key]
        path = self.directory / row["file"]
        self.check(path, Written(row["bytes"], row["sha256"]))
        return TensorFile(path)

    def __setitem__(self, key: str, tree: Any) -> None:
        """Brings an entry to disk, in place of an older one.

        Raises:
          OSError: if the disk is full; the older one is still there then.
        """
        arrays: dict[str, Any] = {}
        value = to_json(tree, arrays, self._types)
        if not arrays:
            self._record({"key": key, "value": value})
            return
        path = self._path(key)
        self._file(key, path, write_tensors(path, arrays, {"tree": json.dumps(value)}))

    def below(self, prefix: str) -> list[str]:
        """Keys that begin like that, the oldest first."""
        return [key for key in self._entries if key.startswith(prefix)]

    def release(self, key: str) -> None:
        """Nothing: entries take no memory."""

    def discard(self, *keys: str) -> None:
        """Removes entries, those of them that there are."""
        there = [key for key in keys if key in self._entries]
        if there:
            self._record({"removed": there})

    def link(self, keys: list[str], directory: Path) -> dict[str, dict[str, Any]]:
        """Gives the files of entries another name each, below a directory on the same disk.

        Returns:
          key -> what the journal says of it: ``file`` (below either directory), ``bytes``,
          ``sha256``; or ``value``, of an entry without arrays.
        """
        (directory / ENTRIES).mkdir(exist_ok=True)
        rows = {}
        for key in keys:
            row = {name: value for name, value in self._entries[key].items() if name != "key"}
            if "file" in row:
                path, other = self.directory / row["file"], directory / row["file"]
                self.check(path, Written(row["bytes"], row["sha256"]))
                other.unlink(missing_ok=True)  # of a process that was killed
                os.link(path, other)
            rows[key] = row
        sync_directory(directory / ENTRIES)
        return rows

    def stream(self, key: str, shapes: list[Any]) -> Stream:
        """An entry that is a list of arrays of some shapes and dtypes, to be given one by one.

        Args:
          key: names the file; the entry's own is given when it is closed.
          shapes: anything with a shape and a dtype.
        """
        path, names = self._path(key), [str(j) for j in range(len(shapes))]
        value = json.dumps({"list": [{"array": name} for name in names]})
        writer = TensorWriter(path, dict(zip(names, shapes, strict=True)), {"tree": value})
        self._streams = [each for each in self._streams if not each.closed] + [writer]
        return Stream(writer.add, lambda key: self._file(key, path, writer.close()))

    def check(self, path: Path, written: Written) -> None:
        """Raises ValueError if a file is not what was written; what it once was it stays."""
        if path.name in self._checked:
            return
        if not path.is_file():
            self._broken(f"{path} is missing")
        if checksum(path) != written:
            self._broken(f"{path} is not what was written there (its checksum differs)")
        self._checked.add(path.name)

    def _broken(self, what: str) -> None:
        raise ValueError(f"{what}; remove {self.directory} to start over")

    def _path(self, key: str) -> Path:
        self._count += 1
        name = re.sub(r"[^\w.]+", "-", key)
        return self.directory / ENTRIES / f"{self._count:06d}-{name}.safetensors"

    def _file(self, key: str, path: Path, written: Written) -> None:
        self._checked.add(path.name)
        file = str(path.relative_to(self.directory))
        self._record({"key": key, "file": file, **written._asdict()})

    def _record(self, row: dict[str, Any]) -> None:
        """Appends to the journal; then the file of an older entry of the key is of no use."""
        text = json.dumps(row).encode()
        path = self.directory / JOURNAL
        with path.open("ab", buffering=0) as journal:
            end = journal.tell()
            try:
                line = b"%08x %s\n" % (zlib.crc32(text), text)
                if journal.write(line) < len(line):
                    raise OSError("no room for a whole line")
                os.fsync(journal.fileno())
            except OSError as error:
                os.truncate(path, end)
                raise OSError(f"{path}: cannot be written ({error}); is the disk full?") from error
        for old in self._apply(row):
            (self.directory / old).unlink(missing_ok=True)

    def _apply(self, row: dict[str, Any]) -> list[str]:
        """Takes a line of the journal into account; returns the files that it makes useless."""
        removed = row["removed"] if "removed" in row else [row["key"]]
        old = [self._entries.pop(key, {}).get("file") for key in removed]
        if "key" in row:
            self._entries[row["key"]] = row
        return [file for file in old if file is not None]

    def _same(self, identity: dict[str, Any]) -> None:
        """Writes what this run is; raises ValueError if the directory is that of another."""
        path = self.directory / RUN
        if not path.exists():
            write_json(path, identity)
            return
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            self._broken(f"{path} is damaged ({error})")
        changes = list(differences(before, identity))
        if changes:
            raise ValueError(
                f"{self.directory}: was begun with something else: {'; '.join(changes)}; "
                "give the same again to go on, or remove the directory to start over"
            )

    def _read_journal(self) -> None:
        path = self.directory / JOURNAL
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        good = 0
        for number, line in enumerate(lines, 1):
            row = _line(line)
            if row is None:
                if number < len(lines):
                    self._broken(f"{path}: line {number} of {len(lines)} is damaged")
                os.truncate(path, good)  # killed while it was written: made again
                break
            good += len(line)
            self._apply(row)
        self._count = len(lines)
        for row in self._entries.values():
            if "file" in row:
                file = self.directory / row["file"]
                if not file.is_file():
                    self._broken(f"{file} is missing, which {path} names")
                if (size := file.stat().st_size) != row["bytes"]:
                    self._broken(f"{file} has {size} bytes, {path} says {row['bytes']}")
        useful = {row.get("file") for row in self._entries.values()}
        for file in (self.directory / ENTRIES).iterdir():
            if str(file.relative_to(self.directory)) not in useful:
                file.unlink()  # half-written, or replaced, when a process was killed
            else:
                self._count = max(self._count, int(file.name.split("-", 1)[0]))


@dataclasses.dataclass(frozen=True)
class Stream:
    """An entry that is being written.

    Attributes:
      add: writes the next array.
      close: brings all to disk, under a key.
    """

    add: Callable[[Any], None]
    close: Callable[[str], None]


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Where two pieces of JSON differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {json.dumps(old)} -> {json.dumps(new)}"


def _line(line: bytes) -> dict[str, Any] | None:
    """What a line of the journal says; None if it is damaged."""
    head, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or head != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)


def _locked(directory: Path) -> int:
    """A handle that holds the directory's lock until it is closed or the process ends."""
    while True:
        handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise BlockingIOError(
                f"{directory}: another process works there; wait for it, or choose another output"
            ) from error
        try:  # whoever was there before may have removed the file meanwhile
            if os.stat(directory / LOCK).st_ino == os.fstat(handle).st_ino:
                return handle
        except FileNotFoundError:
            (directory / ENTRIES).mkdir(parents=True, exist_ok=True)
        os.close(handle)
