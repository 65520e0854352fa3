"""Losses of variants of a model that are never in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import hidden_states, on_device
from lordjax.calibration.observers import observe, sequences_per_step
from lordjax.models import objective
from lordjax.models.objective import check_finite, check_windows, decisions, losses
from lordjax.models.source import Source
from lordjax.runtime.progress import Clock


def compare(
    source: Source,
    tokens: np.ndarray,
    change: Callable[[dict[str, Any], int, int], Any],
    variants: int,
    clock: Clock,
    *,
    mask_token: int | None = None,
) -> list[float]:
    """Losses of models that differ inside their blocks, all of them one block at a time.

    A block is read once for all, and all share the compilation of one block. Products are at full
    float32 precision, as in `perplexity`. What a classifier has to predict is what the model that
    they are variants of says.

    Args:
      source: the model they are variants of.
      tokens: ``[n, L]`` integer ids, L ≥ 2.
      change: ``(block, its number, variant) -> block`` in arrays of the same shapes.
      variants: how many there are.
      clock: for progress.
      mask_token: see `objective.inputs`.

    Returns:
      Nats per target of each variant.

    Raises:
      ValueError: if there is no target or no head, or a negative log-likelihood is not finite.
    """
    check_windows(tokens)
    config = source.config
    steps = Calibration(tokens, None, sequences_per_step(*tokens.shape), mask_token)
    goals = [objective.targets(config, *batch) for batch in steps.batches()]
    classes = config.head == "classes"
    with jax.default_matmul_precision("highest"):
        start = hidden_states(source, steps)
        states = [list(start) for _ in range(variants + classes)]
        for i in clock.run("comparison", range(config.num_layers)):
            block = source.block(i)
            for j, xs in enumerate(states):
                own = on_device(change(block, i, j) if j < variants else block)
                for k, x in enumerate(xs):
                    xs[k] = observe(
                        own, x, None, {}, config=config, sliding_window=config.window(i)
                    )[0]
        with clock.part("comparison"):
            rest = on_device(source.non_block_params())
            if classes:
                goals = [decisions(config, rest, x) for x in states.pop()]
            pairs = [zip(xs, goals, strict=True) for xs in states]
            nlls = [[np.asarray(losses(config, rest, *pair)) for pair in xs] for xs in pairs]
    counts, means = np.concatenate(goals) >= 0, []
    for parts in nlls:
        nll = np.concatenate(parts).astype(np.float64)
        check_finite(config, nll, 0)
        means.append(float(nll[counts].mean()))
    return means


# MoDeGPT's temperatures, of which held-out calibration windows choose one. Closer ones, between
# which four windows choose by chance, gained nothing (docs/pages/tried.md).
TEMPERATURES = (0.05, 0.1, 0.2, 1e6)  # the last: all blocks alike
