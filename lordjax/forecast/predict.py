"""What a compression will cost and leave, for ``lordjax plan`` and the report of ``compress``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lordjax.allocation.plan import Plan
    from lordjax.forecast.job import CompressionSpec
    from lordjax.forecast.machine_rates import Rates
    from lordjax.forecast.quantized_cost import QuantizationSpec
    from lordjax.models.config import ModelConfig
    from lordjax.models.source import InMemory

MEASURING = 5.0  # seconds that the micro-benchmark may take
LITTLE = 1e11  # operations: a second of any machine
# Stages of the reports of `prepare`, `compress` and `quantize`.
TIMED = (
    *("gradients", "statistics", "factors", "comparison", "sequential"),
    *("predictions", "decomposition", "apply"),
)
SHARE = 0.02  # of a job that forecasting it may take


def planned(
    config: ModelConfig, method: str, keep: float, ranks: dict[str, int] | None, policy: str
) -> tuple[Plan, bool]:
    """The plan, and whether it is exact: without calibration data it is that of uniform ranks.

    Raises:
      KeyError: if a pattern of ``ranks`` decides no site.
      ValueError: if ranks do not fit, or the budget cannot be met.
    """
    from lordjax.allocation import policies
    from lordjax.allocation.plan import Plan
    from lordjax.allocation.policies import CURVELESS
    from lordjax.compression.site_factors import site_sizes
    from lordjax.forecast import shapes as sizing

    sizes = site_sizes(sizing.shapes(config), method)
    if ranks is not None:
        chosen = policies.ranks_by_pattern(sizes, ranks)
        return Plan(method, chosen, None, policies.GIVEN), True
    if keep == 1 and policy not in CURVELESS:
        return Plan(method, dict.fromkeys(sizes), keep, policy), True
    exact = policy in CURVELESS
    plan = sizing.plan_by_shapes(config, method, keep, policy if exact else "uniform")
    return plan, exact


def cost(
    job: CompressionSpec,
    before: InMemory,
    after: Any,
    rates: Rates | None,
    mesh: str | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Operations, memory and, with rates, seconds of a job.

    Args:
      job: what is asked for.
      before: shapes of the stored model.
      after: shapes of the result.
      rates: of this machine; None: no seconds.
      mesh: axes of devices that share the work, ``data=N``; None: one device.
      processes: that have them, each as many; memory and seconds are one's.

    Raises:
      ValueError: if a mesh has an axis besides ``data``, or processes do not divide it.
    """
    from lordjax.forecast import device_shares, peak_memory
    from lordjax.forecast.low_rank_cost import stages
    from lordjax.forecast.quantized_cost import QuantizationSpec, quantized_stages
    from lordjax.forecast.seconds import SPREAD, seconds
    from lordjax.kernels.base import nbytes
    from lordjax.runtime import flops

    count, job = devices(mesh), dataclasses.replace(job, meshed=mesh is not None)
    if count % processes:
        raise ValueError(
            f"--mesh {mesh}: {count} devices for {processes} processes; not as many each"
        )
    ops = quantized_stages(job) if isinstance(job, QuantizationSpec) else stages(job)
    ops["write"] = flops.OpCounts({"write": nbytes(after)})
    found: dict[str, Any] = {
        "bytes": nbytes(after),
        "flops": {name: flops.total(w) for name, w in ops.items() if flops.total(w)},
        "memory": peak_memory.memory(job, ops, before.params, after, count, processes),
    }
    shares = device_shares.shared(job, ops, count) if count > 1 else {}
    if rates is not None:
        done = {
            name: device_shares.together(shares[name], processes) if name in shares else w
            for name, w in ops.items()
        }
        expected = seconds(done, rates)
        found["seconds"] = expected
        spread = SPREAD
        found["range"] = [expected["total"] / spread, expected["total"] * spread]
        found["rates"] = rates
    if shares:
        found["devices"] = device_shares.report(shares, ops, found.get("seconds", {}))
    return found


