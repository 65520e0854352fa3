"""Parameter trees with kernels on disk: one safetensors file and a manifest with checksums.

::

    params.safetensors   all arrays by their "/"-paths; a kernel's arrays are below its path
    params.json          format, checksum of the file, kinds and constants of the kernels
    plan.json            the plan, if there is one
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lordjax.allocation.plan import Plan
from lordjax.kernels import trees
from lordjax.kernels.base import is_kernel, nbytes
from lordjax.storage import shards
from lordjax.storage.atomic_directory import check_destination, check_room, staged
from lordjax.storage.saved_model import assemble
from lordjax.storage.tensor_files import TensorFile, checksum, write_json, write_tensors

FORMAT = 1  # raised when an older reader would misread the new one
TENSORS, MANIFEST, PLAN = "params.safetensors", "params.json", "plan.json"


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
      ValueError: if two leaves have the same path, or a dtype is not supported; names the leaf.
    """
    directory = check_destination(directory)
    check_room(directory, nbytes(params))
    arrays = {name: np.asarray(array) for name, array in shards.tensors(params).items()}
    with staged(directory) as stage:
        written = write_tensors(stage / TENSORS, arrays)
        files = {TENSORS: {"bytes": written.bytes, "sha256": written.sha256}}
        write_json(stage / MANIFEST, {"format": FORMAT, "files": files, **shards.describe(params)})
        if plan is not None:
            plan.write(stage / PLAN)
    return directory


def load_params(directory: str | os.PathLike[str], like: Any = None) -> Any:
    """Returns the parameter tree that `save_params` wrote.

    Args:
      directory: the directory.
      like: a tree of the original's structure, of arrays or ``jax.ShapeDtypeStruct``; the result
        has this structure. None: nested dicts by the keys of the paths.

    Returns:
      The tree, with NumPy arrays that are read from the file when they are used.

    Raises:
      ValueError: if a file is missing, was changed or cut, or does not fit ``like``; names it.
    """
    directory = Path(directory)
    manifest = _manifest(directory)
    for name, wanted in manifest["files"].items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != wanted["bytes"]:
            raise ValueError(f"{file}: is missing or cut; expected {wanted['bytes']} bytes")
        if checksum(file).sha256 != wanted["sha256"]:
            raise ValueError(f"{file}: was changed after it was written; copy or save it again")
    tree = assemble(dict(TensorFile(directory / TENSORS)), manifest)
    return tree if like is None else _shaped(trees.flatten(tree), like, directory)


def _manifest(directory: Path) -> dict[str, Any]:
    """Returns the manifest of a directory; raises ValueError if it is none."""
    file = directory / MANIFEST
    try:
        manifest = json.loads(file.read_text("utf-8"))
        if manifest["format"] > FORMAT:
            raise ValueError(f"format {manifest['format']} is newer than {FORMAT}")
        if not all({"bytes", "sha256"} <= set(row) for row in manifest["files"].values()):
            raise ValueError("the checksums of its files are missing")
        if TENSORS not in manifest["files"]:
            raise ValueError(f"{TENSORS} is not listed")
        if not isinstance(manifest["kinds"], dict):
            raise TypeError("the kinds of its kernels are no JSON object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a manifest of save_params ({error})") from error
    return manifest


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
