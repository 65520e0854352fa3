"""Reads the vocabulary of a GGUF file and checks it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lordjax.conversions.readers.gguf.special_tokens import USER_DEFINED

_NORMAL = 1  # value of tokenizer.ggml.token_type


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file.

    Attributes:
      file: path of the file, for error messages.
      metadata: its metadata.
      kind: value of ``tokenizer.ggml.model``.
      pre: name of the pre-tokenizer, or None.
      tokens: text of every token.
      types: type of every token, as in ``tokenizer.ggml.token_type``.
    """

    file: Path
    metadata: Mapping[str, Any]
    kind: str
    pre: str | None
    tokens: list[str]
    types: list[int]

    def wrong(self, what: str) -> ValueError:
        """Returns the error of a damaged vocabulary."""
        return ValueError(
            f"{self.file}: damaged vocabulary: {what}; download the file again, or open the "
            "model's Hugging Face directory instead"
        )

    def items(self, key: str, kind: type) -> list[Any]:
        """Returns a list of the metadata; whole numbers are numbers, too.

        Raises:
          ValueError: if it is missing or has other values.
        """
        full, kinds = f"tokenizer.ggml.{key}", (int, float) if kind is float else (kind,)
        value = self.metadata.get(full)
        if not isinstance(value, list) or not all(type(item) in kinds for item in value):
            found = "nothing" if value is None else "other values"
            raise self.wrong(f"{full}: expected a list of type {kind.__name__}, found {found}")
        return value

    def ids(self) -> dict[str, int]:
        """Returns the id of every token."""
        return {token: i for i, token in enumerate(self.tokens)}


def read_vocabulary(
    file: Path, metadata: Mapping[str, Any], pre: str | None, rows: int
) -> Vocabulary:
    """Reads the tokens of a file.

    Args:
      file: path of the file, for error messages.
      metadata: its metadata.
      pre: name of the pre-tokenizer, or None.
      rows: rows of the token embedding.

    Raises:
      ValueError: if the vocabulary is damaged.
    """
    kind = str(metadata.get("tokenizer.ggml.model"))
    found = Vocabulary(file, metadata, kind, pre, [], [])
    tokens = found.items("tokens", str)
    types = [_NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        types = found.items("token_type", int)
    # llama.cpp names tokens without a text in this way.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if kind == "llama":
        tokens = _with_spaces(tokens, types)
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise found.wrong(
            f"{len(tokens)} tokens, {len(set(tokens))} of them different, {len(types)} token "
            "types; expected three equal numbers"
        )
    if len(tokens) > rows:
        raise found.wrong(f"{len(tokens)} tokens, but {rows} rows of the embedding")
    return dataclasses.replace(found, tokens=tokens, types=types)


def _with_spaces(tokens: list[str], types: list[int]) -> list[str]:
    """Writes user-defined tokens with spaces, as they stand in a text, where that is unambiguous.

    Other tokens of SentencePiece have U+2581 for a space, because a text is normalised before it
    is cut. User-defined tokens are cut out before that.
    """
    taken = set(tokens)
    spaced = []
    for token, kind in zip(tokens, types, strict=False):
        plain = token.replace("▁", " ")
        change = kind == USER_DEFINED and plain not in taken
        spaced.append(plain if change else token)
    return spaced + tokens[len(spaced) :]
