"""Opening Hugging Face checkpoints: a directory, a hub id or a GGUF file.

`open_checkpoint` reads the config and the names and shapes of the tensors, and verifies that they
are exactly those of the family's table. Values are read when asked for, so that a model larger
than memory can be walked block by block::

    checkpoint = open_checkpoint("HuggingFaceTB/SmolLM2-135M")
    for i in range(checkpoint.config.num_layers):
        block = checkpoint.block(i)  # {"attention": {"q": {"kernel": ...}, ...}, ...}

File formats are hidden behind `TensorFiles`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lordjax.conversions.families.registry import (
    TensorSource,
    family_of,
    model_config,
    tensor_table,
)
from lordjax.conversions.readers.tensor_files import (
    BFLOAT16,
    TensorFiles,
    open_directory,
    read_json,
)
from lordjax.kernels.trees import unflatten
from lordjax.models.config import ModelConfig

DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "vocab.txt"),
)
_EXPECTED = "expected a checkpoint directory, a .gguf file or a hub id like 'owner/model'"


class Checkpoint:
    """An opened checkpoint; made by `open_checkpoint`.

    Attributes:
      path: directory or file.
      hf_config: its ``config.json``, raw; for a GGUF file an equivalent one.
      config: the same as a `ModelConfig`.
      table: our parameter path -> tensor.
      stored_dtype: the dtype that parameters are stored in by default, by what writes a model; None
        is the dtype that they are read in.
    """

    def __init__(
        self,
        path: Path,
        hf_config: dict[str, Any],
        files: TensorFiles,
        tokens: Any,
        stored_dtype: str | None = None,
    ):
        where = str(path / "config.json") if path.is_dir() else str(path)
        self.path, self.hf_config = path, hf_config
        self.config: ModelConfig = model_config(hf_config, where)
        self.table: dict[str, TensorSource] = tensor_table(hf_config, where)
        self.stored_dtype = stored_dtype
        self._dtype: np.dtype | None = None  # of `read`; None: that of the file
        self._files, self._tokens = files, tokens
        # Checkpoints of the bare model, without its head, leave out the prefix.
        self._family, names = family_of(hf_config, where), set(files.names())
        if not any(name.startswith(self._family.prefix) for name in names):
            self._rename(lambda name: name.removeprefix(self._family.prefix))
        for new, old in self._family.old_names.items():
            if any(old in name for name in names):
                self._rename(functools.partial(_replaced, new=new, old=old))
        self._check()

    def read(self, path: str, dtype: Any = None) -> Float[np.ndarray, ...]:
        """One parameter, e.g. ``"layer_0/attention/q/kernel"``, in ``[in, out]`` layout.

        Args:
          path: a key of `table`.
          dtype: dtype to cast to; None keeps the one of the file, or of `as_stored`.

        Raises:
          KeyError: if there is no such parameter.
          ValueError: if a value is not finite, stored or after the cast, or the stored dtype is
            not one of float32, float16, bfloat16.
        """
        if path not in self.table:
            raise KeyError(f"{path}: no such parameter in {self.path}; see Checkpoint.table")
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
            with np.errstate(over="ignore"):  # what overflows is reported below
                tensor = tensor.astype(dtype)
            self._check_finite(tensor, path, f"cast to {dtype} has")
        return tensor

    def block(self, i: int, dtype: Any = None) -> dict[str, Any]:
        """Parameters of block ``i`` (without the prefix ``layer_i``); reads only that block."""
        if not 0 <= i < self.config.num_layers:
            raise IndexError(f"{self.path}: block {i}, but there are {self.config.num_layers}")
        return self._tree(lambda path: path.startswith(f"layer_{i}/"), dtype)[f"layer_{i}"]

    def non_block_params(self, dtype: Any = None) -> dict[str, Any]:
        """Parameters outside the blocks: embedding, final norm, head."""
        return self._tree(lambda path: not path.startswith("layer_"), dtype)

    def params(self, dtype: Any = None) -> dict[str, Any]:
        """All parameters as a nested dict, as `lordjax.models.transformer` takes them."""
        return self._tree(lambda path: True, dtype)

    def leaves(self) -> dict[str, Any]:
        """Parameter path -> ``ShapeDtypeStruct``, without reading values."""
        return {
            path: jax.ShapeDtypeStruct(
                source.loaded_shape,
                self._dtype or source.loaded_dtype(self._files.dtype(source.name)),
            )
            for path, source in self.table.items()
        }

    def as_stored(self) -> Checkpoint:
        """The same checkpoint, whose parameters are read in `stored_dtype`."""
        other = copy.copy(self)
        other._dtype = None if self.stored_dtype is None else np.dtype(self.stored_dtype)
        return other

    def tokenizer(self) -> Any:
        """The tokenizer, as a fast tokenizer of transformers."""
        return self._tokens.tokenizer()

    def tokenizer_files(self, directory: str | Path) -> None:
        """Writes the tokenizer into a directory, so that ``AutoTokenizer`` opens it from there."""
        self._tokens.tokenizer_files(Path(directory))

    def _rename(self, other: Callable[[str], str]) -> None:
        """Looks for the tensors of the table under other names."""
        self.table = {
            path: dataclasses.replace(source, name=other(source.name))
            for path, source in self.table.items()
        }

    def _tree(self, wanted: Callable[[str], bool], dtype: Any) -> dict[str, Any]:
        return unflatten({path: self.read(path, dtype) for path in self.table if wanted(path)})

    def _check(self) -> None:
        """Compares the names and shapes of all tensors with the table."""
        family = self._family
        expected = {source.name: source for source in self.table.values()}
        found = set(self._files.names())
        problems = [f"missing: {name} {expected[name].shape}" for name in expected.keys() - found]
        for name in found & expected.keys():
            if (shape := self._files.shape(name)) != expected[name].shape:
                place = self._files.where(name)
                problems.append(f"wrong shape: {place} is {shape}, not {expected[name].shape}")
        for name in found - expected.keys():
            tied_head = self.config.tie_embeddings and name in family.copies
            ignored = family.ignores(name) or family.ignores(family.prefix + name)
            if not tied_head and not ignored:
                shape = self._files.shape(name)
                problems.append(f"unknown: {self._files.where(name)} {shape}")
        if problems:
            raise ValueError(
                f"{self.path}: {len(problems)} tensor(s) are not those that its config describes "
                f"(family {family.model_type}, {self.config.num_layers} layers); either the config "
                "belongs to another model, or files are missing:\n  "
                + "\n  ".join(sorted(problems))
            )

    def _check_finite(self, tensor: np.ndarray, path: str, verb: str) -> None:
        finite = np.isfinite(tensor)
        if not finite.all():
            first = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise ValueError(
                f"{self._files.where(self.table[path].name)} ({path}) {verb} "
                f"{int((~finite).sum())} non-finite value(s), the first at {first}"
            )

    def _check_tied(self, path: str, tensor: np.ndarray) -> None:
        """A head beside a tied embedding must repeat it: transformers 5 would otherwise untie."""
        if not self.config.tie_embeddings:
            return
        for name, original in self._family.copies.items():
            if original != path or name not in self._files.names():
                continue
            if not np.array_equal(self._files.read(name), tensor):
                what = "embedding" if path == "embed/embedding" else self.table[path].name
                raise ValueError(
                    f"{self._files.where(name)} differs from the {what}, but tie_word_embeddings "
                    "is true; set it to false in config.json to use the head"
                )


def _replaced(name: str, new: str, old: str) -> str:
    return name.replace(new, old)


class DirectoryTokenizer:
    """The tokenizer files of a checkpoint directory."""

    def __init__(self, directory: Path):
        self.directory = directory

    def tokenizer(self) -> Any:
        """Opens them; ``tokenizer.json`` is taken as it is, where there is one."""
        self._present()
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # AutoTokenizer of transformers 5 may rebuild a tokenizer from its class's idea of the
        # pre-tokenizer, and so change the ids.
        fast = (self.directory / "tokenizer.json").exists()
        return (PreTrainedTokenizerFast if fast else AutoTokenizer).from_pretrained(self.directory)

    def tokenizer_files(self, directory: Path) -> None:
        """Copies them."""
        for file in self._present():
            shutil.copyfile(file, directory / file.name)

    def _present(self) -> list[Path]:
        files = [self.directory / name for name in TOKENIZER_FILES]
        if not (present := [file for file in files if file.exists()]):
            raise FileNotFoundError(
                f"{self.directory}: no tokenizer; expected tokenizer.json (or one of "
                f"{', '.join(TOKENIZER_FILES[3:6])}) beside the model"
            )
        return present


def open_checkpoint(path_or_id: str | Path) -> Checkpoint:
    """Opens a checkpoint and verifies its config, tensor names and shapes.

    Args:
      path_or_id: a directory with ``config.json`` and safetensors or ``pytorch_model.bin`` files
        (single, or sharded with an index), a ``.gguf`` file, or the id of a model on the Hugging
        Face hub, which is downloaded into its cache.

    Raises:
      FileNotFoundError: if there is nothing there.
      ValueError: if the config or the tensors are not understood, or a file is damaged.
    """
    path = Path(path_or_id).expanduser()
    if not path.exists():
        path = _download(str(path_or_id))
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: cannot read this file; {_EXPECTED}")
        from lordjax.conversions.readers.gguf import Gguf

        file = Gguf(path)
        return Checkpoint(path, file.hf_config, file, file, file.stored_dtype)
    config = path / "config.json"
    if not config.exists():
        raise FileNotFoundError(f"{path}: no config.json in this directory; {_EXPECTED}")
    return Checkpoint(path, read_json(config), open_directory(path), DirectoryTokenizer(path))


def read_config(path_or_id: str | Path) -> tuple[dict[str, Any], ModelConfig]:
    """The config of a model that need not be there: of a ``config.json`` alone no tensor is read.

    Args:
      path_or_id: a ``config.json``, or what `open_checkpoint` takes.

    Returns:
      In Hugging Face's words, and as a `ModelConfig`.

    Raises:
      FileNotFoundError: if there is nothing there.
      ValueError: if the config is not understood.
    """
    path = Path(path_or_id).expanduser()
    if not path.exists():
        path = _download(str(path_or_id), ["config.json"])
    if path.suffix == ".gguf":
        from lordjax.conversions.readers.gguf import Gguf

        hf_config = Gguf(path).hf_config
        return hf_config, model_config(hf_config, str(path))
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{path}: no config.json in this directory; {_EXPECTED}")
    hf_config = read_json(file)
    return hf_config, model_config(hf_config, str(file))


# Torch files are fetched only if there is nothing better: it would double the download.
_FILES = ["*.json", *TOKENIZER_FILES, "model*.safetensors"]


def _download(name: str, patterns: list[str] = _FILES) -> Path:
    """Fetches files of a model from the hub (or finds them in the hub's cache)."""
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise FileNotFoundError(f"{name}: no such file or directory; {_EXPECTED}")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
        if patterns is _FILES and not any(path.glob("model*.safetensors")):
            path = Path(
                huggingface_hub.snapshot_download(
                    name, allow_patterns=[*patterns, "pytorch_model*.bin"]
                )
            )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name}: no such file or directory here, and the Hugging Face hub did not give a "
            f"model of this id ({type(error).__name__}: {str(error).splitlines()[0]}); {_EXPECTED}"
        ) from error
    return path
