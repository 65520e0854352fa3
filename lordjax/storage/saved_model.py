"""Opens a saved model from its metadata; reads it block by block or as a whole."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from lordjax.allocation.plan import Plan
from lordjax.kernels import base, normal_float, trees
from lordjax.kernels.base import Kernel
from lordjax.kernels.kinds import KINDS, check
from lordjax.kernels.layout import Layout
from lordjax.models.config import ModelConfig
from lordjax.models.output_heads import CARRIED
from lordjax.models.transformer import init
from lordjax.names import layer, listed
from lordjax.storage.checkpoint import FORMAT, INDEX
from lordjax.storage.tensor_files import DTYPES


def _kernel(kind: str, tensors: Mapping[str, Any], constants: Mapping[str, Any]) -> Kernel:
    """Returns a kernel from its tensors and the constants that `shards.describe` wrote."""
    if "format" in constants:
        constants = {**constants, "format": normal_float.Format.parse(constants["format"])}
    if "layout" in constants:
        constants = {**constants, "layout": Layout.parse(constants["layout"])}
    return KINDS[kind](**tensors, **constants)


def assemble(arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Puts parameters together from tensors; the inverse of `shards.tensors`.

    Args:
      arrays: tensors by their names on disk; some or all, but with all tensors of each kernel.
      meta: metadata from `checkpoint.describe`.

    Returns:
      The parameters as a nested dict with kernels.

    Raises:
      ValueError: if the tensors of a kernel do not fit together; names the kernel.
    """
    tree = trees.unflatten(arrays)
    kinds, constants = meta["kinds"], meta.get("constants", {})
    inside = {path for path in kinds if any(name.startswith(f"{path}/") for name in arrays)}
    for path in sorted(inside, key=len, reverse=True):  # the innermost kernels first
        *branches, name = path.split("/")
        node = functools.reduce(lambda at, key: at[key], branches, tree)
        try:
            node[name] = _kernel(kinds[path], node[name], constants.get(path, {}))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    for path, leaf in trees.flatten(tree).items():
        check(leaf, path)
    return tree


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a directory that `checkpoint.save` wrote."""
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "lordjax" in config


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
    """

    directory: Path
    config: ModelConfig
    hf_config: dict[str, Any]
    meta: dict[str, Any]
    files: dict[str, str]

    def read(self, prefix: str = "") -> dict[str, Any]:
        """Reads the parameters below a path as a nested dict with kernels.

        Args:
          prefix: "/"-separated path; empty reads all parameters.

        Raises:
          KeyError: if there is no parameter below the path.
          ValueError: if a file is damaged, or the tensors of a kernel do not fit together; names
            them.
        """

        def below(path: str) -> bool:
            return not prefix or f"{path}/".startswith(f"{prefix}/")

        wanted = [name for name in self.files if below(name)]
        if not wanted:
            raise KeyError(f"{self.directory}: no parameter below {prefix!r}")
        tree = self._tree(wanted, lambda file, name: file.get_tensor(name))
        return functools.reduce(lambda at, key: at[key], prefix.split("/") if prefix else [], tree)

    def leaves(self) -> dict[str, Any]:
        """Returns a ``ShapeDtypeStruct``, or a kernel of them, for every parameter path.

        Reads only the headers of the files.

        Raises:
          ValueError: as `read`.
        """
        return trees.flatten(self._tree(list(self.files), header))

    def is_original(self) -> bool:
        """Whether nothing is compressed: all parameters are dense and have the original shapes."""
        make = functools.partial(init, self.config)
        original = trees.flatten(jax.eval_shape(make, jax.random.key(0)))
        leaves = {p: leaf for p, leaf in self.leaves().items() if p.split("/")[0] not in CARRIED}
        return leaves.keys() == original.keys() and all(
            not isinstance(leaf, Kernel) and leaf.shape == original[path].shape
            for path, leaf in leaves.items()
        )

    def _tree(self, names: list[str], read: Callable[[Any, str], Any]) -> dict[str, Any]:
        """Returns the named tensors as a nested dict with kernels."""
        arrays = self._arrays(names, read)
        try:
            return assemble({name: arrays[name] for name in names}, self.meta)
        except ValueError as error:
            raise ValueError(f"{self.directory}: {error}") from error

    def _arrays(self, names: list[str], read: Callable[[Any, str], Any]) -> dict[str, Any]:
        """Returns ``read(file, name)`` for every name; opens every file once."""
        arrays = {}
        for file in dict.fromkeys(self.files[name] for name in names):
            try:
                with safetensors.safe_open(self.directory / file, framework="numpy") as handle:
                    for name in names:
                        if self.files[name] == file:
                            arrays[name] = read(handle, name)
            except (OSError, safetensors.SafetensorError) as error:
                raise ValueError(
                    f"{self.directory / file}: cannot be read as a safetensors file with the "
                    f"tensors of the index ({error}); write or download the model again"
                ) from error
        return arrays

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
        return sum((self.directory / file).stat().st_size for file in set(self.files.values()))

    def report(self) -> dict[str, Any]:
        """Returns the contents of ``report.json``; empty if there is no such file."""
        file = self.directory / "report.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else {}

    def plan(self) -> Plan | None:
        """Returns the compression plan; None if there is no ``plan.json``."""
        file = self.directory / "plan.json"
        return Plan.read(file) if file.exists() else None


