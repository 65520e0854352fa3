"""The parameters of a model as rows: one per parameter, or one per kind of parameter."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from lordjax.kernels import trees
from lordjax.kernels.base import nbytes
from lordjax.kernels.kinds import kind_of, weights
from lordjax.kernels.layout import Rearranged
from lordjax.models import init
from lordjax.models.config import ModelConfig
from lordjax.names import is_block_linear

Row = dict[str, Any]


def parameter_rows(config: ModelConfig, leaves: Mapping[str, Any]) -> dict[str, Row]:
    """One row per parameter: see `describe`.

    Args:
      config: the architecture, which has the shapes before compression.
      leaves: parameter path -> array, kernel, or shapes of them.

    Returns:
      parameter path -> row.
    """
    original = original_shapes(config)
    return {path: describe(leaf, original.get(path)) for path, leaf in leaves.items()}


def original_shapes(config: ModelConfig) -> dict[str, Any]:
    """Parameter path -> shape and dtype before compression."""
    make = functools.partial(init, config)
    return trees.flatten(jax.eval_shape(make, jax.random.key(0)))


def describe(leaf: Any, original: Any = None) -> Row:
    """Kind, shape, dtype, rank, weights, bytes and share kept of one parameter, as it is stored.

    Args:
      leaf: array, kernel, or shapes of them.
      original: the parameter before compression; None if it was not there.
    """
    dense = math.prod(leaf.shape if original is None else original.shape)
    count, inner = weights(leaf), leaf.kernel if isinstance(leaf, Rearranged) else leaf
    return {
        "kind": kind_of(inner),
        "shape": list(leaf.shape),
        "dtype": str(inner.dtype),
        "rank": getattr(leaf, "rank", None),
        "weights": count,
        "dense_weights": dense,
        "bytes": nbytes(leaf),
        "kept": count / dense,
        "bits": 8 * nbytes(leaf) / dense,
    }


def block_linear(rows: Mapping[str, Row]) -> dict[str, Any]:
    """What the rows of all block linear weights add up to."""
    linear = [row for path, row in rows.items() if is_block_linear(path)]
    now, dense, size = (
        sum(row[key] for row in linear) for key in ("weights", "dense_weights", "bytes")
    )
    return {
        "weights": now,
        "dense_weights": dense,
        "kept": now / dense,
        "bits_per_weight": 8 * size / dense,
    }


def fold(rows: Mapping[str, Row]) -> list[Row]:
    """Folds the rows of one parameter in several blocks into one row.

    Rows fold if path (but for the number of the block), kind, number of axes and dtype agree.
    Weights and bytes are sums. Rank and shape are ``[least, most]`` where they differ.

    Args:
      rows: of `parameter_rows`.

    Returns:
      The folded rows; each has its ``path`` inside the block or the model besides, and
      ``layers``, the numbers of the blocks (None outside the blocks).
    """
    groups: dict[tuple[Any, ...], list[tuple[int | None, Row]]] = {}
    for path, row in sorted(rows.items(), key=lambda item: natural(item[0])):  # by layer
        found = re.fullmatch(r"layer_(\d+)/(.*)", path)
        layer, inside = (int(found[1]), found[2]) if found else (None, path)
        key = (found is None, inside, row["kind"], len(row["shape"]), row["dtype"])
        groups.setdefault(key, []).append((layer, row))
    folded = [_folded(key[1], members) for key, members in groups.items()]
    return sorted(folded, key=lambda row: (row["layers"] is not None, natural(row["path"])))


def _folded(path: str, members: list[tuple[int | None, Row]]) -> Row:
    layers, rows = zip(*members, strict=True)
    total = {key: sum(row[key] for row in rows) for key in ("weights", "dense_weights", "bytes")}
    shapes = zip(*(row["shape"] for row in rows), strict=True)
    ranks = [row["rank"] for row in rows if row["rank"] is not None]
    return {
        "path": path,
        "layers": None if layers[0] is None else list(layers),
        "kind": rows[0]["kind"],
        "dtype": rows[0]["dtype"],
        "shape": [_extent(sizes) for sizes in shapes],
        "rank": _extent(ranks) if ranks else None,
        **total,
        "kept": total["weights"] / total["dense_weights"],
        "bits": 8 * total["bytes"] / total["dense_weights"],
    }


def _extent(values: Iterable[int]) -> int | list[int]:
    """The one value, or the least and the most."""
    least, most = min(found := list(values)), max(found)
    return least if least == most else [least, most]


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as people write them: ``0…3, 5, 7…9``."""
    runs = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}…{run[-1]}" for run in ends)


def natural(path: str) -> list[Any]:
    """A sort key under which ``layer_2`` comes before ``layer_10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]
