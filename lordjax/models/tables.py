"""Tables: matrices outside the blocks that grow with the vocabulary or the context.

These are the embeddings of tokens and of positions, and the head that predicts tokens. A tied head
is the embedding of tokens. Heads of classifiers are no tables: they are small and were trained for
their task.
"""

from __future__ import annotations

from typing import Any

from lordjax.models.config import ModelConfig

EMBED = "embed/embedding"
POSITIONS = "positions/embedding"
HEAD = "head/kernel"


def predicts_tokens(config: ModelConfig) -> bool:
    """Returns whether the head's outputs are those of a vocabulary."""
    return config.head in ("causal", "masked")


def table_paths(config: ModelConfig) -> tuple[str, ...]:
    """Returns the paths of a model's tables."""
    positions = () if config.position_rows is None else (POSITIONS,)
    head = (HEAD,) if predicts_tokens(config) and not config.tie_embeddings else ()
    return (EMBED, *positions, *head)


def as_kernel(path: str, table: Any) -> Any:
    """Returns a table as a kernel ``[in, out]`` whose outputs are tokens or positions.

    Args:
      path: path of the table.
      table: an array ``[rows, columns]``; of a head ``[columns, rows]``.
    """
    return table if path == HEAD else table.T
