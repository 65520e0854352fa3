"""A teacher's predictions on disk: its most likely tokens at every position of a text.

The teacher is read block by block, and runs on some sequences at a time. The tables of these
sequences are an entry of a store, so a run that was killed goes on with the next ones, and teacher
and student need not be in memory together::

    teacher/0     the first sequences: token ids [n, L, k], log-probabilities [n, L, k + 1]
    teacher/1     the next ones
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lordjax.data.examples import Examples, next_tokens
from lordjax.models.blocks import Block
from lordjax.models.config import ModelConfig
from lordjax.models.divergence import top_predictions
from lordjax.models.source import Source
from lordjax.models.transformer import Transformer, default_positions
from lordjax.runtime.progress import Progress
from lordjax.storage.store import Store, get_or_compute

TOP = 64  # tokens that are kept of a prediction
STREAM_BYTES = 2**28  # of the residual streams of the sequences that run together


class Rows:
    """Rows of several arrays as if they were one; only the rows that are asked for are read.

    Args:
      parts: arrays that differ in their number of rows only.
    """

    def __init__(self, parts: Sequence[Any]):
        self._parts = parts
        ends = np.cumsum([len(part) for part in parts])
        self._starts = np.concatenate([[0], ends[:-1]]).astype(int)
        self.shape = (int(ends[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Any) -> np.ndarray:
        """Returns the rows at some indices, or where a Boolean array is True."""
        numbers = np.arange(len(self))[indices]
        where = np.searchsorted(self._starts, numbers, side="right") - 1
        rows = zip(where, numbers - self._starts[where], strict=True)
        return np.stack([np.asarray(self._parts[k][i]) for k, i in rows])


def taught(
    teacher: Source,
    tokens: np.ndarray,
    store: Store,
    *,
    top: int = TOP,
    progress: Progress | None = None,
) -> Examples:
    """Returns sequences as examples with a teacher's predictions of their next tokens.

    Args:
      teacher: a causal model.
      tokens: token ids ``[n, L]`` of its vocabulary.
      store: where the predictions are kept, or are already.
      top: number of tokens that are kept of a prediction; at most the vocabulary counts.
      progress: called with ("teacher", sequences done, number of sequences).
    """
    config, (count, length) = teacher.config, tokens.shape
    top = min(top, config.vocab_size)
    at_once = max(1, STREAM_BYTES // (4 * length * config.hidden_size))
    parts = []
    for k, start in enumerate(range(0, count, at_once)):
        part = tokens[start : start + at_once]
        predict = functools.partial(_predictions, teacher, part, top)
        parts.append(get_or_compute(store, f"teacher/{k}", predict))
        if progress is not None:
            progress("teacher", start + len(part), count)
    ids, logs = (Rows([part[name] for part in parts]) for name in ("ids", "logs"))
    targets = next_tokens(tokens, np.ones(tokens.shape, bool))
    return Examples(tokens, targets, top_ids=ids, top_logs=logs)


def _predictions(teacher: Source, tokens: np.ndarray, top: int) -> dict[str, np.ndarray]:
    """Runs the teacher on some sequences, one at a time through each block, in float32."""
    config = teacher.config
    with jax.default_matmul_precision("highest"):
        outer = _on_device(teacher.non_block_params())
        states = [_embedded(config, outer, row[None]) for row in tokens]
        for i in range(config.num_layers):
            block = _on_device(teacher.block(i))
            states = [_block(config, config.window(i), block, x) for x in states]
        found = [top_predictions(config, outer, x, top=top) for x in states]
    ids, logs = (np.concatenate([np.asarray(a) for a in each]) for each in zip(*found, strict=True))
    return {"ids": ids, "logs": logs}


def _on_device(tree: Any) -> Any:
    """Puts parameters on the device, floating-point arrays in float32."""

    def put(a: Any) -> Array:
        return jnp.asarray(a, jnp.float32 if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype)

    return jax.tree.map(put, tree)


@functools.partial(jax.jit, static_argnums=0)
def _embedded(config: ModelConfig, outer: Any, tokens: Any) -> Float[Array, "b s m"]:
    run: Any = Transformer(config).apply
    return run({"params": outer}, tokens, method=Transformer.embed_tokens)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _block(config: ModelConfig, window: int | None, block: Any, x: Any) -> Float[Array, "b s m"]:
    module: Any = Block(config, window)
    return module.apply({"params": block}, x, default_positions(x), None)
