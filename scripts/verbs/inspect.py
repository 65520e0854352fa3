"""``lordjax inspect``: the parameter tree of a model, with kinds, shapes, ranks and bytes."""

from __future__ import annotations

import re
from typing import Any

from lordjax.scripts.console import format_bytes
from lordjax.scripts.opened_model import file_bytes, open_model


def inspect_model(model: str) -> dict[str, Any]:
    """Describes a model: totals, and one entry per parameter path."""
    import functools

    import jax

    from lordjax.kernels import trees
    from lordjax.models import init
    from lordjax.names import is_block_linear

    opened = open_model(model)
    # Modules may have become narrower: what is left is a share of the original shapes.
    make = functools.partial(init, opened.config)
    original = trees.flatten(jax.eval_shape(make, jax.random.key(0)))
    leaves = {path: describe(leaf, original.get(path)) for path, leaf in opened.leaves().items()}
    linear = [row for path, row in leaves.items() if is_block_linear(path)]
    now, dense = (sum(row[key] for row in linear) for key in ("weights", "dense_weights"))
    linear_bytes = sum(row["bytes"] for row in linear)
    return {
        "model": model,
        "kind": opened.kind,
        "config": opened.config.to_json(),
        "weights": sum(row["weights"] for row in leaves.values()),
        "bytes": sum(row["bytes"] for row in leaves.values()),
        "file_bytes": file_bytes(opened.path),
        "block_linear": {
            "weights": now,
            "dense_weights": dense,
            "kept": now / dense,
            "bits_per_weight": 8 * linear_bytes / dense,
        },
        "parameters": leaves,
    }


def describe(leaf: Any, original: Any = None) -> dict[str, Any]:
    """Kind, shape, dtype, rank, weights, bytes and share kept of one parameter.

    Args:
      leaf: array, kernel, or shapes of them.
      original: what it was before compression; None if it was not there.
    """
    import math

    from lordjax.kernels.base import nbytes
    from lordjax.kernels.kinds import kind_of, weights

    dense = math.prod(leaf.shape if original is None else original.shape)
    count = weights(leaf)
    return {
        "kind": kind_of(leaf),
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
        "rank": getattr(leaf, "rank", None),
        "weights": count,
        "dense_weights": dense,
        "bytes": nbytes(leaf),
        "kept": count / dense,
        "bits": 8 * nbytes(leaf) / dense,
    }


def show(result: dict[str, Any]) -> None:
    """Prints the tree, blocks in their order."""
    linear, files = result["block_linear"], format_bytes(result["file_bytes"])
    print(f"{result['model']}: {result['kind']}, {result['config']['num_layers']} blocks")
    print(
        f"{result['weights']:,} weights, {format_bytes(result['bytes'])} in memory, {files} on disk"
    )
    counts = f"{linear['weights']:,} of {linear['dense_weights']:,}"
    print(f"kept {linear['kept']:.4f} of the block linear weights: {counts}")
    print(f"{linear['bits_per_weight']:.3f} bits per block linear weight of the original\n")
    print(_line("parameter", "kind", "rank", "shape", "dtype", "bytes", "kept", "bits"))
    shown: list[str] = []
    for path, row in sorted(result["parameters"].items(), key=lambda item: natural(item[0])):
        *branches, layer, name = path.split("/")
        for depth, branch in enumerate(branches):
            if branches[: depth + 1] != shown[: depth + 1]:
                print("  " * depth + branch + "/")
        shown = branches
        rank = "" if row["rank"] is None else str(row["rank"])
        shape = " x ".join(map(str, row["shape"]))
        facts = (
            row["kind"],
            rank,
            shape,
            row["dtype"],
            format_bytes(row["bytes"]),
            f"{row['kept']:.3f}",
        )
        facts = (*facts, f"{row['bits']:.2f}")
        print(_line("  " * len(branches) + f"{layer}/{name}", *facts))


def natural(path: str) -> list[Any]:
    """A sort key under which ``layer_2`` comes before ``layer_10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def _line(
    name: str, kind: str, rank: str, shape: str, dtype: str, nbytes: str, kept: str, bits: str
) -> str:
    return f"{name:26}{kind:25}{rank:>5}{shape:>13}{dtype:>10}{nbytes:>11}{kept:>7}{bits:>7}"
