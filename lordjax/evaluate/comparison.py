"""Losses of variants of a model that are never in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lordjax.calibrate import hidden_states, on_device
from lordjax.collect import observe, windows_per_step
from lordjax.evaluate.perplexity import check_finite, check_windows, nll_behind
from lordjax.progress import Clock
from lordjax.source import Calibration, Source


def compare(
    source: Source,
    tokens: np.ndarray,
    change: Callable[[dict[str, Any], int, int], Any],
    variants: int,
    clock: Clock,
) -> list[float]:
    """Losses of models that differ inside their blocks, all of them one block at a time.

    A block is read once for all, and all share the compilation of one block. Products are at full
    float32 precision, as in `perplexity`.

    Args:
      source: the model they are variants of.
      tokens: ``[n, L]`` integer ids, L ≥ 2.
      change: ``(block, its number, variant) -> block`` in arrays of the same shapes.
      variants: how many there are.
      clock: for progress.

    Returns:
      Nats per token of each variant.

    Raises:
      ValueError: if there is no target, or a negative log-likelihood is not finite.
    """
    check_windows(tokens)
    config = source.config
    steps = Calibration(tokens, None, windows_per_step(*tokens.shape))
    batches = [batch for batch, _ in steps.batches()]
    with jax.default_matmul_precision("highest"):
        start = hidden_states(source, steps)
        states = [list(start) for _ in range(variants)]
        for i in clock.run("comparison", range(config.num_layers)):
            block = source.block(i)
            for j, xs in enumerate(states):
                own = on_device(change(block, i, j))
                for k, x in enumerate(xs):
                    xs[k] = observe(own, x, None, {}, config=config, window=config.window(i))[0]
        with clock.part("comparison"):
            rest = on_device(source.rest())
            pairs = [zip(xs, batches, strict=True) for xs in states]
            nlls = [[np.asarray(nll_behind(config, rest, *pair)) for pair in xs] for xs in pairs]
    losses = []
    for parts in nlls:
        nll = np.concatenate(parts).astype(np.float64)
        check_finite(nll, 0)
        losses.append(float(nll.mean()))
    return losses
