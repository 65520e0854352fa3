"""Measures classifiers by GLUE's metrics: accuracy, F1 and Matthews correlation."""

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
    """Compares predicted with expected classes.

    With two classes, ``f1`` is that of class 1; with more, it is the mean over the classes that
    occur (macro F1). A class without positives has F1 0. ``matthews`` is the correlation of the
    class indicators, from -1 to 1, for any number of classes; it is 0 if one side is constant.

    Args:
      predicted: ``[n]`` predicted classes, from 0.
      expected: ``[n]`` right classes, from 0.
      num_classes: number of classes; None: the largest class that occurs plus 1, at least 2.

    Returns:
      ``accuracy``, ``f1`` and ``matthews``.

    Raises:
      ValueError: if the shapes differ, there is nothing to compare, or a class is out of range.

    Source: Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient
    (2004).
    """
    predicted, expected = np.asarray(predicted), np.asarray(expected)
    if predicted.shape != expected.shape or predicted.ndim != 1 or not predicted.size:
        raise ValueError(
            f"classes of shapes {list(predicted.shape)} and {list(expected.shape)}; expected [n] "
            "twice, n ≥ 1"
        )
    both = np.concatenate([predicted, expected])
    count = max(2, int(both.max()) + 1) if num_classes is None else num_classes
    if both.min() < 0 or both.max() >= count:
        raise ValueError(f"classes {both.min()} to {both.max()}; expected 0 to {count - 1}")
    table = np.zeros((count, count))  # [expected, predicted]
    np.add.at(table, (expected, predicted), 1)
    hits, right, guessed = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    f1 = 2 * hits / np.maximum(right + guessed, 1)
    total = table.sum()
    spread = np.sqrt((total**2 - (right**2).sum()) * (total**2 - (guessed**2).sum()))
    covariance = hits.sum() * total - right @ guessed
    return {
        "accuracy": float(hits.sum() / total),
        "f1": float(f1[-1] if count == 2 else f1[right + guessed > 0].mean()),
        "matthews": float(covariance / spread) if spread else 0.0,
    }


def classify(
    config: ModelConfig, params: Any, examples: Examples, batch_size: int = 32
) -> tuple[np.ndarray, dict[str, float]]:
    """Runs a classifier, dense or compressed, with matrix products in full float32 precision.

    Args:
      config: the model's architecture.
      params: the model's parameters; leaves may be kernels of any kind.
      examples: inputs and right classes.
      batch_size: sequences per forward pass; changes the result only by rounding.

    Returns:
      The predicted classes ``[n]`` int32, and their `scores`.

    Raises:
      ValueError: if the model is no classifier, the examples do not fit it, or a logit is not
        finite.
    """
    if config.head != "classes":
        raise ValueError(
            f"a model with head {config.head!r} does not classify; expected head 'classes'"
        )
    if not examples.size or batch_size < 1:
        raise ValueError(
            f"{examples.size} examples, batch size {batch_size}; expected 1 or more of each"
        )
    check(config, examples)
    # Move the weights to the device once, not in every call.
    params = jax.tree.map(jnp.asarray, params)
    batch_size = min(batch_size, examples.size)
    batches = []
    for start in range(0, examples.size, batch_size):
        # Pad a last, shorter batch: another shape would be compiled again.
        rows = np.minimum(np.arange(start, start + batch_size), examples.size - 1)
        batch = examples.rows(rows)
        with jax.default_matmul_precision("highest"):
            logits = _logits(config, params, batch.tokens, batch.mask, batch.token_types)
        batches.append(np.asarray(logits))
    logits = np.concatenate(batches)[: examples.size]
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
