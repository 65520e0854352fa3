"""An open GGUF file: config, tensors and tokenizer of its model.

The metadata becomes the ``config.json`` that the model has on the Hugging Face hub, and tensors get
their Hugging Face names and layouts, so that `families.registry` handles both formats. Values are
dequantised to float32 when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lordjax.conversions.families.config.keys import rule_out
from lordjax.conversions.readers.gguf.architectures.row import Architecture
from lordjax.conversions.readers.gguf.config import architecture_of, config_json
from lordjax.conversions.readers.gguf.decode import FLOATS, difference, read_values, same_bytes
from lordjax.conversions.readers.gguf.facts import Facts
from lordjax.conversions.readers.gguf.header import StoredTensor
from lordjax.conversions.readers.gguf.layouts import Heads, transposed
from lordjax.conversions.readers.gguf.shards import read_headers
from lordjax.conversions.readers.gguf.special_tokens import generation_config
from lordjax.conversions.readers.gguf.tokenizer import rebuild
from lordjax.conversions.readers.gguf.vocabulary import read_vocabulary
from lordjax.names import did_you_mean
from lordjax.runtime import json_files
from lordjax.runtime.input_files import reading

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_IMAGES = ("v.", "mm.")  # beginnings of the names of tensors of images
_ROUNDING = 0.5  # largest relative difference of two roundings of one matrix; else it is about 1.4
# Rotary tables follow from the config. The scale of inputs is for runtimes that quantise them.
_UNUSED = re.compile(r"rope_\w+\.weight|blk\.\d+\.attn_rot_embd\.weight|.+\.input_scale")


class Gguf:
    """An open GGUF file: a `tensor_files.TensorFiles` with a config and a tokenizer.

    Attributes:
      path: path of the GGUF file; of a split model, of any of its files.
      hf_config: equivalent ``config.json``; both transformers 4 and 5 can read it. Its
        ``eos_token_id`` is a list if several tokens end a text or a turn.
      notes: what was decided where the file is ambiguous, one sentence each.

    Args:
      path: see ``path``.
      ignored: full metadata keys that are left out of account if they are not understood.

    Raises:
      FileNotFoundError: if files of a split model are missing.
      ValueError: if a file is damaged, or its architecture, metadata or types are not supported.
    """

    def __init__(self, path: Path, ignored: Collection[str] = ()):
        self.path = path
        header = read_headers(path)
        facts = Facts(header.metadata, header.tensors)
        self._metadata = header.metadata
        self.notes: tuple[str, ...] = ()
        try:
            self._row = architecture_of(facts)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        absent = [key for key in ignored if key not in header.metadata]
        if absent:
            hint = did_you_mean(absent[0], header.metadata)
            raise ValueError(f"--ignore-key {absent[0]}: {path} has no such key; {hint}")
        self.hf_config = config_json(facts, self._row, ignored)
        if facts.problems:
            raise ValueError(
                f"{path}: {len(facts.problems)} thing(s) in it are not supported:\n  "
                + "\n  ".join(facts.problems)
            )
        stored = {n: t for n, t in facts.tensors.items() if not _UNUSED.fullmatch(n)}
        self._leave_out_images(stored)
        self._choose_head(stored)
        self._tensors = {hf_name(name, self._row): tensor for name, tensor in stored.items()}
        self._scales = {
            f"{name.removesuffix('.scale')}.weight": self._tensors.pop(name)
            for name in list(self._tensors)
            if name.endswith(".scale") and f"{name.removesuffix('.scale')}.weight" in self._tensors
        }

    def meta(self, key: str, default: Any = None) -> Any:
        """Returns a metadata value; floats get the shortest decimal that rounds to them."""
        return self._metadata.get(key, default)

    @property
    def stored_dtype(self) -> str | None:
        """Default dtype of a model that is written from this file.

        A file with quantised weights gives bfloat16, which is precise enough for weights of few
        bits. None means that no weight is quantised; weights keep the dtype of `read`.
        """
        kinds = {tensor.kind for tensor in self._tensors.values()}
        return "bfloat16" if kinds - set(FLOATS) else None

    def generation_config(self) -> dict[str, Any]:
        """Returns what ``generation_config.json`` would say about this file."""
        return generation_config(self._metadata)

    def names(self) -> Iterable[str]:  # noqa: D102
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        shape = self._tensors[name].shape
        return shape[::-1] if self._layout(name) is transposed else shape

    def dtype(self, name: str) -> np.dtype:
        """Returns float32, the dtype of `read` for every quantisation."""
        del name
        return np.dtype(np.float32)

    def where(self, name: str) -> str:  # noqa: D102
        tensor = self._tensors[name]
        return f"{tensor.file}: tensor {tensor.name}"

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor in float32, in Hugging Face's layout."""
        values, layout = read_values(self._tensors[name]), self._layout(name)
        queries = self.hf_config[self._row.num_heads]
        heads = Heads(queries, self.hf_config.get("num_key_value_heads", queries))
        with np.errstate(all="ignore"):  # who reads parameters names values that are not finite
            if name in self._scales:  # one factor of the whole tensor, beside small floats
                values = values * read_values(self._scales[name])
            return values if layout is None else layout(values, heads)

    def tokenizer(self) -> Any:
        """Returns the file's tokenizer as a fast tokenizer of transformers."""
        from transformers import PreTrainedTokenizerFast

        tokenizer, config = self._rebuild_tokenizer()
        del config["tokenizer_class"]
        with reading(self.path, "no tokenizer can be made"):
            name = str(self.path)  # for error messages
            return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path=name, **config)

    def tokenizer_files(self, directory: Path) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json`` with the chat template."""
        tokenizer, config = self._rebuild_tokenizer()
        tokenizer.save(str(directory / "tokenizer.json"))
        text = json_files.dumps(config, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def _rebuild_tokenizer(self) -> tuple[Any, dict[str, Any]]:
        pre = self.meta("tokenizer.ggml.pre") or self._row.pre_tokenizer
        rows = self.hf_config["vocab_size"]
        with reading(self.path, "no tokenizer can be made"):
            vocabulary = read_vocabulary(self.path, self._metadata, pre, rows)
            return rebuild(vocabulary, self.hf_config[self._row.max_positions])

    def _layout(self, name: str) -> Any:
        match = re.fullmatch(r"(?:blk\.\d+\.)?(\w+)\.\w+", self._tensors[name].name)
        return None if match is None else self._row.layouts.get(match[1])

    def _leave_out_images(self, stored: dict[str, StoredTensor]) -> None:
        """Leaves out the tensors of a vision tower, which some files hold beside the text part."""
        images = [name for name in stored if name.startswith(_IMAGES)]
        for name in images:
            del stored[name]
        if images:
            self.notes += (
                f"{self.path}: only the text part is opened; {len(images)} tensors of images, such "
                f"as {images[0]}, are left out",
            )

    def _choose_head(self, stored: dict[str, StoredTensor]) -> None:
        """Ties the head to the embedding if they are equal; says so if they only nearly are."""
        if _HEAD not in stored or _EMBEDDING not in stored:
            return
        head, embedding = stored[_HEAD], stored[_EMBEDDING]
        if same_bytes(head, embedding):
            del stored[_HEAD]
            self.hf_config["tie_word_embeddings"] = True
        elif (error := difference(head, embedding)) < _ROUNDING:
            self.notes += (
                f"{self.path}: {_EMBEDDING} ({embedding.kind}) and {_HEAD} ({head.kind}) hold the "
                f"same matrix with different rounding (they differ by {error:.1%}); each is taken "
                "for what its name says, so the embedding and the head are not tied",
            )


def hf_name(name: str, row: Architecture) -> str:
    """Returns the Hugging Face name of a tensor; unknown names are returned unchanged."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias|scale)", name)
    if match is None or match[2] not in row.tensors:
        return name
    template = row.tensors[match[2]]
    if (match[1] is None) == ("{i}" in template):
        return name
    return f"{template.format(i=match[1])}.{match[3]}"


def open_gguf(path: Path, ignore_keys: Iterable[str]) -> tuple[Gguf, dict[str, Any]]:
    """Opens a GGUF file without the keys that the user has ruled out.

    Args:
      path: the file.
      ignore_keys: names of metadata, which have dots, and of the equivalent config.

    Returns:
      The file, and its config with a note of these keys.

    Raises:
      ValueError: if the file is damaged or not supported, or has no such key.
    """
    names = set(ignore_keys)
    full = {name for name in names if "." in name}
    file = Gguf(path, full)
    return file, rule_out(file.hf_config, names - full, str(path), full)
