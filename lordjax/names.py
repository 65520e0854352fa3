"""Names of layers in parameter paths, and suggestions for mistyped names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for an error message: the closest of the known words, or the first of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + ", ".join(close) + "?"
    return "known: " + ", ".join(known[:16]) + (", …" if len(known) > 16 else "")


def layer(i: int) -> str:
    """Key of block ``i`` in the parameter tree: ``layer_12``."""
    return f"layer_{i}"


def layer_type(path: str) -> str:
    """``layer_7/mlp/up/kernel`` -> ``mlp/up``: the same layer in every block."""
    return path.split("/", 1)[1].removesuffix("/kernel")


def layer_index(path: str) -> int:
    """``layer_12/mlp/up/kernel`` -> 12."""
    return int(path.split("/", 1)[0].removeprefix("layer_"))


def is_block_linear(path: str) -> bool:
    """Whether a parameter counts for a budget: the kernel of a linear layer of a block."""
    return re.fullmatch(r"layer_\d+/.*/kernel", path) is not None
