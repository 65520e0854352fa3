"""What the metadata of a GGUF file say about its model; wrong values are collected as problems."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lordjax.conversions.readers.gguf.header import StoredTensor

_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


class Facts:
    """Metadata and tensors of a file, as the rows of `architectures` read them.

    Attributes:
      architecture: value of ``general.architecture``.
      metadata: all metadata.
      tensors: all tensors, by their names in the file.
      problems: list that problems are appended to.
    """

    def __init__(self, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]):
        self.metadata, self.tensors = metadata, tensors
        self.problems: list[str] = []
        self.architecture = str(metadata.get("general.architecture"))

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Returns a value of the architecture.

        A list, one value per layer, is a problem if its values differ.

        Args:
          key: key without the name of the architecture.
          kind: expected type: int, float, bool or str.
          default: result if there is no such key, or a wrong value.
        """
        full = f"{self.architecture}.{key}"
        given: Any = self.metadata.get(full)
        value: Any = given
        if isinstance(given, list) and given:
            value = given[0]
            if any(other != value for other in given):
                self.problem(full, given, "one value for all layers")
        if value is None:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            self.problem(full, given, _KINDS[kind])
            return default
        return value

    def has(self, *names: str) -> bool:
        """Returns whether the first block has one of the tensors, such as ``attn_q.bias``."""
        return any(f"blk.0.{name}" in self.tensors for name in names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, by its name in the file; empty if it is missing."""
        return self.tensors[name].shape if name in self.tensors else ()

    def problem(self, what: str, value: Any, expected: str) -> None:
        """Adds a problem.

        Args:
          what: full key of the metadata.
          value: its value.
          expected: what is expected instead.
        """
        shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:76]} …"
        self.problems.append(f"metadata {what} = {shown}: expected {expected}")
