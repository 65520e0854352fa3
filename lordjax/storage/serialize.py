"""Serializes trees of arrays as JSON and arrays, without pickle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Types = Mapping[str, type]  # dataclasses that a tree may hold, by their names


def to_json(tree: Any, arrays: dict[str, Any], types: Types) -> Any:
    """Converts a tree to JSON, and puts its arrays into ``arrays``.

    Args:
      tree: nested mappings, lists and tuples of arrays, numbers, strings and dataclasses.
      arrays: receives every array under the name that the JSON uses for it.
      types: dataclasses that the tree may hold, by their names.

    Returns:
      The JSON value.

    Raises:
      TypeError: if the tree holds an object of any other type.
    """
    if isinstance(tree, (np.ndarray, jax.Array)):
        name = str(len(arrays))
        arrays[name] = tree
        return {"array": name}
    if isinstance(tree, Mapping):
        return {"dict": [[key, to_json(value, arrays, types)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [to_json(value, arrays, types) for value in tree]}
    if types.get(type(tree).__name__) is type(tree):
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        return {"type": type(tree).__name__, "fields": to_json(fields, arrays, types)}
    if isinstance(tree, np.generic):
        tree = tree.item()
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"float": str(tree)}  # no number of JSON
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    known = ", ".join(["arrays", "numbers", "strings", "dicts", "lists", "tuples", *types])
    raise TypeError(f"a {type(tree).__name__} cannot be stored; expected {known}")


def from_json(value: Any, arrays: Mapping[str, Any], types: Types) -> Any:
    """Returns the tree that `to_json` converted.

    Args:
      value: the JSON value.
      arrays: the arrays, by the names that the JSON uses.
      types: dataclasses that the tree may hold, by their names.
    """
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "float" in value:
        return float(value["float"])
    if "dict" in value:
        return {key: from_json(inner, arrays, types) for key, inner in value["dict"]}
    if "type" in value:
        return types[value["type"]](**from_json(value["fields"], arrays, types))
    kind = tuple if "tuple" in value else list
    return kind(from_json(inner, arrays, types) for inner in value[kind.__name__])
