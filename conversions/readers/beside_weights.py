"""What stands beside a model's weights: the tokenizer, and ``generation_config.json``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lordjax.conversions.readers.tensor_files import read_json
from lordjax.storage.tensor_files import write_json

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "chat_template.json"),
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
GENERATION = "generation_config.json"
# Metadata of a GGUF file -> keys of generation_config.json.
_GGUF_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_GGUF_ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message to a tool
# Control tokens that end a text or a turn wherever they exist. Files of older converters name one
# end only; runtimes of GGUF find the others by these names.
_END_NAMES = frozenset(
    """<|endoftext|> <|end_of_text|> <|eot_id|> <|eom_id|> <|im_end|> <|end|> <end_of_turn> <EOT>
    <|eot|> <|END_OF_TURN_TOKEN|> <|end_of_turn|>""".split()  # noqa: SIM905
)
_CONTROL = 3  # value of tokenizer.ggml.token_type


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
        return (PreTrainedTokenizerFast if fast else AutoTokenizer).from_pretrained(self.directory)

    def tokenizer_files(self, directory: Path) -> None:
        """Copies the tokenizer files into a directory."""
        for file in self._present():
            shutil.copyfile(file, directory / file.name)

    def _present(self) -> list[Path]:
        files = [self.directory / name for name in TOKENIZER_FILES]
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
      ValueError: if the file is no JSON object.
    """
    file = directory / GENERATION
    return read_json(file) if file.exists() else {}


def write_generation_config(config: Mapping[str, Any], directory: Path) -> None:
    """Writes ``generation_config.json`` into a directory, unless there is nothing in it."""
    if config:
        write_json(directory / GENERATION, config)


def gguf_generation_config(meta: Callable[..., Any]) -> dict[str, Any]:
    """Returns what ``generation_config.json`` would say about a GGUF file.

    Args:
      meta: function from a key of the file's metadata, and a default, to its value.
    """
    tokens = meta("tokenizer.ggml.tokens") or []
    types = meta("tokenizer.ggml.token_type") or []
    ends = {meta(f"tokenizer.ggml.{name}_token_id") for name in _GGUF_ENDS} - {None}
    ends |= {
        i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _CONTROL and token in _END_NAMES
    }
    first = meta("tokenizer.ggml.bos_token_id")
    config: dict[str, Any] = {"bos_token_id": None if first is None else int(first)}
    config["eos_token_id"] = sorted(map(int, ends)) or None
    sampling = {key: meta(f"general.sampling.{own}") for own, key in _GGUF_SAMPLING.items()}
    if any(value is not None for value in sampling.values()):
        config |= {"do_sample": True, **sampling}
    return {key: value for key, value in config.items() if value is not None}
