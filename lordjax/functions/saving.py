"""Parameter trees with kernels on disk: one safetensors file, and checksums beside it.

::

    params.safetensors   all arrays by their "/"-paths; a kernel's arrays are below its path
    params.json          format, kinds and constants of the kernels
    plan.json            the plan, if there is one
    checksums.json       checksums of every array and of the other files
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lordjax.allocation.plan import Plan
from lordjax.kernels import trees
from lordjax.kernels.base import is_kernel, nbytes
from lordjax.runtime.input_files import inside, read_json, reading
from lordjax.storage import shards
from lordjax.storage.assembly import assemble, check_fields, check_kernels
from lordjax.storage.atomic_directory import check_destination, staged
from lordjax.storage.checksums import MANIFEST, Manifest, tensor_row
from lordjax.storage.room import check_room
from lordjax.storage.tensor_check import check_finite
from lordjax.storage.tensor_files import TensorFile, checksum, write_json, write_tensors

FORMAT = 2  # 1 had the checksum of the whole file in params.json
TENSORS, ABOUT, PLAN = "params.safetensors", "params.json", "plan.json"


def save_params(directory: str | os.PathLike[str], params: Any, plan: Plan | None = None) -> Path:
    """Writes a parameter tree, compressed or not, to a directory that appears whole or not at all.

    Args:
      directory: destination; must not exist, or be an empty directory.
      params: any pytree; leaves are arrays or kernels.
      plan: the plan of `compress_params`, written beside it; None writes none.

    Returns:
      The absolute path of the directory.

    Raises:
      FileExistsError: if the destination is not free.
      OSError: if there is not enough room on the disk.
      ValueError: if two leaves have the same path, a value is not finite, or a dtype is not
        supported; names the leaf.
    """
    directory, need = check_destination(directory), nbytes(params)
    check_room(directory, need)
    arrays = {name: np.asarray(array) for name, array in shards.tensors(params).items()}
    for name, array in arrays.items():
        check_finite(array, f"{directory}: {name} would hold")
    with staged(directory, need) as stage:
        write_tensors(stage / TENSORS, arrays)
        write_json(stage / ABOUT, {"format": FORMAT, **shards.describe(params)})
        if plan is not None:
            plan.write(stage / PLAN)
        rows = {name: tensor_row(array) for name, array in arrays.items()}
        write_json(stage / MANIFEST, Manifest.of(stage, rows).to_json())
    return directory


def load_params(directory: str | os.PathLike[str], like: Any = None, *, verify: bool = True) -> Any:
    """Returns the parameter tree that `save_params` wrote.

    Args:
      directory: the directory.
      like: a tree of the original's structure, of arrays or ``jax.ShapeDtypeStruct``; the result
        has this structure. None: nested dicts by the keys of the paths.
      verify: whether checksums are checked; everything else always is.

    Returns:
      The tree, with NumPy arrays that are read from the file when they are used.

    Raises:
      ValueError: if a file is missing, was changed or cut, holds a value that is not finite, or
        does not fit ``like``; names it.
    """
    directory = Path(directory)
    about, file = _about(directory), inside(directory, TENSORS, directory)
    if not file.is_file():
        raise ValueError(f"{file}: is missing; copy or save it again")
    with reading(directory, "not a tree of save_params"):
        tensors = TensorFile(file)
        check_fields(directory, about, dict.fromkeys(tensors, TENSORS))
        arrays = dict(tensors)
        if verify:
            _verify(directory, about, arrays)
        for name, array in arrays.items():
            check_finite(array, f"{file}: {name} holds")
        tree = assemble(arrays, about)
    return tree if like is None else _shaped(trees.flatten(tree), like, directory)


def _verify(directory: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError if the directory is not what was written."""
    file = directory / TENSORS
    if about["format"] == 1:
        if checksum(file).sha256 != about["files"][TENSORS]["sha256"]:
            raise ValueError(f"{file}: was changed after it was written; copy or save it again")
        return
    manifest = Manifest.read(directory)
    manifest.check_listed([ABOUT, *([PLAN] if (directory / PLAN).exists() else [])])
    manifest.check_files()
    manifest.check_headers(arrays)
    for name, array in arrays.items():
        manifest.check_tensor(name, array, file)


def _about(directory: Path) -> dict[str, Any]:
    """Returns the contents of `ABOUT`; raises ValueError if it is not what `save_params` wrote."""
    file = inside(directory, ABOUT, directory)
    with reading(file, "not written by save_params"):
        about = read_json(file)
        if about["format"] not in range(1, FORMAT + 1):
            raise ValueError(f"format {about['format']!r}; this version reads 1 to {FORMAT}")
        if about["format"] == 1 and "sha256" not in about["files"][TENSORS]:
            raise ValueError(f"the checksum of {TENSORS} is missing")
        check_kernels(about)
    return about


def _shaped(found: dict[str, Any], like: Any, directory: Path) -> Any:
    """Returns leaves by path in the structure of a tree."""
    rows, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_kernel)
    leaves = []
    for keys, leaf in rows:
        path = trees.path_str(keys)
        if not hasattr(leaf, "shape"):  # a constant, which is not saved
            leaves.append(leaf)
            continue
        new = found.pop(path, None)
        if new is None or tuple(new.shape) != tuple(leaf.shape):
            got = "nothing" if new is None else str(list(new.shape))
            raise ValueError(
                f"{directory}: has {got} at {path}; expected {list(leaf.shape)}, as in like"
            )
        leaves.append(new)
    if found:
        raise ValueError(f"{directory}: {min(found)} is not in like; expected the same paths")
    return jax.tree.unflatten(structure, leaves)
