"""How well a classifier classifies: accuracy, F1 and Matthews' correlation, those of GLUE."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lordjax.data.examples import Examples, check
from lordjax.models.config import ModelConfig
from lordjax.models.transformer import Transformer


def scores(
    predicted: np.ndarray, expected: np.ndarray, num_classes: int | None = None
) -> dict[str, float]:
    """Compares classes.

    ``f1`` of two classes is that of class 1; of more it is the mean over those that occur (macro).
    ``matthews`` is the correlation of both as indicators, -1 to 1, for any number of classes; 0
    where one of them is constant. An F1 without a positive is 0.

    Args:
      predicted: ``[n]`` classes from 0.
      expected: ``[n]`` likewise.
      num_classes: how many there are; None: up to the largest that occurs, at least 2.

    Returns:
      ``accuracy``, ``f1`` and ``matthews``.

    Raises:
      ValueError: if there is nothing to compare, or a class is none.

    Source: Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient
    (2004).
    """
    predicted, expected = np.asarray(predicted), np.asarray(expected)
    if predicted.shape != expected.shape or predicted.ndim != 1 or not predicted.size:
        raise ValueError(
            f"classes {list(predicted.shape)} and {list(expected.shape)}; expected [n ≥ 1] twice"
        )
    both = np.concatenate([predicted, expected])
    count = max(2, int(both.max()) + 1) if num_classes is None else num_classes
    if both.min() < 0 or both.max() >= count:
        raise ValueError(f"classes {both.min()} to {both.max()}; expected 0 to {count - 1}")
    table = np.zeros((count, count))  # [expected, predicted]
    np.add.at(table, (expected, predicted), 1)
    hits, truth, said = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    f1 = 2 * hits / np.maximum(truth + said, 1)
    total = table.sum()
    spread = np.sqrt((total**2 - (truth**2).sum()) * (total**2 - (said**2).sum()))
    covariance = hits.sum() * total - truth @ said
    return {
        "accuracy": float(hits.sum() / total),
        "f1": float(f1[-1] if count == 2 else f1[truth + said > 0].mean()),
        "matthews": float(covariance / spread) if spread else 0.0,
    }


def classify(
    config: ModelConfig, params: Any, examples: Examples, batch_size: int = 32
) -> tuple[np.ndarray, dict[str, float]]:
    """Runs a classifier, dense or compressed; products are at full float32 precision.

    Args:
      config: the model.
      params: its parameters.
      examples: what it reads and what is right.
      batch_size: sequences per forward pass; does not change the result beyond rounding.

    Returns:
      The predicted classes ``[n]``, and their `scores`.

    Raises:
      ValueError: if the model is no classifier, does not fit the examples, or a logit is not
        finite.
    """
    if config.head != "classes":
        raise ValueError(f"a model with head {config.head!r} does not classify")
    if not examples.size or batch_size < 1:
        raise ValueError(f"{examples.size} examples, {batch_size} a batch; expected 1 or more each")
    check(config, examples)
    # Once, or every call would move the weights to the device again.
    params = jax.tree.map(jnp.asarray, params)
    batch_size = min(batch_size, examples.size)
    parts = []
    for start in range(0, examples.size, batch_size):
        # A last, shorter batch is filled up: another shape would be compiled again.
        rows = np.minimum(np.arange(start, start + batch_size), examples.size - 1)
        batch = examples.rows(rows)
        with jax.default_matmul_precision("highest"):
            logits = _logits(config, params, batch.tokens, batch.mask, batch.token_types)
        parts.append(np.asarray(logits))
    logits = np.concatenate(parts)[: examples.size]
    if not np.isfinite(logits).all():
        first = int(np.argwhere(~np.isfinite(logits))[0, 0])
        raise ValueError(f"example {first}: a logit is not finite; do the weights hold NaN?")
    predicted = logits.argmax(axis=1).astype(np.int32)
    return predicted, scores(predicted, examples.targets[:, 0], config.num_classes)


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    config: ModelConfig,
    params: Any,
    tokens: Int[Array, "b s"],
    mask: Bool[Array, "b s"] | None,
    token_types: Int[Array, "b s"] | None,
) -> Float[Array, "b c"]:
    model: Any = Transformer(config)
    return model.apply({"params": params}, tokens, mask, token_types)
