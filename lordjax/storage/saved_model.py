"""Opens a saved model from its metadata; reads it block by block or as a whole."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lordjax.allocation.plan import Plan
from lordjax.kernels import trees
from lordjax.kernels.base import Kernel
from lordjax.models.config import ModelConfig
from lordjax.models.head_axes import ROPE_INDEX
from lordjax.models.output_heads import CARRIED
from lordjax.models.transformer import parameter_shapes
from lordjax.names import layer, listed
from lordjax.runtime.input_files import inside, read_json, reading
from lordjax.storage.assembly import assemble, check_fields, check_kernels
from lordjax.storage.checkpoint import FORMAT, INDEX, MANIFEST_KEY, PLAN, REPORT
from lordjax.storage.checksums import MANIFEST, Manifest
from lordjax.storage.tensor_check import check_finite, check_parameters
from lordjax.storage.tensor_files import DTYPES, TensorFile


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a directory that `checkpoint.save` wrote."""
    try:
        return "lordjax" in read_json(inside(Path(path), "config.json", Path(path)))
    except (OSError, ValueError):
        return False


def header(file: Any, name: str) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of a tensor in an open safetensors file, without reading its values.

    Raises:
      ValueError: if the dtype is not supported.
    """
    view = file.get_slice(name)
    if view.get_dtype() not in DTYPES:
        raise ValueError(
            f"{name}: dtype {view.get_dtype()} is not supported; expected one of "
            f"{', '.join(DTYPES)}"
        )
    return jax.ShapeDtypeStruct(tuple(view.get_shape()), np.dtype(DTYPES[view.get_dtype()]))


@dataclasses.dataclass(frozen=True)
class Saved:
    """An open model directory; tensors are read on request.

    Implements `models.source.Source`, so a compressed model can be compressed again.

    Attributes:
      directory: the model directory.
      config: the model's architecture.
      hf_config: contents of the original ``config.json``.
      meta: metadata of `checkpoint.describe`.
      files: name of the file that holds each tensor.
      opened: the files by their names.
      manifest: checksums of the tensors; None if they are not checked.
      notes: what the user should know about the directory, one sentence each.
    """

    directory: Path
    config: ModelConfig
    hf_config: dict[str, Any]
    meta: dict[str, Any]
    files: dict[str, str]
    opened: dict[str, TensorFile]
    manifest: Manifest | None = None
    notes: tuple[str, ...] = ()

    def read(self, prefix: str = "") -> dict[str, Any]:
        """Reads the parameters below a path as a nested dict with kernels.

        Args:
          prefix: "/"-separated path; empty reads all parameters.

        Raises:
          KeyError: if there is no parameter below the path.
          ValueError: if a file is damaged, a value is not finite or not what was written, or the
            tensors of a kernel do not fit together; names them.
        """

        def below(path: str) -> bool:
            return not prefix or f"{path}/".startswith(f"{prefix}/")

        wanted = [name for name in self.files if below(name)]
        if not wanted:
            raise KeyError(f"{self.directory}: no parameter below {prefix!r}")
        tree = self._tree(self._values(wanted))
        return functools.reduce(lambda at, key: at[key], prefix.split("/") if prefix else [], tree)

    def leaves(self) -> dict[str, Any]:
        """Returns a ``ShapeDtypeStruct``, or a kernel of them, for every parameter path.

        Raises:
          ValueError: if the tensors of a kernel do not fit together; names it.
        """
        return trees.flatten(self._tree(self.shapes()))

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shape and dtype of every tensor by its name on disk."""
        return {name: self.opened[file].shape(name) for name, file in self.files.items()}

    def is_original(self) -> bool:
        """Whether nothing is compressed: all parameters are dense and have the original shapes."""
        rest, block = parameter_shapes(self.config)
        blocks = (layer(i) for i in range(self.config.num_layers))
        original = rest | {f"{name}/{path}": block[path] for name in blocks for path in block}
        leaves = {p: leaf for p, leaf in self.leaves().items() if p.split("/")[0] not in CARRIED}
        return leaves.keys() == original.keys() and all(
            not isinstance(leaf, Kernel) and leaf.shape == original[path].shape
            for path, leaf in leaves.items()
        )

    def _tree(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Returns tensors as a nested dict with kernels."""
        with reading(self.directory, "its tensors do not fit together"):
            return assemble(arrays, self.meta)

    def _values(self, names: list[str]) -> dict[str, np.ndarray]:
        """Reads tensors; large ones are checked in another thread while the next one is read."""
        arrays, checks = {}, []
        with ThreadPoolExecutor(1) as pool:
            for name in names:
                file = self.opened[self.files[name]]
                try:
                    arrays[name] = file.read(name)
                except OSError as error:
                    raise ValueError(
                        f"{file.path}: cannot be read ({error}); write or download the model again"
                    ) from error
                if arrays[name].nbytes < 2**16:  # handing it over would take longer
                    self._check(name, arrays[name])
                else:
                    checks.append(pool.submit(self._check, name, arrays[name]))
            for check in checks:
                check.result()
        return arrays

    def _check(self, name: str, array: np.ndarray) -> None:
        """Raises ValueError if the values of a tensor are not what they should be."""
        file = self.directory / self.files[name]
        if self.manifest is not None:
            self.manifest.check_tensor(name, array, file)
        check_finite(array, f"{file}: {name} holds")
        pairs = self.config.head_size // 2
        if name.endswith(ROPE_INDEX) and ((array < 0) | (array >= pairs)).any():
            raise ValueError(f"{file}: {name} holds an index outside 0 to {pairs - 1}")

    def block(self, i: int) -> dict[str, Any]:
        """Returns the parameters of block ``i`` as a nested dict."""
        return self.read(layer(i))

    def non_block_params(self) -> dict[str, Any]:
        """Returns the parameters outside the blocks as a nested dict."""
        tops = dict.fromkeys(name.split("/", 1)[0] for name in self.files)
        return {top: self.read(top) for top in tops if not top.startswith("layer_")}

    def params(self) -> dict[str, Any]:
        """Returns all parameters as a nested dict."""
        return self.read()

    def file_bytes(self) -> int:
        """Returns the total size in bytes of the files that hold tensors."""
        return sum(file.path.stat().st_size for file in self.opened.values())

    def report(self) -> dict[str, Any]:
        """Returns the contents of ``report.json``; empty if there is no such file.

        Raises:
          ValueError: if the file is no JSON object.
        """
        file = inside(self.directory, REPORT, self.directory)
        return read_json(file) if file.exists() else {}

    def plan(self) -> Plan | None:
        """Returns the compression plan; None if there is no ``plan.json``.

        Raises:
          ValueError: if the file is no plan.
        """
        file = inside(self.directory, PLAN, self.directory)
        return Plan.read(file) if file.exists() else None


def open_saved(directory: str | os.PathLike[str], *, verify: bool = True) -> Saved:
    """Opens a directory that `checkpoint.save` wrote, without reading the values of tensors.

    Names, shapes and dtypes of all tensors are compared with the config, and they and all small
    files with their checksums. The values of a tensor are checked when it is read.

    Args:
      directory: the directory.
      verify: whether checksums are checked; everything else always is.

    Raises:
      ValueError: if the directory was not written by `checkpoint.save`, has a newer format, is
        incomplete, or was changed after it was written.
    """
    directory = Path(directory)
    file = inside(directory, "config.json", directory)
    hf_config = read_json(file) if file.exists() else {}
    if "lordjax" not in hf_config:
        raise ValueError(
            f'{directory}: no config.json with a "lordjax" entry; expected a model directory that '
            "lordjax wrote"
        )
    meta = hf_config.pop("lordjax")
    config = _checked_entry(file, meta)
    index = _index(directory)
    with reading(directory, "its tensors are not those of its config"):
        check_fields(directory, meta, index)
        saved = Saved(directory, config, hf_config, meta, index, _open_files(directory, index))
        check_parameters(config, saved.leaves())
    if not verify:
        return saved
    if MANIFEST_KEY in meta or (directory / MANIFEST).exists():
        return dataclasses.replace(saved, manifest=_checked_manifest(saved))
    note = (
        f"{directory} was written by lordjax {meta.get('version')}, which kept no checksums: "
        "changed values are not noticed (lordjax convert writes it again with checksums)"
    )
    return dataclasses.replace(saved, notes=(note,))


def _checked_entry(file: Path, meta: Any) -> ModelConfig:
    """Returns the architecture in the "lordjax" entry of ``config.json``; checks all of it."""
    with reading(file, "damaged lordjax entry"):
        if meta["format"] > FORMAT:
            raise ValueError(
                f"{file}: format {meta['format']}, written by lordjax {meta['version']}; this "
                f"version reads formats up to {FORMAT}; upgrade lordjax"
            )
        check_kernels(meta)
        config = ModelConfig.from_json(meta["model"])
    with reading(file, "no model has these settings"):
        parameter_shapes(config)
    return config


def _index(directory: Path) -> dict[str, str]:
    """Returns the name of the file that holds each tensor."""
    with reading(directory / INDEX, "unreadable index"):
        files = dict(read_json(inside(directory, INDEX, directory))["weight_map"])
        found = {name: inside(directory, name, directory / INDEX) for name in set(files.values())}
        missing = sorted(name for name, file in found.items() if not file.is_file())
    if missing:
        raise ValueError(f"{directory}: files named in the index are missing: {listed(missing)}")
    return files


def _open_files(directory: Path, index: Mapping[str, str]) -> dict[str, TensorFile]:
    """Opens the files of the tensors; checks that the index names exactly what they hold."""
    opened = {file: TensorFile(directory / file) for file in sorted(set(index.values()))}
    for name, file in index.items():
        if name not in opened[file]:
            raise ValueError(f"{directory / file}: has no tensor {name}, which the index names")
    for file, there in opened.items():
        if unlisted := sorted(name for name in there if index.get(name) != file):
            raise ValueError(
                f"{directory / file}: holds tensors that the index does not name: "
                f"{listed(unlisted)}"
            )
    return opened


def _checked_manifest(saved: Saved) -> Manifest:
    """Returns the manifest, after everything but the values of tensors was compared with it."""
    manifest = Manifest.read(saved.directory)
    beside = [name for name in (PLAN, REPORT) if (saved.directory / name).exists()]
    manifest.check_listed(["config.json", INDEX, *beside])
    manifest.check_headers(saved.shapes())
    manifest.check_files()
    return manifest
