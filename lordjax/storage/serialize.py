"""Trees of arrays as JSON and arrays: what a workspace keeps, never a pickle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lordjax.allocation.plan import Plan
from lordjax.methods import Factors, ModuleFactors
from lordjax.stats import AbsMean, HeadMoments, MeanSquare, Moments, SecondMoment

TYPES = {
    kind.__name__: kind
    for kind in (
        *(Factors, ModuleFactors, Plan),
        *(AbsMean, HeadMoments, MeanSquare, Moments, SecondMoment),
    )
}


def encode(tree: Any, arrays: dict[str, Any]) -> Any:
    """A tree as JSON; its arrays are put into ``arrays``.

    Raises:
      TypeError: if something in it is none of the known types.
    """
    if isinstance(tree, (np.ndarray, jax.Array)):
        name = str(len(arrays))
        arrays[name] = tree
        return {"array": name}
    if isinstance(tree, Mapping):
        return {"dict": [[key, encode(value, arrays)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [encode(value, arrays) for value in tree]}
    if type(tree).__name__ in TYPES:
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        return {"type": type(tree).__name__, "fields": encode(fields, arrays)}
    if isinstance(tree, np.generic):
        return tree.item()
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"{type(tree).__name__} cannot be kept in a workspace")


def decode(value: Any, arrays: Mapping[str, Any]) -> Any:
    """Inverse of `encode`."""
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return arrays[value["array"]]
    if "dict" in value:
        return {key: decode(inner, arrays) for key, inner in value["dict"]}
    if "type" in value:
        return TYPES[value["type"]](**decode(value["fields"], arrays))
    kind = tuple if "tuple" in value else list
    return kind(decode(inner, arrays) for inner in value[kind.__name__])
