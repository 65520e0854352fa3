"""Puts kernels together from the tensors and constants that `shards` wrote."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lordjax.kernels import base, normal_float, trees
from lordjax.kernels.base import Kernel
from lordjax.kernels.kinds import KINDS, check
from lordjax.kernels.layout import Layout
from lordjax.names import listed


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
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    for path, leaf in trees.flatten(tree).items():
        check(leaf, path)
    return tree


def check_kernels(meta: Mapping[str, Any]) -> None:
    """Raises an error if the metadata of `shards.describe` has an unknown kind, or is damaged."""
    if unknown := sorted({kind for kind in meta["kinds"].values() if kind not in KINDS}):
        raise ValueError(f"unknown kernel kinds {unknown}; upgrade lordjax")
    if not all(isinstance(c, dict) for c in meta.get("constants", {}).values()):
        raise TypeError("the constants of a kernel are no JSON object")


def check_fields(directory: Path, meta: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Raises ValueError if a kernel of the directory lacks a tensor or a constant."""
    lacking, constants = [], meta.get("constants", {})
    for path, kind in meta["kinds"].items():
        tensors, others = base.kernel_fields(KINDS[kind])
        there = files.keys() | meta["kinds"].keys()
        lacking += [f"{path}/{name}" for name in tensors if f"{path}/{name}" not in there]
        lacking += [f"{path}/{name}" for name in others if name not in constants.get(path, {})]
    if lacking:
        raise ValueError(f"{directory}: fields of kernels are missing: {listed(lacking)}")