def open_saved(directory: str | os.PathLike[str]) -> Saved:
    """Opens a directory that `checkpoint.save` wrote, without reading tensors.

    Raises:
      ValueError: if the directory was not written by `checkpoint.save`, has a newer format, or is
        incomplete.
    """
    directory = Path(directory)
    if not is_compressed(directory):
        raise ValueError(
            f'{directory}: no config.json with a "lordjax" entry; expected a model directory that '
            "lordjax wrote"
        )
    hf_config = json.loads((directory / "config.json").read_text("utf-8"))
    meta = hf_config.pop("lordjax")
    try:
        if meta["format"] > FORMAT:
            raise ValueError(
                f"{directory}: format {meta['format']}, written by lordjax {meta['version']}; this "
                f"version reads formats up to {FORMAT}; upgrade lordjax"
            )
        unknown = {kind for kind in meta["kinds"].values() if kind not in KINDS}
        if unknown:
            raise ValueError(
                f"{directory}: unknown kernel kinds {sorted(unknown)}; upgrade lordjax"
            )
        if not all(isinstance(c, dict) for c in meta.get("constants", {}).values()):
            raise TypeError("the constants of a kernel are no JSON object")
        config = ModelConfig.from_json(meta["model"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory / 'config.json'}: damaged lordjax entry ({error!r})"
        ) from error
    try:
        files = dict(json.loads((directory / INDEX).read_text("utf-8"))["weight_map"])
        missing = sorted({f for f in files.values() if not (directory / f).is_file()})
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{directory / INDEX}: unreadable index ({error!r})") from error
    if missing:
        raise ValueError(f"{directory}: files named in the index are missing: {listed(missing)}")
    _check_fields(directory, meta, files)
    return Saved(directory, config, hf_config, meta, files)


def _check_fields(directory: Path, meta: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Raises ValueError if a kernel of the directory lacks a tensor or a constant."""
    lacking, constants = [], meta.get("constants", {})
    for path, kind in meta["kinds"].items():
        tensors, others = base.kernel_fields(KINDS[kind])
        there = files.keys() | meta["kinds"].keys()
        lacking += [f"{path}/{name}" for name in tensors if f"{path}/{name}" not in there]
        lacking += [f"{path}/{name}" for name in others if name not in constants.get(path, {})]
    if lacking:
        raise ValueError(f"{directory}: fields of kernels are missing: {listed(lacking)}")
