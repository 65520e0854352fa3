"""What a compression will cost and leave, for ``lordjax plan`` and the report of ``compress``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lordjax.models.config import ModelConfig
    from lordjax.plan import Plan
    from lordjax.source import InMemory
    from lordjax.speed import Rates
    from lordjax.stages import Job

MEASURING = 5.0  # seconds that the micro-benchmark may take
LITTLE = 1e11  # operations: a second of any machine
SHARE = 0.02  # of a job that forecasting it may take


def planned(
    config: ModelConfig, method: str, keep: float, ranks: dict[str, int] | None, policy: str
) -> tuple[Plan, bool]:
    """The plan, and whether it is exact: without calibration data it is that of uniform ranks.

    Raises:
      KeyError: if a pattern of ``ranks`` decides no site.
      ValueError: if ranks do not fit, or the budget cannot be met.
    """
    from lordjax import sizing
    from lordjax.allocation import CURVELESS
    from lordjax.factoring import site_sizes
    from lordjax.plan import Plan

    sizes = site_sizes(sizing.shapes(config), method)
    if ranks is not None:
        chosen = sizing.ranks_by_pattern(sizes, ranks)
        return Plan(method, chosen, None, sizing.GIVEN), True
    if keep == 1 and policy not in CURVELESS:
        return Plan(method, dict.fromkeys(sizes), keep, policy), True
    exact = policy in CURVELESS
    plan = sizing.plan_by_shapes(config, method, keep, policy if exact else "uniform")
    return plan, exact


def cost(job: Job, before: InMemory, after: Any, rates: Rates | None) -> dict[str, Any]:
    """Operations, memory and, with rates, seconds of a job.

    Args:
      job: what is asked for.
      before: shapes of the stored model.
      after: shapes of the result.
      rates: of this machine; None: no seconds.
    """
    from lordjax import flops, forecast
    from lordjax.kernels import nbytes
    from lordjax.stages import stages

    work = stages(job)
    work["write"] = flops.Work({"write": nbytes(after)})
    found: dict[str, Any] = {
        "bytes": nbytes(after),
        "flops": {name: flops.total(w) for name, w in work.items() if flops.total(w)},
        "memory": forecast.memory(job, work, before.params, after),
    }
    if rates is not None:
        expected = forecast.seconds(work, rates)
        found["seconds"] = expected
        spread = forecast.SPREAD
        found["range"] = [expected["total"] / spread, expected["total"] * spread]
        found["rates"] = rates
    return found


def of_compression(
    config: ModelConfig,
    leaves: dict[str, Any],
    shape: tuple[int, int],
    settings: dict[str, Any],
    directory: Path,
) -> dict[str, Any]:
    """What `compress` is about to do; of small jobs no seconds, for which one has to measure.

    Args:
      config: the model.
      leaves: its parameters, by path.
      shape: windows of calibration and their length.
      settings: of `lordjax.compress`, and the method.
      directory: where the result goes.
    """
    from lordjax import sizing, speed
    from lordjax.kernels import is_kernel
    from lordjax.stages import Job

    ranks = settings["ranks"]
    policy = "uniform" if ranks is not None else settings["allocation"]
    plan, exact = planned(config, settings["method"], settings["keep"], ranks, policy)
    job = Job(
        config,
        settings["method"],
        *shape,
        policy,
        settings["prefix"],
        plan.ranks if exact else None,
        settings["keep"],
        settings["temperature"],
    )
    if any(map(is_kernel, leaves.values())):
        leaves = dict(_flat(sizing.shapes(config)))
    before = sizing.stored(config, leaves)
    after = sizing.outline(config, plan, sizing.stored(config, leaves, settings["dtype"]))
    found = cost(job, before, after, None)
    if worth_measuring(sum(found["flops"].values())):
        there = next(p for p in directory.absolute().parents if p.exists())
        found = cost(job, before, after, speed.measure(there))
    return found | {"ranks_are": EXACT if exact else ESTIMATED}


EXACT = "exact"
ESTIMATED = "uniform ranks, an estimate: the policy decides from calibration data"


def _flat(source: InMemory) -> dict[str, Any]:
    from lordjax import trees

    return trees.flatten(source.params)


def worth_measuring(operations: float) -> bool:
    """Whether the micro-benchmark takes little of a job's time."""
    from lordjax import speed

    if operations < LITTLE:
        return False
    return operations / speed.matmul_rate() > MEASURING / SHARE


def happened(report: dict[str, Any], predicted: dict[str, Any]) -> dict[str, Any]:
    """What a report says of a run, in the terms of the forecast, and its speed.

    ``flops_per_second`` are achieved ones, of what had to be done.
    """
    seconds = dict(report["seconds"])
    factors = [n for stage, n in seconds.items() if stage.startswith("factors of")]
    both = seconds.get("statistics and factors")
    if both is not None:
        seconds |= {"statistics": both - sum(factors), "factors": sum(factors)}
    stages = {
        name: seconds[name]
        for name in ("gradients", "statistics", "factors", "comparison", "sequential", "apply")
        if name in seconds
    }
    if "sequential" in stages:  # is part of putting the result together
        stages["apply"] = max(stages["apply"] - stages["sequential"], 0.0)
    speeds = {
        n: predicted["flops"][n] / s for n, s in stages.items() if n in predicted["flops"] and s
    }
    return {
        "seconds": stages | {"total": sum(stages.values())},
        "peak_rss_bytes": report["peak_rss_bytes"],
        "bytes": report["bytes"],
        "flops_per_second": speeds,
    }
