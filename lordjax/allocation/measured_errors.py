"""Predicted errors, corrected by losses that are measured on held-out data.

Predicted errors are a quadratic form of second moments: they assume that activations and gradients
are independent, and that unseen data is like the calibration data. Both fail most in the last
blocks. So at a few blocks a site is compressed alone, and the loss of the whole model is measured
on data that no statistic has seen. The ratio of measured and predicted loss corrects the errors of
all ranks; between the measured blocks and ranks it is interpolated.

Cross-fitted errors are those of factors that have seen half of the tokens. Where gradients are few
that can be far too much; the measured losses also say how far they are trusted (`_trust`).

Then one plan for the whole model is measured. Its ratio corrects the sum of the errors: the loss of
many cuts is not the sum of their losses.

Source: layer-wise error models, LEMS (ICML 2026), do the same with other predictors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lordjax.allocation.curves import Curve
from lordjax.allocation.plan import Plan

# Fractions of the weights that a checked site keeps: at the last blocks, and at the others, where
# the ratio depends little on the rank.
LAST_BLOCKS = 4
LAST_KEPT, OTHER_KEPT = (0.95, 0.8, 0.5), (0.7,)
OTHERS = 3  # checked blocks besides the last ones, evenly spread
# A difference of mean losses counts if it exceeds its standard error this many times. Below, half
# the mean squared difference does, which is the same to second order and has less noise.
SIGNIFICANT = 4.0
MOST, LEAST = 1e3, 0.02  # range of the ratio of measured and predicted loss
WHOLE_KEPT = 0.8  # of the plan that is measured as a whole
BLOCK = "block"  # group of the rows that measure the removal of a whole block
REMOVED = 4  # one in so many blocks is measured without: those whose predicted loss is least
WARNING = 3.0  # ratio from which a site is named in a warning


class Place(NamedTuple):
    """Where a site is in a model.

    Attributes:
      block: number of its block.
      group: sites of a block with the same group are compressed together, to measure them.
      kind: sites of the same kind, in different blocks, share what was measured.
    """

    block: int
    group: str
    kind: str


class Checked(Protocol):
    """A model with predicted errors of all sites, which `check` measures.

    Attributes:
      checked: rows of `check`, which correct ``curves`` and ``plan``; empty at first.
    """

    checked: list[dict[str, Any]]

    @property
    def places(self) -> Mapping[str, Place]:
        """Site path -> where it is."""
        ...

    def curves(self, *, in_sample: bool = False) -> Mapping[str, Curve]:
        """Returns the predicted error of every site at every rank."""
        ...

    def plan(self, keep: float) -> Plan:
        """Allocates ranks within a budget."""
        ...


# Variants of a model, each site path -> rank -> the losses in nats that they add.
Measure = Callable[[Sequence[Mapping[str, int]]], Sequence[float]]


class Point(NamedTuple):
    """Sites of a block that are compressed together, to measure what that costs.

    Attributes:
      layer: number of the block.
      group: group of the sites; see `Place`.
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


def trials(places: Mapping[str, Place]) -> list[tuple[int, str, list[str], float]]:
    """Returns what is measured: block, group, its site paths, and fraction of weights to keep.

    Args:
      places: site path -> where it is, for all sites.
    """
    found = []
    for i, fractions in checked_blocks(1 + max(place.block for place in places.values())).items():
        groups: dict[str, list[str]] = {}
        for path, place in places.items():
            if place.block == i:
                groups.setdefault(place.group, []).append(path)
        for group, own in groups.items():
            used = fractions if group == "mlp" else fractions[-1:]
            found += [(i, group, own, fraction) for fraction in used]
    return found


def points(
    curves: Mapping[str, Curve], in_sample: Mapping[str, Curve], places: Mapping[str, Place]
) -> list[Point]:
    """Returns what is measured.

    Args:
      curves: site path -> predicted errors on unseen tokens, without corrections.
      in_sample: site path -> predicted errors on the tokens that the factors are fitted to.
      places: site path -> where it is.
    """
    found = []
    for i, group, paths, fraction in trials(places):
        ranks = {path: _rank(curves[path], fraction) for path in paths}
        ranks = {path: rank for path, rank in ranks.items() if rank}
        if ranks:
            parts = (
                {path: float(each[path].errors[rank]) for path, rank in ranks.items()}
                for each in (in_sample, curves)
            )
            found.append(Point(i, group, ranks, *parts))
    return found


