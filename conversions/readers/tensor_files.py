"""Tensor files of a checkpoint directory: safetensors or torch's ``pytorch_model.bin``."""

from __future__ import annotations

import abc
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from lordjax.names import listed
from lordjax.runtime.json_files import read_object
from lordjax.storage.saved_model import header

BFLOAT16 = np.dtype(jnp.bfloat16)
PAGES = 2**24  # most bytes of mapped pages that reading may leave in memory


class TensorFiles(Protocol):
    """Interface of a tensor reader; tensors have their Hugging Face names."""

    def names(self) -> Iterable[str]:
        """Returns the names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, without reading its values."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of a tensor, without reading its values."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Reads the values of a tensor, in the dtype of the file."""
        ...

    def where(self, name: str) -> str:
        """Returns the file and name of a tensor, for error messages."""
        ...


class _Mapped(abc.ABC):
    """Reader that maps its files into memory.

    The pages that were read count as memory until the file is unmapped. So the files are mapped
    again as soon as more than `PAGES` bytes were read. Returned values are copies, because a view
    would keep the old mapping alive.
    """

    def __init__(self, files: list[Path]):
        self._mapped = {file for file in files if self._maps(file)}
        self._handle = {file: self._open(file) for file in files}
        self._file: dict[str, Path] = {}
        for file, handle in self._handle.items():
            self._file |= dict.fromkeys(handle.keys(), file)
        self._pages: Counter[Path] = Counter()  # bytes read since the file was mapped

    @abc.abstractmethod
    def _open(self, file: Path) -> Any:
        """Opens a file as a mapping from names to tensors."""

    def _maps(self, file: Path) -> bool:
        """Returns whether the file can be mapped; otherwise it is loaded as a whole."""
        del file
        return True

    @abc.abstractmethod
    def _values(self, name: str) -> np.ndarray:
        """Reads the values of a tensor, in the dtype of the file."""

    def _tensors(self, name: str) -> Any:
        """Returns the open file that holds a tensor."""
        return self._handle[self._file[name]]

    def names(self) -> Iterable[str]:
        """Returns the names of all tensors."""
        return self._file.keys()

    def read(self, name: str) -> np.ndarray:
        """Reads the values of a tensor, in the dtype of the file."""
        values = self._values(name)
        if self._file[name] in self._mapped:
            self._pages[self._file[name]] += values.nbytes
        if self._pages.total() > PAGES:
            self._handle |= {file: self._open(file) for file in self._pages}
            self._pages.clear()
        return values

    def where(self, name: str) -> str:
        """Returns the file and name of a tensor, for error messages."""
        return f"{self._file[name]}: tensor {name}"


class Safetensors(_Mapped):
    """One or several safetensors files."""

    def _open(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(file, framework="numpy")
        except SafetensorError as error:
            raise ValueError(
                f"{file}: not a complete safetensors file ({error}); its "
                f"{file.stat().st_size} bytes are truncated or corrupt, download it again"
            ) from error

    def _values(self, name: str) -> np.ndarray:
        return self._tensors(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return header(self._tensors(name), name).shape

    def dtype(self, name: str) -> np.dtype:  # noqa: D102
        return header(self._tensors(name), name).dtype


class TorchBin(_Mapped):
    """One or several ``pytorch_model.bin`` files.

    Reading needs torch. Files are loaded with ``weights_only=True``, so no pickled code runs.
    """

    def _open(self, file: Path) -> Any:
        try:
            import torch
        except ImportError as error:
            raise ImportError(
                f"{file}: reading a torch file needs torch, which is not installed; "
                "install torch (pip install torch), or save the model as safetensors"
            ) from error
        try:
            mapped = file in self._mapped
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            return {name: tensor.detach() for name, tensor in state.items()}
        except Exception as error:  # the exception type depends on the damage
            raise ValueError(
                f"{file}: torch cannot load it as plain tensors ({_first_line(error)}). The file "
                "is truncated or corrupt, or holds other objects; download it again, or save the "
                "model as safetensors"
            ) from error

    def _maps(self, file: Path) -> bool:
        return zipfile.is_zipfile(
            file
        )  # files of torch < 1.6 are no zip files and cannot be mapped

    def _values(self, name: str) -> np.ndarray:
        import torch

        tensor = self._tensors(name)[name]
        is_bfloat16 = tensor.dtype == torch.bfloat16  # NumPy has no such dtype; same bits
        values = tensor.view(torch.int16).numpy().view(BFLOAT16) if is_bfloat16 else tensor.numpy()
        return values.copy() if self._file[name] in self._mapped else values

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return tuple(self._tensors(name)[name].shape)

    def dtype(self, name: str) -> np.dtype:  # noqa: D102
        return np.dtype(jnp.dtype(str(self._tensors(name)[name].dtype).removeprefix("torch.")))


def _first_line(error: Exception) -> str:
    """Returns the first line of an exception's message, or its type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def open_directory(path: Path) -> TensorFiles:
    """Opens the tensor files of a directory, in transformers' order of preference.

    Raises:
      FileNotFoundError: if the directory has no weights, or a shard is missing.
      ValueError: if a file is damaged.
      ImportError: if the weights are torch files and torch is not installed.
    """
    for name, reader in (("model.safetensors", Safetensors), ("pytorch_model.bin", TorchBin)):
        if (path / name).exists():
            return reader([path / name])
        if (index := path / f"{name}.index.json").exists():
            return reader(_shards(index))
    raise FileNotFoundError(
        f"{path}: no weights in this directory; expected model.safetensors or pytorch_model.bin, "
        "or one of these names followed by .index.json"
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index}: expected a key weight_map, an object from tensor names to file names, found "
            f"{weight_map!r}; download the index again"
        )
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.exists()]:
        raise FileNotFoundError(
            f"{index}: {len(missing)} of {len(files)} shards are missing: {listed(missing)}; "
            "download them into the same directory"
        )
    return files


def read_json(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
      ValueError: if the content is not a JSON object; the message names the file.
    """
    return read_object(file)
