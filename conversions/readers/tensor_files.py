"""Tensor files of a checkpoint directory: safetensors or torch's ``pytorch_model.bin``."""

from __future__ import annotations

import abc
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from lordjax.names import listed
from lordjax.runtime.input_files import inside, read_json, reading
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
        self._intact: set[Path] = set()  # files whose checksums were compared
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
        from safetensors import safe_open

        advice = f"its {file.stat().st_size} bytes are truncated or corrupt, download it again"
        with reading(file, "not a complete safetensors file", advice):
            return safe_open(file, framework="numpy")

    def _values(self, name: str) -> np.ndarray:
        with reading(self._file[name], "not a safetensors file"):
            return self._tensors(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self._header(name).shape

    def dtype(self, name: str) -> np.dtype:  # noqa: D102
        return self._header(name).dtype

    def _header(self, name: str) -> Any:
        with reading(self._file[name], "not a safetensors file"):
            return header(self._tensors(name), name)


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
        advice = (
            "the file is truncated or corrupt, or holds other objects; download it again, or save "
            "the model as safetensors"
        )
        with reading(file, "torch cannot load it as plain tensors", advice):
            if mapped := file in self._mapped:
                _check_stored(file)
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            size = file.stat().st_size
            found = {name: _plain(name, tensor, size) for name, tensor in state.items()}
            if mapped:
                _check_storages(file, found.values())
            return found

    def _maps(self, file: Path) -> bool:
        with reading(file, "not a torch file"):  # damaged zip files raise errors
            return zipfile.is_zipfile(file)  # not of torch < 1.6, whose files cannot be mapped

    def _values(self, name: str) -> np.ndarray:
        import torch

        tensor, file = self._tensors(name)[name], self._file[name]
        if file in self._mapped and file not in self._intact:
            with reading(file, "damaged", "download it again"):
                _check_sums(file)
            self._intact.add(file)
        is_bfloat16 = tensor.dtype == torch.bfloat16  # NumPy has no such dtype; same bits
        with reading(file, "not a torch file of plain tensors"):
            values = (
                tensor.view(torch.int16).numpy().view(BFLOAT16) if is_bfloat16 else tensor.numpy()
            )
        return values.copy() if file in self._mapped else values

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return tuple(self._tensors(name)[name].shape)

    def dtype(self, name: str) -> np.dtype:  # noqa: D102
        with reading(self._file[name], "not a torch file of plain tensors"):
            return np.dtype(jnp.dtype(str(self._tensors(name)[name].dtype).removeprefix("torch.")))


def _check_stored(file: Path) -> None:
    """Raises ValueError if a member of a zip file is compressed, which torch never writes.

    So no member is larger than the file.
    """
    with zipfile.ZipFile(file) as members:
        packed = [m.filename for m in members.infolist() if m.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"{packed[0]} is compressed")


def _check_storages(file: Path, tensors: Iterable[Any]) -> None:
    """Compares the storages of mapped tensors with the members of the zip file.

    torch maps as many bytes as the pickle says, beyond the end of the member if need be.

    Raises:
      ValueError: if a storage has another size than its member.
    """
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    with zipfile.ZipFile(file) as members:
        data = [m for m in members.infolist() if re.search(r"(^|/)data/\d+$", m.filename)]
    data.sort(key=lambda member: member.header_offset)
    sizes = [member.file_size for member in data if member.file_size]
    if [storages[at] for at in sorted(storages) if storages[at]] != sizes:
        raise ValueError("its members have other sizes than its tensors")


def _check_sums(file: Path) -> None:
    """Compares the members of a zip file with their checksums, which torch does not.

    Raises:
      BadZipFile: if a member is damaged.
    """
    with zipfile.ZipFile(file) as members:
        for member in members.infolist():
            with members.open(member) as stream:
                while stream.read(PAGES):  # compares the checksum at the end
                    pass


def _plain(name: Any, tensor: Any, size: int) -> Any:
    """Returns a tensor of a torch file; raises TypeError or ValueError if it is no plain one."""
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{str(name)[:80]} is a {type(tensor).__name__}, expected a tensor")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise TypeError(f"{name[:80]} is no plain tensor in memory")
    if tensor.numel() * tensor.element_size() > size:
        raise ValueError(f"{name[:80]} {tuple(tensor.shape)} is larger than the file")
    return tensor.detach()


def open_directory(path: Path) -> TensorFiles:
    """Opens the tensor files of a directory, in transformers' order of preference.

    Raises:
      FileNotFoundError: if the directory has no weights, or a shard is missing.
      ValueError: if a file is damaged, or a link out of the directory.
      ImportError: if the weights are torch files and torch is not installed.
    """
    for name, reader in (("model.safetensors", Safetensors), ("pytorch_model.bin", TorchBin)):
        if (file := inside(path, name, path)).exists():
            return reader([file])
        if (index := inside(path, f"{name}.index.json", path)).exists():
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
    names = {str(name): name for name in weight_map.values()}
    files = [inside(index.parent, names[key], index) for key in sorted(names)]
    if missing := [file.name for file in files if not file.exists()]:
        raise FileNotFoundError(
            f"{index}: {len(missing)} of {len(files)} shards are missing: {listed(missing)}; "
            "download them into the same directory"
        )
    return files
