"""Models that differ inside their blocks: their losses, and how far their predictions are apart.

Only one block of each is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import hidden_states, on_device
from lordjax.calibration.observers import observe, sequences_per_step
from lordjax.models import objective
from lordjax.models.config import ModelConfig
from lordjax.models.divergence import divergences
from lordjax.models.objective import check_finite, check_windows, decisions, losses
from lordjax.models.source import Source
from lordjax.runtime.progress import Clock

Change = Callable[[dict[str, Any], int, int], Any]


def compare(
    source: Source,
    tokens: np.ndarray,
    change: Change,
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

    def judge(ends: _Ends) -> list[np.ndarray]:
        config, goals = source.config, ends.goals
        if objective.decides(config):
            goals = [decisions(config, ends.rest, x) for x in ends.original]
        found = (ends.original, *ends.variants)
        return [_target_losses(config, ends.rest, xs, goals) for xs in found]

    how: dict[str, Any] = {"stage": stage, "mask_token": mask_token}
    return _run_all(judge, source, tokens, change, starts, clock, **how)


def mean_divergences(
    source: Source, *given: Any, stage: str, mask_token: int | None
) -> list[float]:
    """Returns how far the predictions of variants are from the original model's.

    They vary much less from text to text than the losses of `compare`, so that few tokens suffice
    to compare variants.

    Args:
      source: the original model, which predicts tokens.
      *given: ``tokens``, ``change``, ``starts`` and ``clock``, as for `compare`.
      stage: as for `compare`.
      mask_token: as for `compare`.

    Returns:
      For each variant the mean of ``KL(original || variant)`` over all targets, in nats.

    Raises:
      ValueError: if there is no target, or a divergence is not finite.
    """

    def judge(ends: _Ends) -> list[float]:
        return [_mean_divergence(source.config, ends, xs) for xs in ends.variants]

    return _run_all(judge, source, *given, stage=stage, mask_token=mask_token)


class _Ends(NamedTuple):
    """What comes out of the last block.

    Attributes:
      rest: parameters outside the blocks, on the device.
      goals: targets of each batch.
      original: hidden states of each batch in the original model.
      variants: the same of each variant.
    """

    rest: Any
    goals: list[Any]
    original: list[Any]
    variants: list[list[Any]]


def _run_all(
    judge: Callable[[_Ends], Any],
    source: Source,
    tokens: np.ndarray,
    change: Change,
    starts: Sequence[int],
    clock: Clock,
    *,
    stage: str,
    mask_token: int | None,
) -> Any:
    """Runs the original model and the variants, and returns what ``judge`` says of their ends.

    The other arguments are those of `compare`.
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
            return judge(_Ends(on_device(source.non_block_params()), goals, original, states))


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


def _mean_divergence(config: ModelConfig, ends: _Ends, states: Sequence[Any]) -> float:
    """Returns the mean divergence of a variant; raises ValueError if it is not finite."""
    given = zip(states, ends.original, ends.goals, strict=True)
    total = sum(
        float(np.sum(np.asarray(divergences(config, ends.rest, ends.rest, x, y, goals), float)))
        for x, y, goals in given
    )
    count = sum(int(np.sum(np.asarray(goals) >= 0)) for goals in ends.goals)
    if not count or not np.isfinite(total):
        raise ValueError(f"the divergence over {count} targets is {total}, expected a number")
    return total / count
