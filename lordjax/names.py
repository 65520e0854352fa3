"""Names of layers in parameter paths, and suggestions for mistyped names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns a hint for an error message: the closest known words, or the first known words."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + ", ".join(close) + "?"
    return "known: " + ", ".join(known[:16]) + (", …" if len(known) > 16 else "")


def listed(items: Iterable[str], separator: str = ", ", count: int = 10) -> str:
    """Joins the first items for an error message, and says how many more there are."""
    items = list(items)
    more = [f"… and {len(items) - count:,} more"] if len(items) > count else []
    return separator.join([*items[:count], *more])


def layer(i: int) -> str:
    """Key of block ``i`` in the parameter tree: ``layer_12``."""
    return f"layer_{i}"


def layer_type(path: str) -> str:
    """Returns a layer's name within its block: ``layer_7/mlp/up/kernel`` -> ``mlp/up``."""
    return path.split("/", 1)[1].removesuffix("/kernel")


def layer_index(path: str) -> int:
    """Returns the index of a path's block: ``layer_12/mlp/up/kernel`` -> 12."""
    return int(path.split("/", 1)[0].removeprefix("layer_"))


def is_block_linear(path: str) -> bool:
    """Returns whether a path names the kernel of a block's linear layer, which budgets count."""
    return re.fullmatch(r"layer_\d+/.*/kernel", path) is not None
