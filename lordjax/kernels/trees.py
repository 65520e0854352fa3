"""Parameter trees as flat tables: "/"-paths, selection by pattern, replacement.

A *path* is the keys from the root, joined by "/": ``layer_0/attention/q/kernel``. A `Kernel` is one
entry of the table, so that plans, statistics and parameters use the same keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax

from lordjax.kernels.base import is_kernel
from lordjax.names import did_you_mean


def path_str(keys: tuple[Any, ...]) -> str:
    """Returns the "/"-path of a JAX key path.

    The last key is left out if it is the attribute ``value``, which holds an NNX variable's array.
    """
    if keys and getattr(keys[-1], "name", None) == "value":
        keys = keys[:-1]
    names = ("key", "idx", "name")  # of dicts, of sequences, of dataclasses
    return "/".join(str(next(getattr(k, n) for n in names if hasattr(k, n))) for k in keys)


def flatten(tree: Any) -> dict[str, Any]:
    """Returns ``{path: leaf}`` in the tree's order. A kernel is one leaf.

    Raises:
      ValueError: if two leaves have the same path, as in trees of dataclasses.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_kernel)
    table: dict[str, Any] = {}
    for keys, leaf in leaves:
        path = path_str(keys)
        if path in table:
            raise ValueError(f"two leaves at {path!r}; expected nested dicts or an nnx.State")
        table[path] = leaf
    return table


def arrays(tree: Any) -> dict[str, Any]:
    """Returns ``{path: array}``, the arrays in kernels included (``…/kernel/low_rank/left``)."""
    table: dict[str, Any] = {}
    for path, leaf in flatten(tree).items():
        table |= _kernel_arrays(path, leaf) if is_kernel(leaf) else {path: leaf}
    return table


def _kernel_arrays(path: str, kernel: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(kernel)[0]
    return {"/".join([path, *(key.name for key in keys)]): leaf for keys, leaf in leaves}


def partition(tree: Any, paths: Collection[str]) -> tuple[Any, Any]:
    """Splits a tree into the arrays at some paths and all other arrays.

    Args:
      tree: the tree.
      paths: paths of `arrays`.

    Returns:
      Two trees of the same structure; each has None in place of the arrays of the other.

    Raises:
      KeyError: if there is no array at one of the paths.
    """
    every = list(arrays(tree))
    for path in paths:
        if path not in every:
            raise KeyError(f"no array {path!r}; {did_you_mean(path, every)}")
    leaves, structure = jax.tree.flatten(tree)
    inside = [path in paths for path in every]
    halves = (
        [leaf if chosen is part else None for leaf, chosen in zip(leaves, inside, strict=True)]
        for part in (True, False)
    )
    first, second = (jax.tree.unflatten(structure, half) for half in halves)
    return first, second


def combine(first: Any, second: Any) -> Any:
    """Joins the two trees of `partition` again."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None
    )


def unflatten(table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict of a flat table; the inverse of `flatten`.

    Raises:
      ValueError: if a path is both a leaf and a branch.
    """
    tree: dict[str, Any] = {}
    for path, leaf in table.items():
        *branches, name = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise ValueError(
                    f"{path}: a prefix of this path is a leaf itself; expected a branch there"
                )
        if name in node:
            raise ValueError(
                f"{path}: this path occurs twice or is a prefix of another path; expected a leaf"
            )
        node[name] = leaf
    return tree


def select(paths: Iterable[str], pattern: str) -> list[str]:
    """Returns the paths in which a regular expression is found (``re.search``).

    Raises:
      KeyError: if there are none. The message suggests the closest paths.
    """
    paths = list(paths)
    found = [path for path in paths if re.search(pattern, path)]
    if not found:
        raise KeyError(f"no parameter matches {pattern!r}; {did_you_mean(pattern, paths)}")
    return found


def update(tree: Any, new: Mapping[str, Any]) -> Any:
    """Returns a copy of a tree in which the leaves at the paths of ``new`` are replaced.

    Raises:
      KeyError: if a path of ``new`` is not in the tree.
    """
    unknown = set(new) - set(flatten(tree))
    if unknown:
        first = min(unknown)
        raise KeyError(f"no parameter {first!r}; {did_you_mean(first, flatten(tree))}")
    return map_with_path(lambda path, leaf: new.get(path, leaf), tree)


def map_with_path(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """Applies ``fn(path, leaf)`` to every leaf of a pytree or NNX state; a kernel is one leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: fn(path_str(keys), leaf), tree, is_leaf=is_kernel
    )