def devices(mesh: str | None) -> int:
    """How many devices share the work.

    Raises:
      ValueError: if the mesh cuts blocks, of which nothing is forecast.
    """
    from lordjax.runtime.mesh import DATA_AXIS, parse

    axes = {DATA_AXIS: 1} if mesh is None else parse(mesh)
    if set(axes) != {DATA_AXIS}:
        raise ValueError(f"--mesh {mesh}: nothing is forecast of an axis besides {DATA_AXIS}")
    return axes[DATA_AXIS]


def quantized_plan(
    config: ModelConfig, method: str, windows: int, length: int, settings: dict[str, Any]
) -> tuple[QuantizationSpec, bool]:
    """The job of a method with codes, and whether what becomes of its matrices is exact.

    Args:
      config: the model.
      method: a key of `QUANTIZERS`.
      windows: of calibration.
      length: of a window.
      settings: flags: bits, budget_bytes, form, rank, weighting, feedback, factors, dtype.

    Raises:
      KeyError, ValueError: as of `quantization.check_settings` and `check_rank`; or if the budget
        cannot be met.
    """
    import jax.numpy as jnp

    from lordjax.allocation.candidates import QUANTIZERS, Candidate
    from lordjax.compression import quantized
    from lordjax.forecast import shapes as sizing
    from lordjax.forecast.quantized_cost import QuantizationSpec, estimate
    from lordjax.kernels import normal_float
    from lordjax.methods.quantized.weightings import MOMENTS
    from lordjax.models.sites import LINEAR_SITES, site_path

    quantized.check_settings(method, **settings)
    row, form, factors = QUANTIZERS[method], settings["form"], settings["factors"]
    factors = row.factors if factors is None else None if factors == "dense" else factors
    factors = None if factors is None else normal_float.Format.parse(factors)
    weighting, dtype = settings["weighting"] or row.weighting, settings["dtype"] or "float16"
    rank = row.rank if settings["rank"] is None else settings["rank"]
    block = dict(_flat_tree(sizing.shapes(config).block(0)))
    shapes = {
        site_path(i, site): block[site.path].shape
        for i in range(config.num_layers)
        for site in LINEAR_SITES
        if site.path in block
    }
    quantized.check_rank(rank, shapes)
    if form is not None:
        options = dict.fromkeys(shapes, Candidate(normal_float.Format.parse(form), rank))
    else:
        count = sum(fan_in * fan_out for fan_in, fan_out in shapes.values())
        bits, whole = settings["bits"], settings["budget_bytes"]
        budget = whole if bits is None else bits * count / 8
        options = estimate(shapes, method, budget, rank, factors, jnp.dtype(dtype).itemsize)
    feedback = settings["feedback"]
    job = QuantizationSpec(
        config,
        method,
        windows,
        length,
        weighting=weighting,
        options=options,
        chosen=form is None,
        rank=rank,
        feedback=weighting in MOMENTS if feedback is None else feedback,
        factors=factors,
        dtype=dtype,
    )
    return job, form is not None


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
    from lordjax.forecast import machine_rates
    from lordjax.forecast import shapes as sizing
    from lordjax.kernels.base import is_kernel
    from lordjax.runtime import multihost

    if any(map(is_kernel, leaves.values())):
        leaves = dict(_flat(sizing.shapes(config)))
    before = sizing.stored(config, leaves)
    job, after, are, _ = asked(config, before, shape, settings)
    among = (settings.get("mesh"), multihost.process_count())
    found = cost(job, before, after, None, *among)
    if worth_measuring(sum(found["flops"].values())):
        there = next(p for p in directory.absolute().parents if p.exists())
        found = cost(job, before, after, machine_rates.measure_rates(there), *among)
    return found | {"ranks_are": are}


