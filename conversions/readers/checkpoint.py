"""Opens a Hugging Face checkpoint: a directory, a hub id or a GGUF file.

`open_checkpoint` reads the config and the names and shapes of the tensors, and checks them against
the tensor table of the model's family. Tensor values are read on demand, so that a model larger
than memory can be processed block by block::

    checkpoint = open_checkpoint("HuggingFaceTB/SmolLM2-135M")
    for i in range(checkpoint.config.num_layers):
        block = checkpoint.block(i)  # {"attention": {"q": {"kernel": ...}, ...}, ...}

Every file format is read through the `TensorFiles` interface.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lordjax.conversions.families.config.keys import rule_out
from lordjax.conversions.families.config.normalize import OTHER_PARTS, is_multimodal
from lordjax.conversions.families.registry import (
    TensorSource,
    carried_table,
    family_of,
    model_config,
    normalized,
    tensor_table,
)
from lordjax.conversions.readers.adapter import Merged, is_adapter
from lordjax.conversions.readers.beside_weights import (
    DirectoryTokenizer,
    has_tokenizer,
    read_generation_config,
    read_license,
    write_generation_config,
)
from lordjax.conversions.readers.foreign_quantization import (
    refuse_quantized_config,
    refuse_quantized_tensors,
)
from lordjax.conversions.readers.gguf import open_gguf
from lordjax.conversions.readers.gguf.shards import is_gguf
from lordjax.conversions.readers.hub import EXPECTED, base_of_adapter, download
from lordjax.conversions.readers.tensor_check import (
    spelling,
    tensor_problems,
    with_class_count,
)
from lordjax.conversions.readers.tensor_files import (
    BFLOAT16,
    TensorFiles,
    open_directory,
)
from lordjax.kernels.trees import unflatten
from lordjax.models.config import ModelConfig
from lordjax.names import layer
from lordjax.runtime.input_files import inside, read_json, reading
from lordjax.storage.tensor_check import check_finite

DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)


class Checkpoint:
    """An opened checkpoint, as `open_checkpoint` returns it.

    Attributes:
      path: checkpoint directory or file; of an adapter, its directory.
      base_path: of an adapter, directory or file of its base model; else None.
      hf_config: content of ``config.json``, with present names and of the text part only, see
        `families.config.normalize`; for a GGUF file, an equivalent config. The number of classes
        is added if the config does not name it.
      config: the architecture as a `ModelConfig`.
      table: dict from a lordjax parameter path to the tensor that holds the parameter.
      stored_dtype: default dtype for a model that is written from this checkpoint; None means the
        dtype of the files.
      left_out: names of tensors of other modalities, which are not opened.
      notes: what was decided where the files are ambiguous, one sentence each.
    """

    def __init__(
        self,
        path: Path,
        hf_config: dict[str, Any],
        files: TensorFiles,
        tokens: Any,
        generation_config: Callable[[], dict[str, Any]],
        stored_dtype: str | None = None,
        notes: Sequence[str] = (),
    ):
        where = str(path / "config.json") if path.is_dir() else str(path)
        self.path, several = path, is_multimodal(hf_config)
        self.hf_config = hf_config = with_class_count(normalized(hf_config), files, where)
        self.base_path: Path | None = None
        self.config: ModelConfig = model_config(hf_config, where)
        self.table: dict[str, TensorSource] = tensor_table(hf_config, where)
        self.stored_dtype, self.notes = stored_dtype, tuple(notes)
        self._dtype: np.dtype | None = None  # default of `read`; None keeps the file's
        self._files, self._tokens = files, tokens
        self._generation_config = generation_config
        self._family, names = family_of(hf_config, where), set(files.names())
        carried = carried_table(hf_config)
        spell = spelling(self._family, (row.name for row in self.table.values()), names)
        self.table |= {path: row for path, row in carried.items() if spell(row.name) in names}
        self._rename(spell)
        for new, old in self._family.old_names.items():
            if any(old in name for name in names):
                self._rename(functools.partial(_replaced, new=new, old=old))
        self.left_out = tuple(n for n in names if several and re.fullmatch(OTHER_PARTS, n))
        self._check()

    def _check(self) -> None:
        """Raises ValueError if tensors are missing, unknown or of other shapes."""
        given = self._family, self.config, self.table, self._files, self.left_out
        if problems := tensor_problems(*given):
            raise ValueError(f"{self.path}: {problems}")

    def read(self, path: str, dtype: Any = None) -> Float[np.ndarray, ...]:
        """Reads one parameter, e.g. ``"layer_0/attention/q/kernel"``.

        Args:
          path: parameter path, a key of `table`.
          dtype: dtype to cast to; None keeps the dtype of the file, or the one that `as_stored`
            set.

        Returns:
          The values; kernels have the layout ``[in, out]``.

        Raises:
          KeyError: if the checkpoint has no such parameter.
          ValueError: if a value is not finite in the file or after the cast, or if the file's
            dtype is not float32, float16 or bfloat16.
        """
        if path not in self.table:
            raise KeyError(f"{self.path}: no parameter {path!r}; Checkpoint.table lists all")
        name = self.table[path].name
        tensor = self._files.read(name)
        if tensor.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise ValueError(
                f"{self._files.where(name)} ({path}) has dtype {tensor.dtype}; supported: {known}"
            )
        self._check_finite(tensor, path, "holds")
        self._check_tied(path, tensor)
        tensor = self.table[path].load(tensor)
        dtype = self._dtype if dtype is None else dtype
        if dtype is not None and tensor.dtype != (dtype := np.dtype(dtype)):
            with np.errstate(over="ignore"):  # `_check_finite` reports overflows
                tensor = tensor.astype(dtype)
            self._check_finite(tensor, path, f"cast to {dtype} has")
        return tensor

    def block(self, i: int, dtype: Any = None) -> dict[str, Any]:
        """Reads the parameters of block ``i`` as a nested dict (without the key ``layer_i``)."""
        if not 0 <= i < self.config.num_layers:
            raise IndexError(
                f"{self.path}: block {i}, but there are {self.config.num_layers} blocks"
            )
        return self._tree(lambda path: path.startswith(f"{layer(i)}/"), dtype)[layer(i)]

    def non_block_params(self, dtype: Any = None) -> dict[str, Any]:
        """Reads the parameters outside the blocks: embedding, final norm, head."""
        return self._tree(lambda path: not path.startswith("layer_"), dtype)

    def params(self, dtype: Any = None) -> dict[str, Any]:
        """Reads all parameters as the nested dict that `lordjax.models.transformer` expects."""
        return self._tree(lambda path: True, dtype)

    def leaves(self) -> dict[str, Any]:
        """Returns a ``ShapeDtypeStruct`` for every parameter path, without reading values."""
        return {
            path: jax.ShapeDtypeStruct(
                source.loaded_shape,
                self._dtype or source.loaded_dtype(self._files.dtype(source.name)),
            )
            for path, source in self.table.items()
        }

    def as_stored(self) -> Checkpoint:
        """Returns a copy of this checkpoint that reads parameters in `stored_dtype`."""
        other = copy.copy(self)
        other._dtype = None if self.stored_dtype is None else np.dtype(self.stored_dtype)
        return other

    def with_adapter(self, path: Path) -> Checkpoint:
        """Returns this checkpoint with a PEFT adapter merged in; see `readers.adapter`.

        Args:
          path: directory of the adapter. Its tokenizer, if it has one, replaces the base's.

        Raises:
          FileNotFoundError: if the adapter has no weights.
          ValueError: if it is not supported, or does not fit this model.
        """
        other = copy.copy(self)
        other.path, other.base_path = path, self.path
        other._files = Merged(self._files, path)
        if has_tokenizer(path):
            other._tokens = DirectoryTokenizer(path)
        if generation := read_generation_config(path):
            other._generation_config = lambda: generation
        other._check()
        return other

    def tokenizer(self) -> Any:
        """Returns the tokenizer as a fast tokenizer of transformers."""
        return self._tokens.tokenizer()

    def generation_config(self) -> dict[str, Any]:
        """Returns the content of ``generation_config.json``; empty if there is none.

        Of a GGUF file it is an equivalent: its end tokens, and how tokens are sampled.

        Raises:
          ValueError: if the file is no JSON object.
        """
        return self._generation_config()

    def tokenizer_files(self, directory: str | Path) -> None:
        """Writes what belongs to a model besides its weights into a directory.

        These are ``generation_config.json``, if there is one, and tokenizer files that
        ``AutoTokenizer`` can open.
        """
        write_generation_config(self.generation_config(), Path(directory))
        self._tokens.tokenizer_files(Path(directory))

    def _rename(self, other: Callable[[str], str]) -> None:
        """Changes the tensor names in the table."""
        self.table = {
            path: dataclasses.replace(source, name=other(source.name))
            for path, source in self.table.items()
        }

    def _tree(self, wanted: Callable[[str], bool], dtype: Any) -> dict[str, Any]:
        return unflatten({path: self.read(path, dtype) for path in self.table if wanted(path)})

    def _check_finite(self, tensor: np.ndarray, path: str, verb: str) -> None:
        check_finite(tensor, f"{self._files.where(self.table[path].name)} ({path}) {verb}")

    def _check_tied(self, path: str, tensor: np.ndarray) -> None:
        """Raises ValueError if a tied head is stored with other values than the embedding.

        transformers 5 unties such a head, so that the model would be another one.
        """
        if not self.config.tie_embeddings:
            return
        for name, original in self._family.copies.items():
            if original != path or name not in self._files.names():
                continue
            if not np.array_equal(self._files.read(name), tensor):
                what = "embedding" if path == "embed/embedding" else self.table[path].name
                raise ValueError(
                    f"{self._files.where(name)} differs from the {what}, but tie_word_embeddings "
                    "is true in config.json; set it to false to use the stored head"
                )


def _replaced(name: str, new: str, old: str) -> str:
    return name.replace(new, old)


def open_checkpoint(path_or_id: str | Path, *, ignore_keys: Iterable[str] = ()) -> Checkpoint:
    """Opens a checkpoint and checks its config, tensor names and shapes.

    Args:
      path_or_id: a directory with ``config.json`` and safetensors or ``pytorch_model.bin`` files
        (a single file, or shards with an index), a directory with a PEFT adapter, which is merged
        into its base model, a ``.gguf`` file, or a model id on the Hugging Face hub. A model from
        the hub is downloaded into the hub's cache.
      ignore_keys: unknown keys of ``config.json`` that the model does not depend on. They are
        noted in `Checkpoint.hf_config`, and so in everything that is made from the model.

    Returns:
      The checkpoint; tensor values are read on demand.

    Raises:
      FileNotFoundError: if there is no such path and no such model on the hub.
      ValueError: if the config or the tensors are not supported, or if a file is damaged.
      ImportError: if the checkpoint is a torch file and torch is not installed.
    """
    path = Path(path_or_id).expanduser()
    if not path.exists():
        path = download(str(path_or_id))
    if path.is_file():
        if not is_gguf(path):
            raise ValueError(f"{path}: cannot read this file; {EXPECTED}")
        file, hf_config = open_gguf(path, ignore_keys)
        generation, dtype = file.generation_config, file.stored_dtype
        return Checkpoint(path, hf_config, file, file, generation, dtype, file.notes)
    if is_adapter(path):
        name = base_of_adapter(path)
        with reading(path, f"cannot read the base model {name}", "correct the adapter's config"):
            base = open_checkpoint(name, ignore_keys=ignore_keys)
        return base.with_adapter(path)
    config = _config_of(path, inside(path, "config.json", path), ignore_keys)
    hf_config = read_license(path) | config
    generation = functools.partial(read_generation_config, path)
    files, tokens = open_directory(path), DirectoryTokenizer(path)
    refuse_quantized_tensors(files)
    return Checkpoint(path, hf_config, files, tokens, generation)


def read_config(
    path_or_id: str | Path, *, ignore_keys: Iterable[str] = ()
) -> tuple[dict[str, Any], ModelConfig]:
    """Reads the config of a model, without its tensors.

    Args:
      path_or_id: a ``config.json`` file, or an argument of `open_checkpoint`. A ``config.json``
        needs no weights beside it.
      ignore_keys: see `open_checkpoint`.

    Returns:
      The Hugging Face config as a dict, and the same architecture as a `ModelConfig`.

    Raises:
      FileNotFoundError: if there is no such path and no such model on the hub.
      ValueError: if the config is not supported.
    """
    path = Path(path_or_id).expanduser()
    if not path.exists():
        path = download(str(path_or_id), ["config.json"])
    if is_gguf(path):
        hf_config = open_gguf(path, ignore_keys)[1]
        return hf_config, model_config(hf_config, str(path))
    if is_adapter(path):
        name = base_of_adapter(path)
        with reading(path, f"cannot read the base model {name}", "correct the adapter's config"):
            return read_config(name, ignore_keys=ignore_keys)
    file = inside(path, "config.json", path) if path.is_dir() else path
    hf_config = normalized(_config_of(path, file, ignore_keys))
    return hf_config, model_config(hf_config, str(file))


def _config_of(path: Path, file: Path, ignore_keys: Iterable[str]) -> dict[str, Any]:
    """Returns the content of ``config.json``, without keys that say nothing."""
    if not file.exists():
        raise FileNotFoundError(f"{path}: no config.json in this directory; {EXPECTED}")
    hf_config = read_json(file)
    refuse_quantized_config(hf_config, str(file))
    return rule_out(hf_config, ignore_keys, str(file))
