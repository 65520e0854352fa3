"""Finds and opens the files of a GGUF model that is split into several: NAME-00001-of-00003.gguf.

The first file holds the metadata; every file holds some of the tensors.
"""

from __future__ import annotations

import re
from pathlib import Path

from lordjax.conversions.readers.gguf.header import MAGIC, Header, StoredTensor, read_header
from lordjax.names import listed
from lordjax.runtime.input_files import inside

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_NO, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


def is_gguf(path: Path) -> bool:
    """Returns whether a path is a GGUF file, by its name or by its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def split_files(path: Path) -> list[Path]:
    """Returns all files of the model that a file belongs to, by the file's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return [path]
    stem, _, count, end = match.groups()
    return [path.with_name(f"{stem}-{i + 1:05}-of-{count}{end}") for i in range(int(count))]


def read_headers(path: Path) -> Header:
    """Reads the headers of all files of a model as one.

    Args:
      path: any file of the model.

    Raises:
      FileNotFoundError: if files of a split model are missing.
      ValueError: if a file is damaged or a link elsewhere, or the files do not belong together.
    """
    header = read_header(path)
    count = header.metadata.get(_COUNT, 0)
    if count in (0, 1):
        return header
    files = split_files(path)
    if len(files) != count:
        raise ValueError(
            f"{path}: one of {count} files of a model, which must be named NAME-00001-of-"
            f"{count:05}.gguf and so on; rename them"
        )
    if missing := [file.name for file in files if not file.exists()]:
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {count} files of the model are missing: "
            f"{listed(missing)}; download them into the same directory"
        )
    others = {file: inside(path.parent, file.name, path.parent) for file in files if file != path}
    return _joined([read_header(others[file]) if file in others else header for file in files])


def _joined(headers: list[Header]) -> Header:
    """Returns one header with the metadata of the first file and the tensors of all."""
    first, tensors = headers[0], {}
    for i, header in enumerate(headers):
        found = (header.metadata.get(_NO), header.metadata.get(_COUNT))
        if found != (i, len(headers)):
            raise ValueError(
                f"{header.file}: {_NO} and {_COUNT} are {found}, expected {(i, len(headers))}; "
                "the file belongs to another model, download it again"
            )
        _add(tensors, header)
    wanted = first.metadata.get(_TENSORS, len(tensors))
    if wanted != len(tensors):
        raise ValueError(
            f"{first.file}: the {len(headers)} files hold {len(tensors)} tensors, but {_TENSORS} "
            f"is {wanted}; one file belongs to another model, download them again"
        )
    return Header(first.file, first.metadata, tensors)


def _add(tensors: dict[str, StoredTensor], header: Header) -> None:
    if both := sorted(tensors.keys() & header.tensors.keys()):
        raise ValueError(
            f"{header.file}: tensor {both[0]} is in {tensors[both[0]].file.name}, too; the files "
            "belong to different models, download them again"
        )
    tensors.update(header.tensors)
