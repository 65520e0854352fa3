"""What stands beside a model's weights: the tokenizer, and ``generation_config.json``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lordjax.runtime.input_files import inside, read_json, reading
from lordjax.storage.tensor_files import write_json

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "chat_template.json"),
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
GENERATION = "generation_config.json"
PROBE = "a \u16a0"  # a text with a character that is in no vocabulary
_CARD_BYTES = 2**16  # of a model card in which its head ends


class DirectoryTokenizer:
    """Tokenizer files of a checkpoint directory."""

    def __init__(self, directory: Path):
        self.directory = directory

    def tokenizer(self) -> Any:
        """Opens the tokenizer; an existing ``tokenizer.json`` is used unchanged."""
        self._present()
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # AutoTokenizer of transformers 5 may replace the pre-tokenizer of tokenizer.json by the
        # default of the tokenizer's class, which changes the token ids.
        fast = (self.directory / "tokenizer.json").exists()
        opener = PreTrainedTokenizerFast if fast else AutoTokenizer
        advice = (
            "the files of the tokenizer are damaged or do not fit together; download them again"
        )
        with reading(self.directory, "no tokenizer can be opened", advice):
            found = opener.from_pretrained(
                self.directory, local_files_only=True, trust_remote_code=False
            )
            found.decode(found.encode(PROBE))  # some damage shows when a tokenizer is used
            if not isinstance(found.chat_template, str | dict | None):
                raise TypeError(f"chat_template is a {type(found.chat_template).__name__}")
            return found

    def tokenizer_files(self, directory: Path) -> None:
        """Copies the tokenizer files into a directory."""
        for file in self._present():
            shutil.copyfile(file, directory / file.name)

    def _present(self) -> list[Path]:
        files = [inside(self.directory, name, self.directory) for name in TOKENIZER_FILES]
        if not (present := [file for file in files if file.exists()]):
            raise FileNotFoundError(
                f"{self.directory}: no tokenizer; copy tokenizer.json (or one of "
                f"{', '.join(TOKENIZER_FILES[3:6])}) into the directory of the model"
            )
        return present


def has_tokenizer(directory: Path) -> bool:
    """Returns whether a directory holds a whole tokenizer, and not only its settings."""
    return any((directory / name).exists() for name in _VOCABULARIES)


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Returns the content of a model's ``generation_config.json``; empty if it has none.

    Raises:
      ValueError: if the file is no JSON object, or a link out of the directory.
    """
    file = inside(directory, GENERATION, directory)
    return read_json(file) if file.exists() else {}


def read_license(directory: Path) -> dict[str, str]:
    """Returns the licence in the head of a model's ``README.md``, as a key of a config; or {}."""
    file = directory / "README.md"
    if not file.is_file():
        return {}
    with file.open("rb") as stream:
        head = stream.read(_CARD_BYTES).decode("utf-8", "replace")
    lines = [line.strip() for line in head.splitlines()]
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    found = (line for line in lines[1 : lines.index("---", 1)] if line.startswith("license:"))
    text = next(found, "").removeprefix("license:").strip().strip("\"'")
    return {"license": text} if text else {}


def write_generation_config(config: Mapping[str, Any], directory: Path) -> None:
    """Writes ``generation_config.json`` into a directory, unless there is nothing in it."""
    if config:
        write_json(directory / GENERATION, config)
