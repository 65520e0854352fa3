"""Chooses the temperature of policy ``block-influence`` by the loss on held-out sequences.

The compressed models of all temperatures are compared block by block: none is in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lordjax.allocation.plan import Plan
from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import hidden_states, on_device
from lordjax.calibration.observers import observe, sequences_per_step
from lordjax.compression.site_factors import replace_kernels
from lordjax.models import objective
from lordjax.models.objective import check_finite, check_windows, decisions, losses
from lordjax.models.source import Source
from lordjax.runtime import multihost
from lordjax.runtime.progress import Clock
from lordjax.storage.store import digest, get_or_compute

if TYPE_CHECKING:
    from lordjax.compression.prepared import Prepared

# MoDeGPT's temperatures, of which held-out calibration sequences choose one. Closer ones gained
# nothing: four sequences choose between them by chance (docs/pages/tried.md).
TEMPERATURES = (0.05, 0.1, 0.2, 1e6)  # the last one treats all blocks alike


def compare(
    source: Source,
    tokens: np.ndarray,
    change: Callable[[dict[str, Any], int, int], Any],
    variants: int,
    clock: Clock,
    *,
    mask_token: int | None = None,
) -> list[float]:
    """Returns the losses of models that differ inside their blocks, one block at a time.

    Each block is read once and compiled once for all variants. Matrix products have full float32
    precision, as in `perplexity`. For a classifier the targets are the original model's
    predictions.

    Args:
      source: the original model.
      tokens: ``[n, L]`` integer ids, L ≥ 2.
      change: function ``(block, layer, variant) -> block`` that keeps the shapes of all arrays.
      variants: number of variants.
      clock: reports progress.
      mask_token: id of the mask token; see `objective.inputs`.

    Returns:
      The loss of each variant in nats per target.

    Raises:
      ValueError: if the model has no head, there is no target, or a negative log-likelihood is not
        finite.
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


def best_plan(prepared: Prepared, planned: Callable[[float], Plan]) -> Plan:
    """Returns the plan of the temperature with the least loss on the held-out sequences.

    Args:
      prepared: the model, its factors and the held-out sequences.
      planned: function ``temperature -> plan``; raises ValueError if the budget cannot be met.

    Raises:
      ValueError: if the calibration sequences are padded, or no temperature fits the budget.
    """
    if prepared.calibration.mask is not None:
        raise ValueError(
            "a temperature cannot be chosen on padded calibration sequences; name a temperature"
        )
    plans = _distinct_plans(planned)
    if len(plans) == 1:
        return plans[0]
    config, clock = prepared.source.config, Clock(prepared.progress)

    def change(block: dict[str, Any], i: int, j: int) -> dict[str, Any]:
        factors, ranks = prepared.factors, plans[j].ranks
        return replace_kernels(block, i, factors, ranks, prepared.method, config, padded=True)

    def measured() -> list[float]:
        mask_token = prepared.calibration.mask_token
        found = compare(
            prepared.source, prepared.held_out, change, len(plans), clock, mask_token=mask_token
        )
        return multihost.all_gather_json(found)[0]  # all processes must arrive at the same plan

    key = f"losses-{digest([dict(plan.ranks) for plan in plans])}"
    found = get_or_compute(prepared.store, key, measured)
    prepared.report["seconds"] |= clock.seconds
    return plans[int(np.argmin(found))]


def _distinct_plans(planned: Callable[[float], Plan]) -> list[Plan]:
    """Returns the plans of all `TEMPERATURES` that fit the budget, each once."""
    plans: dict[tuple[Any, ...], Plan] = {}
    problems = []
    for temperature in TEMPERATURES:
        try:
            plan = planned(temperature)
        except ValueError as problem:  # the cap and the tile exceed the budget at this temperature
            problems.append(problem)
            continue
        plans.setdefault(tuple(plan.ranks.items()), plan)  # close temperatures may agree
    if not plans:
        raise problems[-1]
    return list(plans.values())
