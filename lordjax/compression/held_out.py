"""Measures on held-out sequences: losses of variants of a model, and the check of predicted errors.

Predicted errors are a quadratic form of second moments: they assume that activations and gradients
are independent, and that unseen text is like the calibration text. Both fail most in the last
blocks. So at a few blocks a site is compressed alone, and the loss of the whole model is measured
on sequences that no statistic has seen. The ratio of measured and predicted loss corrects the
errors of all ranks; between the measured blocks and ranks it is interpolated.

Cross-fitted errors are those of factors that have seen half of the tokens. Where gradients are few
that can be far too much; the measured losses also say how far they are trusted (`_trust`).

Source: layer-wise error models, LEMS (ICML 2026), do the same with other predictors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import hidden_states, on_device
from lordjax.calibration.observers import observe, sequences_per_step
from lordjax.compression.site_factors import replace_kernels
from lordjax.models import objective
from lordjax.models.config import ModelConfig
from lordjax.models.objective import check_finite, check_windows, decisions, losses
from lordjax.models.source import Source
from lordjax.names import layer_index, layer_type
from lordjax.runtime import multihost
from lordjax.runtime.progress import Clock
from lordjax.storage.store import get_or_compute

if TYPE_CHECKING:
    from lordjax.allocation.curves import Curve
    from lordjax.compression.prepared import Prepared

# Fractions of the weights that a checked site keeps: at the last blocks, and at the others, where
# the ratio depends little on the rank.
LAST_BLOCKS = 4
LAST_KEPT, OTHER_KEPT = (0.95, 0.8, 0.5), (0.7,)
OTHERS = 3  # checked blocks besides the last ones, evenly spread
# A difference of mean losses counts if it exceeds its standard error this many times. Below, half
# the mean squared difference does, which is the same to second order and has less noise.
SIGNIFICANT = 4.0
MOST, LEAST = 1e3, 0.02  # range of the ratio of measured and predicted loss
WARNING = 3.0  # ratio from which a site is named in a warning


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
            if config.head == "classes":
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


class Point(NamedTuple):
    """Sites of a block that are compressed together, to measure what that costs.

    Attributes:
      layer: number of the block.
      group: group of the sites; see `group_of`.
      ranks: site path -> rank.
      in_sample: site path -> predicted loss in nats on the tokens that the factors are fitted to.
      unseen: site path -> predicted loss in nats on others, by cross-fitting.
    """

    layer: int
    group: str
    ranks: dict[str, int]
    in_sample: dict[str, float]
    unseen: dict[str, float]


def checked_blocks(layers: int) -> dict[int, tuple[float, ...]]:
    """Returns the blocks that are checked, and the fractions of weights that are kept there."""
    last = range(max(0, layers - LAST_BLOCKS), layers)
    others = np.linspace(0, last.start - 1, OTHERS).round() if last.start else ()
    return {int(i): OTHER_KEPT for i in others} | dict.fromkeys(last, LAST_KEPT)


def group_of(path: str) -> str:
    """Returns the group of a site: ``mlp``, ``attention``, or a module of the attention."""
    inside = path.split("/")[1:]
    return "/".join(inside) if inside[-1] != "kernel" else inside[0]


def trials(paths: Iterable[str], layers: int) -> list[tuple[int, str, list[str], float]]:
    """Returns what is measured: block, group, its site paths, and fraction of weights to keep.

    Args:
      paths: the paths of all sites.
      layers: number of blocks.
    """
    found = []
    for i, fractions in checked_blocks(layers).items():
        groups: dict[str, list[str]] = {}
        for path in paths:
            if layer_index(path) == i:
                groups.setdefault(group_of(path), []).append(path)
        for group, own in groups.items():
            used = fractions if group == "mlp" else fractions[-1:]
            found += [(i, group, own, fraction) for fraction in used]
    return found


def points(curves: Mapping[str, Curve], in_sample: Mapping[str, Curve], layers: int) -> list[Point]:
    """Returns what is measured.

    Args:
      curves: site path -> predicted errors on unseen tokens, without corrections.
      in_sample: site path -> predicted errors on the tokens that the factors are fitted to.
      layers: number of blocks.
    """
    found = []
    for i, group, paths, fraction in trials(curves, layers):
        ranks = {path: _rank(curves[path], fraction) for path in paths}
        ranks = {path: rank for path, rank in ranks.items() if rank}
        if ranks:
            parts = (
                {path: float(each[path].errors[rank]) for path, rank in ranks.items()}
                for each in (in_sample, curves)
            )
            found.append(Point(i, group, ranks, *parts))
    return found


def _rank(curve: Curve, fraction: float) -> int:
    """Returns the rank that keeps about a fraction of a site's weights; 0 if none does."""
    step = curve.size.step
    return min(int(fraction * curve.break_even) // step * step, curve.largest)


def check(prepared: Prepared) -> list[dict[str, Any]]:
    """Measures the losses of some sites on the held-out sequences.

    Returns:
      A row for each `Point`: ``layer``, ``group``, ``ranks``; in nats the ``in_sample``, the
      ``predicted`` and the ``measured`` loss; the ``ratio`` of the last two; ``parts``, site path
      -> its part of the predicted loss; and ``trust`` (`_trust`).
    """
    config, clock = prepared.source.config, Clock(prepared.progress)
    chosen = points(prepared.curves(), prepared.curves(in_sample=True), config.num_layers)

    def change(block: dict[str, Any], i: int, j: int) -> dict[str, Any]:
        if i != chosen[j].layer:
            return block
        factors, method = prepared.factors, prepared.method
        return replace_kernels(block, i, factors, chosen[j].ranks, method, config, padded=True)

    def measured() -> list[float]:
        dense, *others = compare(
            prepared.source,
            prepared.held_out,
            change,
            [point.layer for point in chosen],
            clock,
            stage="held-out check",
            mask_token=prepared.calibration.mask_token,
        )
        found = [_loss(nll - dense) for nll in others]
        return multihost.all_gather_json(found)[0]  # all processes must arrive at the same plan

    found = get_or_compute(prepared.store, "held-out losses", measured)
    prepared.report["seconds"] |= clock.seconds
    trust, rows = _trust(chosen, found), []
    for point, loss in zip(chosen, found, strict=True):
        share = trust[point.group]
        parts = {
            path: float(_between(point.in_sample[path], point.unseen[path], share))
            for path in point.ranks
        }
        predicted = sum(parts.values())
        ratio = loss / predicted if predicted > 0 else 1.0
        rows.append(
            {
                "layer": point.layer,
                "group": point.group,
                "ranks": point.ranks,
                "in_sample": sum(point.in_sample.values()),
                "predicted": predicted,
                "measured": loss,
                "ratio": float(np.clip(ratio, LEAST, MOST)),
                "parts": parts,
                "trust": share,
            }
        )
    return rows


def _trust(chosen: Sequence[Point], losses: Sequence[float]) -> dict[str, float]:
    """Returns how far the cross-fitted errors of each group are trusted: 0 to 1.

    Factors of half of the tokens may be much worse than those of all, if their gradients are few.
    So the errors are taken between the in-sample ones (0) and the cross-fitted ones (1), on a
    logarithmic scale, where the measured losses lie in the median.
    """
    shares: dict[str, list[float]] = {}
    for point, loss in zip(chosen, losses, strict=True):
        inside, unseen = sum(point.in_sample.values()), sum(point.unseen.values())
        own = shares.setdefault(point.group, [])
        if 0 < inside < unseen and loss > 0:
            share = np.log(loss / inside) / np.log(unseen / inside)
            own.append(float(np.clip(share, 0, 1)))
    return {group: float(np.median(own)) if own else 1.0 for group, own in shares.items()}


def _between(in_sample: Any, unseen: Any, share: float) -> Any:
    """Returns what lies between two errors on a logarithmic scale."""
    return np.power(in_sample, 1 - share) * np.power(unseen, share)


def _loss(differences: np.ndarray) -> float:
    """Returns the loss in nats from the differences of the targets' losses ``[targets]``.

    For small changes of a model that fits its data, the mean of the differences is half the mean of
    their squares (the Fisher information is the curvature). The latter is less noisy.
    """
    mean, square = float(differences.mean()), float((differences**2).mean())
    significant = mean > SIGNIFICANT * np.sqrt(square / len(differences))
    return mean if significant else square / 2


class Correction:
    """The ratio of measured and predicted loss, for every block, layer or module, and error.

    Args:
      rows: what `check` returned.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self._measured: dict[str, dict[int, list[tuple[float, float]]]] = {}
        self._trust = {row["group"]: row["trust"] for row in rows}
        for row in rows:
            for path, error in row["parts"].items():
                pairs = self._measured.setdefault(layer_type(path), {}).setdefault(row["layer"], [])
                if error > 0:
                    pairs.append((np.log(error), np.log(row["ratio"])))

    def errors(self, path: str, in_sample: np.ndarray, unseen: np.ndarray) -> np.ndarray:
        """Returns the corrected errors of a site at every rank, non-increasing.

        Args:
          path: path of the site.
          in_sample: its errors at every rank on the tokens that the factors are fitted to.
          unseen: its errors on others, by cross-fitting.
        """
        predicted = _between(in_sample, unseen, self._trust.get(group_of(path), 1.0))
        layer, groups = layer_index(path), self._measured.get(layer_type(path), {})
        known = {i: pairs for i, pairs in groups.items() if pairs}
        if not known:
            return predicted
        logs = np.log(np.maximum(predicted, np.finfo(float).tiny))
        below = max((i for i in known if i <= layer), default=min(known))
        above = min((i for i in known if i >= layer), default=max(known))
        share = 0.0 if above == below else (layer - below) / (above - below)
        ratios = []
        for i in (below, above):
            losses, values = np.array(sorted(known[i])).T
            ratios.append(np.interp(logs, losses, values))
        errors = predicted * np.exp((1 - share) * ratios[0] + share * ratios[1])
        return np.maximum.accumulate(errors[::-1])[::-1]


def warning(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns a warning that names the sites whose loss is far above the prediction; or None."""
    far = [row for row in rows if row["measured"] > WARNING * row["predicted"]]
    if not far:
        return None
    names = dict.fromkeys(f"layer_{row['layer']}/{row['group']}" for row in far)
    worst = max(far, key=lambda row: row["ratio"])
    return (
        f"on held-out sequences the measured loss is more than {WARNING:g} times the predicted one "
        f"at {', '.join(names)}; worst at layer_{worst['layer']}: {worst['measured']:.4f} nats, "
        f"predicted {worst['predicted']:.4f}. The plan uses corrected errors; more calibration "
        "sequences, or some like the text that the model will see, make them smaller"
    )
