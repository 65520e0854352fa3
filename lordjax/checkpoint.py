"""A model, compressed or not, as a directory that describes itself.

::

    model-00001-of-0000N.safetensors …   what is no block, then a block each: tensors by "/"-path
    model.safetensors.index.json         tensor -> file
    config.json                          the original Hugging Face config, plus "lordjax": {...}
    plan.json, report.json               what was decided, what came of it
    tokenizer files                      if a writer was given

Nothing is pickled. A directory is written beside its destination and renamed when it is complete
and on disk, so that a crash leaves nothing half-written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors

from lordjax import parts
from lordjax.allocation.plan import Plan
from lordjax.files import DTYPES, sync_directory, write_json
from lordjax.kernels import base, normal_float, trees
from lordjax.kernels.base import Kernel, nbytes
from lordjax.kernels.kinds import KINDS, check
from lordjax.models.config import ModelConfig
from lordjax.models.transformer import init
from lordjax.parts import SHARD_BYTES, Parts, split
from lordjax.work import Memory

FORMAT = 1  # of the directory; raised when a reader of the old one would misread the new one
INDEX = "model.safetensors.index.json"


def _kernel(kind: str, tensors: Mapping[str, Any], constants: Mapping[str, Any]) -> Kernel:
    """A kernel from its tensors and what `_constants` wrote."""
    if "format" in constants:
        constants = {**constants, "format": normal_float.Format.parse(constants["format"])}
    return KINDS[kind](**tensors, **constants)


def check_destination(directory: str | os.PathLike[str]) -> Path:
    """Where a model is to be written.

    Raises:
      FileExistsError: if something is there already (an empty directory is fine).
    """
    directory = Path(directory).resolve()
    if directory.is_mount() or directory == Path.cwd():
        raise FileExistsError(
            f"{directory}: is in use as a mount point or working directory and cannot be replaced; "
            "name a directory inside it"
        )
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(
            f"{directory}: exists and is not an empty directory; choose another output or remove it"
        )
    return directory


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A fresh directory beside ``directory`` that takes its name when the block succeeds.

    Raises:
      FileExistsError: if the destination is not free.
    """
    directory = check_destination(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield stage
        sync(stage)
        stage.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        publish(stage, directory)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def sync(stage: Path) -> None:
    """Brings all files below a directory to disk."""
    for file in stage.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~_umask())  # safetensors makes its files private
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    sync_directory(stage)


def publish(stage: Path, directory: Path) -> None:
    """Gives a complete directory its name, where nothing but an empty directory may be."""
    if directory.exists():
        directory.rmdir()
    stage.rename(directory)
    sync_directory(directory.parent)


def _umask() -> int:
    """The process' umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def assemble(arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `parts.tensors`, of all of them or of some whole kernels.

    Args:
      arrays: by the names they have on disk.
      meta: from `describe`.

    Raises:
      ValueError: if a kernel's parts do not fit; names it.
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


def save(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    params: Any,
    *,
    hf_config: Mapping[str, Any],
    plan: Plan | None = None,
    report: Mapping[str, Any] | None = None,
    write_tokenizer: Callable[[Path], Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a model directory; see the module's docstring for its files.

    Args:
      directory: destination; must be free (see `check_destination`).
      config: the architecture.
      params: the parameters; kernels of any kind.
      hf_config: the original ``config.json``.
      plan: written as ``plan.json``.
      report: written as ``report.json``.
      write_tokenizer: called with the directory to put tokenizer files into.
      shard_bytes: most tensor bytes per file.

    Returns:
      The directory.

    Raises:
      FileExistsError: if the destination is not free.
      OSError: if there is not enough room; says how much is needed and how much there is.
    """
    directory = check_destination(directory)
    check_room(directory, nbytes(params))
    with staged(directory) as stage:
        writer, pieces = Parts(stage, Memory(), shard_bytes), split(params)
        for name, part in pieces.items():
            writer[name] = part
        write_about(
            stage,
            writer.finish(list(pieces)),
            config,
            hf_config=hf_config,
            plan=plan,
            report=report,
            write_tokenizer=write_tokenizer,
        )
    return directory


def describe(config: ModelConfig, params: Any) -> dict[str, Any]:
    """What `assemble` must know besides the tensors, as JSON: kinds, static fields, the model."""
    return _about(config, parts.describe(params))


