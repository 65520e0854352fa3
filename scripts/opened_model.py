"""Models as the commands open them: of any format, with their tokenizer and checksums."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lordjax.conversions.exporters.hf_files import Opened
from lordjax.models.config import ModelConfig
from lordjax.models.source import Source
from lordjax.names import layer
from lordjax.scripts.console import say
from lordjax.scripts.flags.options import ignored_keys, verifies

if TYPE_CHECKING:
    from lordjax.generation.defaults import Defaults


@dataclasses.dataclass(frozen=True)
class Model:
    """An opened model of any format.

    Attributes:
      name: the path or hub id as it was given.
      path: its file or directory on this machine.
      kind: ``huggingface``, ``gguf``, ``native`` (a lordjax directory, not compressed) or
        ``compressed``.
      config: its architecture.
      hf_config: its config in Hugging Face's format.
      source: reads its parameters block by block.
      params: returns all of its parameters.
      stored: reads its parameters in the dtype that a command writes them in, unless a flag names
        another one: in ``stored_dtype``.
      tokenizer: opens its tokenizer.
      write_tokenizer: writes the files of its tokenizer, and ``generation_config.json`` if it has
        one, into a directory.
      generation_config: returns the content of ``generation_config.json``; empty if it has none.
      leaves: returns parameter path -> kernel or ``ShapeDtypeStruct``; weights are not read where
        the format allows it.
      stored_dtype: dtype that its weights are written in, unless a flag names another one; None:
        the dtype that they are read in.
      base_path: of an adapter, file or directory of its base model; else None.
    """

    name: str
    path: Path
    kind: str
    config: ModelConfig
    hf_config: dict[str, Any]
    source: Source
    params: Callable[[], Any]
    stored: Opened
    tokenizer: Callable[[], Any]
    write_tokenizer: Callable[[Path], None]
    generation_config: Callable[[], dict[str, Any]]
    leaves: Callable[[], dict[str, Any]]
    stored_dtype: str | None = None
    base_path: Path | None = None

    def arrays(self) -> dict[str, Any]:
        """Returns all parameters on the device; they are read block by block to save memory."""
        import jax
        import jax.numpy as jnp

        def placed(tree: Any) -> Any:
            return jax.block_until_ready(jax.tree.map(jnp.asarray, tree))

        blocks = {layer(i): placed(self.source.block(i)) for i in range(self.config.num_layers)}
        return placed(self.source.non_block_params()) | blocks

    def generation_defaults(self) -> Defaults:
        """Returns the end tokens and the sampling that the model's own files name."""
        from lordjax.generation.defaults import defaults_of

        return defaults_of(self.hf_config, self.generation_config(), self.name)

    def stop_tokens(self, tokenizer: Any, *, chat: bool = False) -> list[int]:
        """Returns the tokens that end an answer; see `generation.defaults.stop_tokens`."""
        from lordjax.generation.defaults import stop_tokens

        return stop_tokens(self.generation_defaults(), tokenizer, chat=chat)


def open_model(name: str) -> Model:
    """Opens a Hugging Face directory or hub id, a GGUF file or a lordjax directory.

    Raises:
      FileNotFoundError: if there is no such model.
      ValueError: if the model is damaged or not supported.
    """
    from lordjax.storage import saved_model

    quiet_transformers()
    path = Path(name).expanduser()
    return _native(name, path) if saved_model.is_compressed(path) else _original(name)


def _original(name: str) -> Model:
    from lordjax.conversions.readers.checkpoint import open_checkpoint

    opened = open_checkpoint(name, ignore_keys=ignored_keys())
    if count := len(opened.left_out):
        say(f"note: only the text part of {name} is opened; {count} tensors of images are left out")
    for note in opened.notes:
        say(f"note: {note}")
    return Model(
        name=name,
        path=opened.path,
        kind="gguf" if opened.path.is_file() else "huggingface",
        config=opened.config,
        hf_config=opened.hf_config,
        source=opened,
        params=opened.params,
        stored=opened.as_stored(),
        tokenizer=opened.tokenizer,
        write_tokenizer=opened.tokenizer_files,
        generation_config=opened.generation_config,
        leaves=opened.leaves,
        stored_dtype=opened.stored_dtype,
        base_path=opened.base_path,
    )


def _native(name: str, path: Path) -> Model:
    from lordjax.conversions.readers.beside_weights import (
        DirectoryTokenizer,
        read_generation_config,
        write_generation_config,
    )
    from lordjax.storage import saved_model

    saved = saved_model.open_saved(path, verify=verifies())
    for note in saved.notes:
        say(f"note: {note}")
    tokens = DirectoryTokenizer(path)
    generation = functools.partial(read_generation_config, path)

    def write(directory: Path) -> None:
        write_generation_config(generation(), directory)
        tokens.tokenizer_files(directory)

    return Model(
        name=name,
        path=path,
        kind="native" if saved.is_original() else "compressed",
        config=saved.config,
        hf_config=saved.hf_config,
        source=saved,
        params=saved.params,
        stored=saved,
        tokenizer=tokens.tokenizer,
        write_tokenizer=write,
        generation_config=generation,
        leaves=saved.leaves,
    )


def weight_files(path: Path) -> list[Path]:
    """Returns the files that hold a model's weights; of an adapter, its own."""
    if path.is_file():
        from lordjax.conversions.readers.gguf.shards import split_files

        return [file for file in split_files(path) if file.exists()]
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


def file_bytes(path: Path) -> int:
    """Returns the bytes of the files that hold a model's weights."""
    return sum(file.stat().st_size for file in weight_files(path))


def model_checksums(model: Model) -> dict[str, str]:
    """Returns file name -> sha256 of a model's weights and config, and of an adapter's base."""
    from lordjax.storage.tensor_files import checksum

    found = {}
    folders = {"": model.path} | ({} if model.base_path is None else {"base/": model.base_path})
    for prefix, path in folders.items():
        configs = [path / name for name in ("config.json", "adapter_config.json")]
        files = [*weight_files(path), *filter(Path.exists, configs)]
        found |= {prefix + file.name: checksum(file).sha256 for file in files}
    return found


def directory_bytes(path: Path) -> int:
    """Returns the bytes of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def quiet_transformers() -> None:
    """Silences warnings of transformers about long texts, which are cut into windows here."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def tokenizer_writer(model: Model) -> Callable[[Path], None]:
    """Returns what writes the model's tokenizer and ``generation_config.json``.

    Both are written once for a test, so that an error is found before the work begins. Without a
    tokenizer, which is noted, only the latter is written.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.write_tokenizer(Path(folder))
    except FileNotFoundError as error:
        from lordjax.conversions.readers.beside_weights import write_generation_config

        say(f"note: the result will have no tokenizer ({error})")
        return functools.partial(write_generation_config, model.generation_config())
    return model.write_tokenizer
