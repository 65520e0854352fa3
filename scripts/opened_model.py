"""Models as the commands open them: any format, with tokenizer and checksums."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lordjax.conversions.exporters.hf_files import Opened
from lordjax.models.config import ModelConfig
from lordjax.models.source import Source


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as the verbs see it, wherever it comes from.

    Attributes:
      name: the path or hub id as it was given.
      path: where it is on this machine.
      kind: ``huggingface``, ``gguf``, ``native`` (ours, nothing compressed) or ``compressed``.
      config: what it is.
      hf_config: the same in Hugging Face's words.
      source: its parameters, a block at a time.
      params: all of its parameters.
      stored: its parameters as a verb writes them where no flag names a dtype: in ``stored_dtype``.
      tokenizer: opens its tokenizer.
      write_tokenizer: writes the tokenizer's files into a directory.
      leaves: parameter path -> kernel or ``ShapeDtypeStruct``, without reading weights if possible.
      stored_dtype: the dtype that its weights are written in where no flag names one; None is the
        dtype that they are read in.
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
    leaves: Callable[[], dict[str, Any]]
    stored_dtype: str | None = None

    def arrays(self) -> dict[str, Any]:
        """All of its parameters where jax computes, read a block at a time: never held twice."""
        import jax
        import jax.numpy as jnp

        def placed(tree: Any) -> Any:
            return jax.block_until_ready(jax.tree.map(jnp.asarray, tree))

        blocks = {f"layer_{i}": placed(self.source.block(i)) for i in range(self.config.num_layers)}
        return placed(self.source.non_block_params()) | blocks


def open_model(name: str) -> Model:
    """Opens a Hugging Face directory or hub id, a GGUF file or a directory of ours.

    Raises:
      FileNotFoundError: if there is no such model.
      ValueError: if it cannot be read or is not supported.
    """
    from lordjax.storage import saved_model

    quiet_transformers()
    path = Path(name).expanduser()
    return _native(name, path) if saved_model.is_compressed(path) else _original(name)


def _original(name: str) -> Model:
    from lordjax.conversions.readers.checkpoint import open_checkpoint

    opened = open_checkpoint(name)
    return Model(
        name=name,
        path=opened.path,
        kind="gguf" if opened.path.suffix == ".gguf" else "huggingface",
        config=opened.config,
        hf_config=opened.hf_config,
        source=opened,
        params=opened.params,
        stored=opened.as_stored(),
        tokenizer=opened.tokenizer,
        write_tokenizer=opened.tokenizer_files,
        leaves=opened.leaves,
        stored_dtype=opened.stored_dtype,
    )


def _native(name: str, path: Path) -> Model:
    from lordjax.conversions.readers.checkpoint import DirectoryTokenizer
    from lordjax.storage import saved_model

    saved = saved_model.open_saved(path)
    tokens = DirectoryTokenizer(path)
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
        write_tokenizer=tokens.tokenizer_files,
        leaves=saved.leaves,
    )


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights."""
    if path.is_file():
        return [path]
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


def file_bytes(path: Path) -> int:
    """Size of the files that hold a model's weights."""
    return sum(file.stat().st_size for file in weight_files(path))


def model_checksums(path: Path) -> dict[str, str]:
    """File -> sha256, of a model's weights and ``config.json``."""
    from lordjax.storage.tensor_files import checksum

    files = [*weight_files(path), *path.glob("config.json")]
    return {file.name: checksum(file).sha256 for file in files}


def directory_bytes(path: Path) -> int:
    """Size of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def quiet_transformers() -> None:
    """Texts longer than a model's context are cut into windows here; no need to warn of them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