def asked(
    config: ModelConfig, before: InMemory, shape: tuple[int, int], settings: dict[str, Any]
) -> tuple[CompressionSpec, dict[str, Any], str, Plan | None]:
    """What settings of `compress` ask for.

    Returns:
      the job, shapes of the result, how sure they are, and the plan where there are no codes.

    Args:
      config: the model.
      before: shapes as they are stored.
      shape: windows of calibration and their length.
      settings: of `compress`, and the method.

    Raises:
      KeyError: if a pattern of ranks decides no site.
      ValueError: if a budget cannot be met, or ranks do not fit.
    """
    from lordjax.allocation.candidates import QUANTIZERS
    from lordjax.allocation.plan import Plan
    from lordjax.compression.site_factors import site_sizes
    from lordjax.forecast import shapes as sizing
    from lordjax.forecast.job import CompressionSpec
    from lordjax.forecast.shapes import quantized_outline, quantized_pairs
    from lordjax.kernels import normal_float

    method, dtype = settings["method"], settings["dtype"]
    if method in QUANTIZERS:
        flags = {name: settings[name] for name in CODED}
        job, exact = quantized_plan(config, method, *shape, flags)
        after = quantized_outline(config, job.options, before, dtype, job.factors)
        return job, after, EXACT if exact else MIXED, None
    ranks, keep = settings["ranks"], settings["keep"]
    policy = "uniform" if ranks is not None else settings["allocation"]
    if settings.get("elastic"):
        sizes = site_sizes(sizing.shapes(config), method)
        plan, exact, keep = Plan(method, dict.fromkeys(sizes), 1.0, policy), True, 1.0
    else:
        plan, exact = planned(config, method, keep, ranks, policy)
    given = plan.ranks if exact else None
    asked_for = (settings["prefix"], given, keep, settings["temperature"])
    job = CompressionSpec(config, method, *shape, policy, *asked_for)
    after = sizing.outline(
        config, plan, sizing.stored(config, dict(_flat(before)), None if dtype is None else dtype)
    )
    if settings.get("factors") is not None:
        after = quantized_pairs(after, normal_float.Format.parse(settings["factors"]))
    return job, after, EXACT if exact else ESTIMATED, plan


CODED = ("bits", "budget_bytes", "form", "rank", "weighting", "feedback", "factors", "dtype")
EXACT = "exact"
ESTIMATED = "uniform ranks, an estimate: the policy decides from calibration data"
MIXED = "an estimate: formats next to the budget, which the weights decide"


def _flat(source: InMemory) -> dict[str, Any]:
    return _flat_tree(source.params)


def _flat_tree(tree: Any) -> dict[str, Any]:
    from lordjax.kernels import trees

    return trees.flatten(tree)


def worth_measuring(operations: float) -> bool:
    """Whether the micro-benchmark takes little of a job's time."""
    from lordjax.forecast import machine_rates

    if operations < LITTLE:
        return False
    return operations / machine_rates.matmul_rate() > MEASURING / SHARE


def happened(report: dict[str, Any], predicted: dict[str, Any]) -> dict[str, Any]:
    """What a report says of a run, in the terms of the forecast, and its speed.

    ``flops_per_second`` are achieved ones, of what had to be done.
    """
    seconds = dict(report["seconds"])
    both = seconds.get("statistics and factors")
    if both is not None:
        seconds["statistics"] = both - seconds.get("factors", 0.0)
    stages = {name: seconds[name] for name in TIMED if name in seconds}
    for part in ("sequential", "decomposition"):  # are part of putting the result together
        if part in stages:
            stages["apply"] = max(stages["apply"] - stages[part], 0.0)
    speeds = {
        n: predicted["flops"][n] / s for n, s in stages.items() if n in predicted["flops"] and s
    }
    found = {
        "seconds": stages | {"total": sum(stages.values())},
        "peak_rss_bytes": report["peak_rss_bytes"],
        "bytes": report["bytes"],
        "flops_per_second": speeds,
    }
    if "devices" in predicted:
        counted = predicted["devices"].items()
        found["devices"] = {n: row | {"seconds": stages[n]} for n, row in counted if n in stages}
    return found
