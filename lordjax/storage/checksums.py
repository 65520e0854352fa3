"""Checksums of a directory's tensors and small files, in a manifest beside them.

::

    checksums.json   {"format": 1,
                      "tensors": {name: {"dtype", "shape", "xxh3"}},
                      "files": {name: SHA-256}}

A tensor has a checksum of its own, so that reading one tensor checks that tensor only, and a model
that is read block by block is read once. It is an XXH3, which takes less time than copying the
tensor (``docs/pages/large_models.md``), and accidents are what it has to find: no checksum that
lies beside a model protects from somebody who can write both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lordjax.names import listed
from lordjax.runtime.input_files import inside, read_json, reading

MANIFEST = "checksums.json"
FORMAT = 1  # version of the manifest
REMEDY = (
    "write or copy the directory again; to use it as it is, give --no-verify (in Python "
    "verify=False)"
)


def _xxh3(data: Any) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def _crc32(data: Any) -> str:
    return f"{zlib.crc32(data):08x}"


# By their names in the manifest. The first is written; manifests of before have the second.
_CHECKSUMS = {"xxh3": _xxh3, "crc32": _crc32}


def fingerprint(array: Any, name: str = "xxh3") -> str:
    """Returns a checksum of an array's bytes, in hexadecimal digits.

    Args:
      array: an array of any shape and dtype.
      name: ``xxh3`` (64 bits: it misses a change with a probability of 2⁻⁶⁴) or ``crc32``.
    """
    return _CHECKSUMS[name](np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def tensor_row(array: Any) -> dict[str, Any]:
    """Returns what the manifest says about a tensor: its dtype, its shape and its checksum."""
    array = np.asarray(array)
    return {**_kind(array), "xxh3": fingerprint(array)}


def _kind(array: Any) -> dict[str, Any]:
    return {"dtype": np.dtype(array.dtype).name, "shape": list(array.shape)}


def _used(row: Mapping[str, Any]) -> str:
    """Returns the name of the checksum that a row has; empty if it has none."""
    return next((name for name in _CHECKSUMS if isinstance(row.get(name), str)), "")


def file_checksum(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The checksums of a directory.

    Attributes:
      directory: the directory.
      tensors: name -> what `tensor_row` returned.
      files: path in the directory, with "/" -> SHA-256.
      remedy: advice at the end of an error message.
    """

    directory: Path
    tensors: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, str]
    remedy: str = REMEDY

    @classmethod
    def of(cls, directory: Path, tensors: Mapping[str, Mapping[str, Any]]) -> Manifest:
        """Returns the manifest of a directory that is complete.

        Every file is listed, except those that hold tensors and pages for people (``.html``).

        Args:
          directory: the directory.
          tensors: name -> what `tensor_row` returned.
        """
        skipped = (".safetensors", ".html")
        files = sorted(
            file
            for file in directory.rglob("*")
            if file.is_file() and file.suffix not in skipped and file != directory / MANIFEST
        )
        sums = {file.relative_to(directory).as_posix(): file_checksum(file) for file in files}
        return cls(directory, dict(tensors), sums)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `MANIFEST`."""
        return {"format": FORMAT, "tensors": dict(self.tensors), "files": dict(self.files)}

    @classmethod
    def read(cls, directory: Path, remedy: str = REMEDY) -> Manifest:
        """Returns the manifest in a directory.

        Args:
          directory: the directory.
          remedy: advice at the end of an error message.

        Raises:
          ValueError: if it is missing or damaged, or has a newer format.
        """
        file = inside(directory, MANIFEST, directory)
        if not file.exists():
            raise ValueError(f"{file}: is missing; {remedy}")
        with reading(file, "not a list of checksums", remedy):
            content = read_json(file, remedy)
            version, tensors, files = (content[key] for key in ("format", "tensors", "files"))
            if type(version) is not int or version > FORMAT:
                raise ValueError(f"{file}: format {version!r}, expected {FORMAT}; upgrade lordjax")
            rows = [{"dtype", "shape"} <= set(row) and _used(row) for row in tensors.values()]
            if not all(rows) or not all(isinstance(value, str) for value in files.values()):
                raise TypeError("a row of it is none")
        return cls(directory, tensors, files, remedy)

    def check_files(self) -> None:
        """Raises ValueError if a listed file is missing or was changed; names it."""
        for name, expected in self.files.items():
            file = inside(self.directory, name, self.directory / MANIFEST)
            if not file.is_file():
                raise ValueError(f"{file}: is missing, but {MANIFEST} lists it; {self.remedy}")
            if file_checksum(file) != expected:
                raise ValueError(
                    f"{file}: was changed after it was written (its checksum in {MANIFEST} "
                    f"differs); {self.remedy}"
                )

    def check_listed(self, names: Iterable[str]) -> None:
        """Raises ValueError unless small files are listed; the caller reads them."""
        if lacking := [name for name in names if name not in self.files]:
            raise ValueError(
                f"{self.directory / MANIFEST}: has no checksum of {listed(lacking)}; {self.remedy}"
            )

    def check_headers(self, found: Mapping[str, Any]) -> None:
        """Checks the names, shapes and dtypes of the tensors, without their values.

        Args:
          found: name -> an object with a shape and a dtype, of every tensor.

        Raises:
          ValueError: if they are not those that were written; names the tensors.
        """
        wrong = [f"{name} is missing" for name in self.tensors if name not in found]
        wrong += [f"{name} is unknown" for name in found if name not in self.tensors]
        for name in self.tensors.keys() & found.keys():
            row, kind = self.tensors[name], _kind(found[name])
            if kind != {key: row[key] for key in kind}:
                wrong.append(
                    f"{name} is {kind['dtype']} {kind['shape']}, not {row['dtype']} {row['shape']}"
                )
        if wrong:
            raise ValueError(
                f"{self.directory}: the tensors are not those of {MANIFEST}: "
                f"{listed(sorted(wrong))}; {self.remedy}"
            )

    def check_tensor(self, name: str, array: np.ndarray, file: Path) -> None:
        """Raises ValueError if the values of a tensor are not those that were written.

        Args:
          name: name of the tensor.
          array: its values.
          file: where they come from, for the message.
        """
        row = self.tensors[name]
        if fingerprint(array, used := _used(row)) != row[used]:
            raise ValueError(
                f"{file}: {name} was changed after it was written (its checksum in {MANIFEST} "
                f"differs); {self.remedy}"
            )