def removals(layers: int) -> int:
    """Returns how many blocks of a model are measured without."""
    return max(1, layers // REMOVED)


def _removed_blocks(in_sample: Mapping[str, Curve], places: Mapping[str, Place]) -> list[Point]:
    """Returns the blocks whose removal is measured: all of their sites have rank 0."""
    blocks: dict[int, dict[str, float]] = {}
    for path, place in places.items():
        blocks.setdefault(place.block, {})[path] = float(in_sample[path].errors[0])
    order = sorted(blocks, key=lambda i: sum(blocks[i].values()))
    return [
        Point(i, BLOCK, dict.fromkeys(blocks[i], 0), blocks[i], blocks[i])
        for i in order[: removals(len(blocks))]
    ]


def _rank(curve: Curve, fraction: float) -> int:
    """Returns the rank that keeps about a fraction of a site's weights; 0 if none does."""
    step = curve.size.step
    return min(int(fraction * curve.break_even) // step * step, curve.largest)


def check(model: Checked, measure: Measure, *, removes_blocks: bool = False) -> None:
    """Measures the losses of some sites, and of a whole plan, on held-out data.

    The result is ``model.checked``: a row for each `Point`, with ``layer``, ``group``, ``ranks``;
    in nats the ``in_sample``, the ``predicted`` and the ``measured`` loss; the ``ratio`` of the
    last two; ``parts``, site path -> its part of the predicted loss; and ``trust`` (`_trust`). The
    row of the plan has the layer None. It has no parts, nor have rows of removed blocks (`BLOCK`).

    Args:
      model: the model.
      measure: function that measures variants of it; called twice.
      removes_blocks: whether the removal of whole blocks is measured, too.
    """
    in_sample = model.curves(in_sample=True)
    chosen = points(model.curves(), in_sample, model.places)
    chosen += _removed_blocks(in_sample, model.places) if removes_blocks else []
    model.checked = _rows(chosen, measure([point.ranks for point in chosen]))
    plan = model.plan(WHOLE_KEPT)
    ranks = {path: rank for path, rank in plan.ranks.items() if rank is not None}
    if not ranks or plan.predicted is None:
        return
    (loss,) = measure([ranks])
    predicted, in_sample = (plan.predicted[name] for name in ("held_out", "in_sample"))
    parts = {"in_sample": in_sample, "parts": {}, "trust": 1.0}
    row = {"layer": None, "group": "model", "ranks": ranks} | parts
    model.checked.append(row | _compared(predicted, loss))


def predicted_loss(model: Checked, ranks: Mapping[str, int | None]) -> dict[str, float]:
    """Returns the predicted loss of ranks in nats, ``in_sample`` and on ``held_out`` data.

    Args:
      model: a model with errors in nats.
      ranks: site path -> rank; None: dense.
    """
    whole = Correction(model.checked, model.places).whole
    return {
        name: factor
        * sum(curve.error(ranks[path]) for path, curve in model.curves(in_sample=in_sample).items())
        for name, in_sample, factor in (("in_sample", True, 1.0), ("held_out", False, whole))
    }


def _rows(chosen: Sequence[Point], losses: Sequence[float]) -> list[dict[str, Any]]:
    """Returns the rows of `check` for the measured losses of points."""
    trust, rows = _trust(chosen, losses), []
    for point, loss in zip(chosen, losses, strict=True):
        share = trust[point.group]
        parts = {
            path: float(_between(point.in_sample[path], point.unseen[path], share))
            for path in point.ranks
        }
        row = {"layer": point.layer, "group": point.group, "ranks": point.ranks}
        row |= {"in_sample": sum(point.in_sample.values()), "trust": share}
        row |= {"parts": {} if point.group == BLOCK else parts}
        rows.append(row | _compared(sum(parts.values()), loss))
    return rows


def _compared(predicted: float, measured: float) -> dict[str, float]:
    """Returns a predicted and a measured loss, and their ratio, within `LEAST` and `MOST`."""
    ratio = measured / predicted if predicted > 0 else 1.0
    ratio = float(np.clip(ratio, LEAST, MOST))
    return {"predicted": predicted, "measured": measured, "ratio": ratio}


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


def mean_loss(differences: np.ndarray) -> float:
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
      rows: what `check` found.
      places: site path -> where it is.

    Attributes:
      whole: the ratio of a whole plan, whose errors are corrected already.
      removal: number of a block -> loss of removing it: the larger one of what was predicted and
        measured, because a measurement of few tokens can be far too low.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], places: Mapping[str, Place]):
        self._places = places
        self._measured: dict[str, dict[int, list[tuple[float, float]]]] = {}
        self._trust = {row["group"]: row["trust"] for row in rows}
        self.whole = next((row["ratio"] for row in rows if row["layer"] is None), 1.0)
        blocks = (row for row in rows if row["group"] == BLOCK)
        self.removal = {row["layer"]: max(row["predicted"], row["measured"]) for row in blocks}
        for row in rows:
            for path, error in row["parts"].items():
                blocks = self._measured.setdefault(places[path].kind, {})
                pairs = blocks.setdefault(row["layer"], [])
                if error > 0:
                    pairs.append((np.log(error), np.log(row["ratio"])))

    def errors(self, path: str, in_sample: np.ndarray, unseen: np.ndarray) -> np.ndarray:
        """Returns the corrected errors of a site at every rank, non-increasing.

        Args:
          path: path of the site.
          in_sample: its errors at every rank on the tokens that the factors are fitted to.
          unseen: its errors on others, by cross-fitting.
        """
        layer, group, kind = self._places[path]
        predicted = _between(in_sample, unseen, self._trust.get(group, 1.0))
        known = {i: pairs for i, pairs in self._measured.get(kind, {}).items() if pairs}
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


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a sentence about what `check` found."""
    cuts = [row for row in rows if row["group"] != BLOCK]
    pairs = [(row["layer"], row["measured"] / row["predicted"]) for row in cuts if row["predicted"]]
    ratios = sorted(ratio for layer, ratio in pairs if layer is not None) or [1.0]
    wholes = [f"{ratio:.2f} of a whole plan" for layer, ratio in pairs if layer is None]
    found = [f"{ratios[0]:.2f} to {ratios[-1]:.2f} of single blocks", *wholes]
    return f"checked on held-out sequences: measured over predicted loss is {', '.join(found)}"


def warning(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns a warning that names the sites whose loss is far above the prediction; or None."""
    cuts = [row for row in rows if row["layer"] is not None and row["group"] != BLOCK]
    far = [row for row in cuts if row["measured"] > WARNING * row["predicted"]]
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