def _about(config: ModelConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    from lordjax import __version__

    own = {"format": FORMAT, "version": __version__}
    own |= {"kinds": found["kinds"], "constants": found["constants"]}
    return {**own, "model": config.to_json()}


def write_about(
    stage: Path,
    found: Mapping[str, Any],
    config: ModelConfig,
    *,
    hf_config: Mapping[str, Any],
    plan: Plan | None = None,
    report: Mapping[str, Any] | None = None,
    write_tokenizer: Callable[[Path], Any] | None = None,
) -> None:
    """Writes what a directory holds besides tensors.

    Args:
      stage: the directory.
      found: what `Parts.finish` says.
      config: the architecture.
      hf_config: see `save`.
      plan: see `save`.
      report: see `save`.
      write_tokenizer: see `save`.
    """
    lordjax = {
        **_about(config, found),
        "method": None if plan is None else plan.method,
        "calibration": (report or {}).get("calibration"),
        "settings": (report or {}).get("settings"),
    }
    total = {"total_size": found["nbytes"]}
    write_json(stage / INDEX, {"metadata": total, "weight_map": found["index"]})
    write_json(stage / "config.json", {**hf_config, "lordjax": lordjax})
    if plan is not None:
        plan.write(stage / "plan.json")
    if report is not None:
        write_json(stage / "report.json", {**report, "file_bytes": found["file_bytes"]})
    if write_tokenizer is not None:
        write_tokenizer(stage)
    sync(stage)


def check_room(directory: Path, need: int) -> None:
    """Raises OSError if the disk of ``directory`` has less than ``need`` bytes and 16 MiB."""
    there = next(p for p in [directory, *directory.absolute().parents] if p.exists())
    free = shutil.disk_usage(there).free
    if free < need + 2**24:
        raise OSError(
            f"{directory}: needs about {need / 1e6:.0f} MB of disk, {free / 1e6:.0f} MB are free; "
            "make room or choose another output"
        )


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a directory written by `save`."""
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "lordjax" in config


def header(file: Any, name: str) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a tensor of an open safetensors file, without reading its values.

    Raises:
      ValueError: if NumPy has no such dtype.
    """
    part = file.get_slice(name)
    if part.get_dtype() not in DTYPES:
        raise ValueError(f"{name}: dtype {part.get_dtype()}; known: {', '.join(DTYPES)}")
    return jax.ShapeDtypeStruct(tuple(part.get_shape()), np.dtype(DTYPES[part.get_dtype()]))


@dataclasses.dataclass(frozen=True)
class Saved:
    """An opened model directory; tensors are read when they are asked for.

    A `source.Source`, so that a compressed model can be compressed again.
    """

    directory: Path
    config: ModelConfig
    hf_config: dict[str, Any]
    meta: dict[str, Any]
    files: dict[str, str]  # tensor -> file

    def read(self, prefix: str = "") -> dict[str, Any]:
        """Parameters below a "/"-path (all, if empty) as a nested dict, kernels put together.

        Raises:
          KeyError: if there are none.
          ValueError: if a file is damaged or a kernel's parts do not fit; names them.
        """

        def below(path: str) -> bool:
            return not prefix or f"{path}/".startswith(f"{prefix}/")

        wanted = [name for name in self.files if below(name)]
        if not wanted:
            raise KeyError(f"{self.directory}: no parameter below {prefix!r}")
        tree = self._tree(wanted, lambda file, name: file.get_tensor(name))
        return functools.reduce(lambda at, key: at[key], prefix.split("/") if prefix else [], tree)

    def leaves(self) -> dict[str, Any]:
        """Parameter path -> ``ShapeDtypeStruct`` or kernel of them, from the files' headers.

        Raises:
          ValueError: as `read`.
        """
        return trees.flatten(self._tree(list(self.files), header))

    def is_original(self) -> bool:
        """Whether nothing is compressed: arrays in the original shapes, and no other."""
        make = functools.partial(init, self.config)
        original = trees.flatten(jax.eval_shape(make, jax.random.key(0)))
        leaves = self.leaves()
        return leaves.keys() == original.keys() and all(
            not isinstance(leaf, Kernel) and leaf.shape == original[path].shape
            for path, leaf in leaves.items()
        )

    def _tree(self, names: list[str], read: Callable[[Any, str], Any]) -> dict[str, Any]:
        """The named tensors as a nested dict, parts of kernels put together."""
        arrays = self._arrays(names, read)
        try:
            return assemble({name: arrays[name] for name in names}, self.meta)
        except ValueError as error:
            raise ValueError(f"{self.directory}: {error}") from error

    def _arrays(self, names: list[str], read: Callable[[Any, str], Any]) -> dict[str, Any]:
        """What ``read(file, name)`` gives; every file is opened once and closed again."""
        arrays = {}
        for file in dict.fromkeys(self.files[name] for name in names):
            try:
                with safetensors.safe_open(self.directory / file, framework="numpy") as handle:
                    for name in names:
                        if self.files[name] == file:
                            arrays[name] = read(handle, name)
            except (OSError, safetensors.SafetensorError) as error:
                raise ValueError(
                    f"{self.directory / file}: not the safetensors file it should be ({error})"
                ) from error
        return arrays

    def block(self, i: int) -> dict[str, Any]:
        """Nested dict of ``layer_i``."""
        return self.read(f"layer_{i}")

    def rest(self) -> dict[str, Any]:
        """Nested dict of everything outside the blocks."""
        tops = dict.fromkeys(name.split("/", 1)[0] for name in self.files)
        return {top: self.read(top) for top in tops if not top.startswith("layer_")}

    def params(self) -> dict[str, Any]:
        """The whole tree."""
        return self.read()

    def file_bytes(self) -> int:
        """Of the files that hold tensors."""
        return sum((self.directory / file).stat().st_size for file in set(self.files.values()))

    def report(self) -> dict[str, Any]:
        """The contents of ``report.json``, empty if there is none."""
        file = self.directory / "report.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def plan(self) -> Plan | None:
        """The plan, if there is one."""
        file = self.directory / "plan.json"
        return Plan.read(file) if file.exists() else None


def open_saved(directory: str | os.PathLike[str]) -> Saved:
    """Opens a directory written by `save`, without reading tensors.

    Raises:
      ValueError: if it is not such a directory, is of a newer format, or is incomplete.
    """
    directory = Path(directory)
    if not is_compressed(directory):
        raise ValueError(f'{directory}: no config.json with a "lordjax" entry; not written by save')
    hf_config = json.loads((directory / "config.json").read_text())
    meta = hf_config.pop("lordjax")
    try:
        if meta["format"] > FORMAT:
            raise ValueError(
                f"{directory}: format {meta['format']} of lordjax {meta['version']}; this version "
                f"reads up to {FORMAT}, upgrade lordjax"
            )
        unknown = {kind for kind in meta["kinds"].values() if kind not in KINDS}
        if unknown:
            raise ValueError(
                f"{directory}: unknown kernel kinds {sorted(unknown)}; upgrade lordjax"
            )
        if not all(isinstance(c, dict) for c in meta.get("constants", {}).values()):
            raise TypeError("constants of a kernel are no table")
        config = ModelConfig.from_json(meta["model"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory / 'config.json'}: damaged lordjax entry ({error!r})"
        ) from error
    try:
        files = dict(json.loads((directory / INDEX).read_text())["weight_map"])
        missing = sorted({f for f in files.values() if not (directory / f).is_file()})
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{directory / INDEX}: unreadable index ({error!r})") from error
    if missing:
        raise ValueError(f"{directory}: files named in the index are missing: {missing}")
    _check_parts(directory, meta, files)
    return Saved(directory, config, hf_config, meta, files)


def _check_parts(directory: Path, meta: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Raises ValueError if a kernel of the directory lacks a tensor or another field."""
    lacking, constants = [], meta.get("constants", {})
    for path, kind in meta["kinds"].items():
        tensors, others = base.kernel_fields(KINDS[kind])
        there = files.keys() | meta["kinds"].keys()
        lacking += [f"{path}/{name}" for name in tensors if f"{path}/{name}" not in there]
        lacking += [f"{path}/{name}" for name in others if name not in constants.get(path, {})]
    if lacking:
        raise ValueError(f"{directory}: lacks parts of kernels: {', '.join(lacking)}")
