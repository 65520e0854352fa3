"""Chooses the temperature of policy ``block-influence`` by the loss on held-out sequences.

The compressed models of all temperatures are compared block by block: none is in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lordjax.allocation.plan import Plan
from lordjax.compression.measured.variants import compare
from lordjax.compression.site_factors import replace_kernels
from lordjax.runtime import multihost
from lordjax.runtime.progress import Clock
from lordjax.storage.store import digest, get_or_compute

if TYPE_CHECKING:
    from lordjax.compression.prepared import Prepared

# MoDeGPT's temperatures, of which held-out calibration sequences choose one. Closer ones gained
# nothing: four sequences choose between them by chance (docs/pages/tried.md).
TEMPERATURES = (0.05, 0.1, 0.2, 1e6)  # the last one treats all blocks alike


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
        _, *found = compare(
            prepared.source,
            prepared.held_out,
            change,
            [0] * len(plans),
            clock,
            stage="comparison",
            mask_token=prepared.calibration.mask_token,
        )
        means = [float(losses.mean()) for losses in found]
        return multihost.all_gather_json(means)[0]  # all processes must arrive at the same plan

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
