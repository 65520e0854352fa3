"""The choice whether the scales of quantized MLPs are searched: by measured predictions.

The search for clip ratios (`methods.quantized.error_feedback`) lowers the predicted loss of every
block of weights. In attention it helped every model that was tried. In MLPs it takes a fifth off
the loss of one model, and doubles that of another on text of another kind than the calibration's.
So the MLPs of some blocks are quantized in both ways, and the model's predictions are compared with
the original ones. The sequences are those of the calibration, on which a search that is fitted to
them looks better than it is: so it has to be better by a margin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from lordjax.allocation.candidates import Candidate
from lordjax.compression.measured.held_out import group_of
from lordjax.compression.measured.variants import mean_divergences
from lordjax.compression.quantized_matrix import stored_directly
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import materialize
from lordjax.models.sites import site_path
from lordjax.runtime import multihost
from lordjax.runtime.progress import Clock
from lordjax.storage.store import get_or_compute

if TYPE_CHECKING:
    from lordjax.compression.quantizer import Quantizer

STAGE = "scales"
GROUPS, MEASURED = ("attention", "mlp"), "mlp"
LEAST_SEQUENCES = 8  # with fewer calibration sequences nothing is measured; all scales are searched
SEQUENCES, BLOCKS = 2, 4  # that the choice is measured on, evenly spread
FORMAT = "nf4"
MARGIN = 0.8  # largest divergence with searched scales, as a share of that without
WAYS = (False, True)  # whether scales are searched


def measures_search(sequences: int, head: str, *, feedback: bool, masked: bool) -> bool:
    """Returns whether a job measures the search, from its settings alone.

    Args:
      sequences: number of calibration sequences.
      head: the model's head; others than causal and masked ones have too few predictions.
      feedback: whether later weights compensate for the errors of earlier ones.
      masked: whether sequences are padded.
    """
    predicts = head in ("causal", "masked")
    return feedback and predicts and sequences >= LEAST_SEQUENCES and not masked


def measured_blocks(layers: int) -> list[int]:
    """Returns the numbers of the blocks that are quantized for the choice."""
    return sorted({int(i) for i in np.linspace(0, layers - 1, BLOCKS).round()})


def searched_groups(quantizer: Quantizer) -> frozenset[str]:
    """Returns the groups of sites whose scales are searched; measures it if there is enough data.

    The report gets both divergences.
    """
    calibration, head = quantizer.calibration, quantizer.source.config.head
    count = 0 if calibration is None else len(calibration.tokens)
    masked = calibration is not None and calibration.mask is not None
    if not measures_search(count, head, feedback=quantizer.feedback, masked=masked):
        return frozenset(GROUPS)
    plain, searched = get_or_compute(quantizer.store, STAGE, lambda: _measured(quantizer))
    chosen = searched <= MARGIN * plain
    quantizer.report["scales"] = {
        "group": MEASURED,
        "format": FORMAT,
        "blocks": measured_blocks(quantizer.source.config.num_layers),
        "divergence": plain,
        "divergence_searched": searched,
        "searched": chosen,
    }
    return frozenset(GROUPS if chosen else {*GROUPS} - {MEASURED})


def _measured(quantizer: Quantizer) -> list[float]:
    """Returns the divergence of each of `WAYS`, the MLPs of some blocks being quantized."""
    assert quantizer.calibration is not None
    clock = Clock(quantizer.progress)
    made, source = _quantized(quantizer, clock), quantizer.source
    few = quantizer.calibration.spread(SEQUENCES)

    def change(block: dict[str, Any], i: int, j: int) -> Any:
        if i not in made:
            return block
        kernels = {path: np.asarray(materialize(kernel)) for path, kernel in made[i][j].items()}
        return trees.update(block, kernels)

    found = mean_divergences(
        source,
        few.tokens,
        change,
        [min(made)] * len(WAYS),
        clock,
        stage=STAGE,
        mask_token=few.mask_token,
    )
    quantizer.report["seconds"] |= clock.seconds
    return multihost.all_gather_json(found)[0]  # all processes must make the same choice


def _quantized(quantizer: Quantizer, clock: Clock) -> dict[int, list[dict[str, Any]]]:
    """Returns block number -> for each of `WAYS` path -> quantized matrix."""
    wanted = measured_blocks(quantizer.source.config.num_layers)
    candidate = Candidate(normal_float.Format.parse(FORMAT), None)
    made: dict[int, list[dict[str, Any]]] = {}
    for i, sites, matrix in quantizer.walk(clock, STAGE, lambda _: False, searches=GROUPS):
        if i not in wanted:
            continue
        made[i] = [{} for _ in WAYS]
        for site in sites:
            if group_of(site_path(i, site)) != MEASURED:
                continue
            kernel, weights = matrix(site)
            for searched, own in zip(WAYS, made[i], strict=True):
                feedback = weights.feedback._replace(searches=jnp.asarray(searched))
                given = candidate, kernel, weights._replace(feedback=feedback), None, None
                own[site.path] = stored_directly(*given, width=1)
    return made
