"""Losses of models that differ inside their blocks; only one block of each is in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import hidden_states, on_device
from lordjax.calibration.observers import observe, sequences_per_step
from lordjax.models import objective
from lordjax.models.config import ModelConfig
from lordjax.models.objective import check_finite, check_windows, decisions, losses
from lordjax.models.source import Source
from lordjax.runtime.progress import Clock


def compare(
    source: Source,
    tokens: np.ndarray,
    change: Callable[[dict[str, Any], int, int], Any],
    starts: Sequence[int],
    clock: Clock,
    *,
    stage: str,
    mask_token: int | None = None,
) -> list[np.ndarray]:
    """Returns the losses of models that differ inside their blocks, one block at a time.

    Each block is read once and compiled once for all variants. A variant runs from the first block
    in which it differs. Matrix products have full float32 precision, as in `perplexity`. For a
    classifier the targets are the original model's predictions.

    Args:
      source: the original model.
      tokens: ``[n, L]`` integer ids, L ≥ 2.
      change: function ``(block, layer, variant) -> block`` that keeps the shapes of all arrays; it
        returns ``block`` itself where the variant does not differ.
      starts: for each variant, the first block in which it differs.
      clock: reports progress.
      stage: name of the stage.
      mask_token: id of the mask token; see `objective.inputs`.

    Returns:
      The loss of every target, in nats, for the original model and for each variant.

    Raises:
      ValueError: if the model has no head, there is no target, or a negative log-likelihood is not
        finite.
    """
    check_windows(tokens)
    config = source.config
    steps = Calibration(tokens, None, sequences_per_step(*tokens.shape), mask_token)
    goals = [objective.targets(config, *batch) for batch in steps.batches()]
    with jax.default_matmul_precision("highest"):
        original = hidden_states(source, steps)
        states: list[list[Any]] = [[] for _ in starts]
        for i in clock.run(stage, range(config.num_layers)):
            block = source.block(i)
            own = on_device(block)
            for j, start in enumerate(starts):
                if start > i:
                    continue
                new = change(block, i, j)
                xs = original if start == i else states[j]
                states[j] = _run(config, own if new is block else on_device(new), i, xs)
            original = _run(config, own, i, original)
        with clock.part(stage):
            rest = on_device(source.non_block_params())
            if objective.decides(config):
                goals = [decisions(config, rest, x) for x in original]
            return [_target_losses(config, rest, xs, goals) for xs in (original, *states)]


def _run(config: ModelConfig, block: Any, i: int, xs: Sequence[Any]) -> list[Any]:
    """Returns the outputs of block ``i`` on batches of hidden states."""
    window = config.window(i)
    return [observe(block, x, None, {}, config=config, sliding_window=window)[0] for x in xs]


def _target_losses(config: ModelConfig, rest: Any, states: Sequence[Any], goals: Any) -> np.ndarray:
    """Returns the loss of every target; raises ValueError if one is not finite."""
    parts = [np.asarray(losses(config, rest, *pair)) for pair in zip(states, goals, strict=True)]
    nll = np.concatenate(parts).astype(np.float64)
    check_finite(config, nll, 0)
    return nll[np.concatenate(goals) >= 0]
