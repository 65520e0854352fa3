"""What a compression will cost and produce, for ``lordjax plan`` and the report of ``compress``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lordjax.allocation.candidates import QUANTIZERS, Candidate
from lordjax.allocation.plan import Plan
from lordjax.allocation.policies import CURVELESS, GIVEN, ranks_by_pattern
from lordjax.compression import quantized
from lordjax.compression.site_factors import site_sizes
from lordjax.forecast import device_shares, machine_rates, peak_memory
from lordjax.forecast.job import CalibrationSpec, CompressionSpec
from lordjax.forecast.low_rank_cost import stages
from lordjax.forecast.machine_rates import Rates
from lordjax.forecast.quantized_cost import QuantizationSpec, estimate, quantized_stages
from lordjax.forecast.seconds import SPREAD, seconds
from lordjax.forecast.shapes import (
    Candidates,
    dense_shapes,
    outline,
    plan_by_shapes,
    quantized_outline,
    quantized_pairs,
    stored,
)
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import is_kernel, nbytes
from lordjax.methods.quantized.weightings import MOMENTS
from lordjax.models.config import ModelConfig
from lordjax.models.sites import LINEAR_SITES, site_path
from lordjax.models.source import InMemory
from lordjax.runtime import flops, multihost
from lordjax.runtime.mesh import AXIS, parse

BENCHMARK_SECONDS = 5.0  # the longest that measuring this machine's rates takes
BENCHMARK_SHARE = 0.02  # of a job's time, at most, that measuring may take
SMALL_JOB = 1e11  # FLOPs: a second on any machine
# Stages of the reports of `prepare`, `compress` and `quantize`.
TIMED = (
    *("gradients", "statistics", "factors", "comparison", "sequential"),
    *("predictions", "decomposition", "apply"),
)
# Settings of `quantized_spec`.
QUANTIZATION_SETTINGS = (
    *("bits", "budget_bytes", "form", "rank", "weighting", "feedback", "factors", "dtype"),
)

# How sure the ranks or formats of a prediction are; in files under ``ranks_are``.
EXACT = "exact"
ESTIMATED = "uniform ranks, an estimate: the policy decides from calibration data"
MIXED = "an estimate: formats next to the budget, which the weights decide"


def plan_or_estimate(
    config: ModelConfig, method: str, keep: float, ranks: dict[str, int] | None, policy: str
) -> tuple[Plan, bool]:
    """Returns a plan, and whether it is exact.

    The plan of a policy that needs calibration data is estimated by uniform ranks.

    Args:
      config: architecture of the model.
      method: a key of `METHODS`.
      keep: fraction of the block linear weights that is kept.
      ranks: layer pattern -> rank; None: ``keep`` and ``policy`` decide.
      policy: a key of `POLICIES`.

    Raises:
      KeyError: if no site is left for a pattern of ``ranks``.
      ValueError: if a rank does not fit its matrix, or the budget cannot be met.
    """
    sizes = site_sizes(dense_shapes(config), method)
    if ranks is not None:
        return Plan(method, ranks_by_pattern(sizes, ranks), None, GIVEN), True
    if keep == 1 and policy not in CURVELESS:
        return Plan(method, dict.fromkeys(sizes), keep, policy), True
    exact = policy in CURVELESS
    return plan_by_shapes(config, method, keep, policy if exact else "uniform"), exact


def cost(
    spec: CalibrationSpec,
    before: InMemory,
    after: Any,
    rates: Rates | None,
    mesh: str | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Returns operations, memory and, with rates, seconds of a job.

    Args:
      spec: the job.
      before: shapes of the stored model.
      after: shapes of the result.
      rates: operations per second of this machine; None: seconds are not predicted.
      mesh: axes of the device mesh, ``data=N``; None: one device.
      processes: number of processes, each with equally many devices. Memory and seconds are those
        of one process.

    Raises:
      ValueError: if the mesh has another axis than ``data``, or its devices cannot be divided
        equally among the processes.
    """
    count = device_count(mesh)
    if count % processes:
        raise ValueError(
            f"--mesh {mesh}: {count} devices cannot be divided equally among {processes} "
            "processes (--num-processes); give a multiple of it"
        )
    if isinstance(spec, CompressionSpec):
        spec = dataclasses.replace(spec, meshed=mesh is not None)
        ops = stages(spec)
    else:
        assert isinstance(spec, QuantizationSpec)
        ops = quantized_stages(spec)
    ops["write"] = flops.OpCounts({"write": nbytes(after)})
    found: dict[str, Any] = {
        "bytes": nbytes(after),
        "flops": {name: flops.total(w) for name, w in ops.items() if flops.total(w)},
        "memory": peak_memory.memory(spec, ops, before.params, after, count, processes),
    }
    shares = device_shares.device_work(spec, ops, count) if count > 1 else {}
    if rates is not None:
        slowest = {
            name: device_shares.busiest(shares[name], processes) if name in shares else whole
            for name, whole in ops.items()
        }
        expected = seconds(slowest, rates)
        found["seconds"] = expected
        found["range"] = [expected["total"] / SPREAD, expected["total"] * SPREAD]
        found["rates"] = rates
    if shares:
        found["devices"] = device_shares.report(shares, ops, found.get("seconds", {}))
    return found


def device_count(mesh: str | None) -> int:
    """Returns the number of devices of a mesh.

    Raises:
      ValueError: if the mesh has another axis than ``data``, whose cost cannot be predicted.
    """
    axes = {AXIS: 1} if mesh is None else parse(mesh)
    if set(axes) != {AXIS}:
        raise ValueError(
            f"--mesh {mesh}: the cost of an axis other than {AXIS} cannot be predicted; give "
            f"{AXIS}=N"
        )
    return axes[AXIS]


def quantized_spec(
    config: ModelConfig, method: str, sequences: int, length: int, settings: Mapping[str, Any]
) -> tuple[QuantizationSpec, bool]:
    """Returns the job of a quantizing method, and whether its formats and ranks are exact.

    Args:
      config: architecture of the model.
      method: a key of `QUANTIZERS`.
      sequences: number of calibration sequences.
      length: tokens of a sequence.
      settings: values of `QUANTIZATION_SETTINGS`.

    Raises:
      KeyError: if the method or the weighting is unknown.
      ValueError: if settings do not go together, or the budget cannot be met.
    """
    quantized.check_settings(method, **settings)
    defaults, form, feedback = QUANTIZERS[method], settings["form"], settings["feedback"]
    factors = _factor_format(defaults.factors, settings["factors"])
    weighting, dtype = settings["weighting"] or defaults.weighting, settings["dtype"] or "float16"
    rank = defaults.rank if settings["rank"] is None else settings["rank"]
    shapes = _linear_shapes(config)
    quantized.check_rank(rank, shapes)
    if form is not None:
        options: Candidates = dict.fromkeys(
            shapes, Candidate(normal_float.Format.parse(form), rank)
        )
    else:
        itemsize = jnp.dtype(dtype).itemsize
        budget = _budget_bytes(shapes, settings["bits"], settings["budget_bytes"])
        options = estimate(shapes, method, budget, rank, factors, itemsize)
    spec = QuantizationSpec(
        config,
        method,
        sequences,
        length,
        weighting=weighting,
        options=options,
        chosen=form is None,
        rank=rank,
        feedback=weighting in MOMENTS if feedback is None else feedback,
        factors=factors,
        dtype=dtype,
    )
    return spec, form is not None


def _factor_format(default: str | None, asked: str | None) -> normal_float.Format | None:
    """The format of the low-rank factors; None: they are not quantized."""
    name = default if asked is None else asked
    return None if name is None or name == "dense" else normal_float.Format.parse(name)


def _linear_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Site path -> ``[in, out]``, of all matrices of all blocks."""
    block = trees.flatten(dense_shapes(config).block(0))
    return {
        site_path(i, site): block[site.path].shape
        for i in range(config.num_layers)
        for site in LINEAR_SITES
        if site.path in block
    }


def _budget_bytes(
    shapes: Mapping[str, tuple[int, ...]], bits: float | None, budget_bytes: float | None
) -> float:
    """The budget in bytes; exactly one of ``bits`` and ``budget_bytes`` is given."""
    if bits is not None:
        return bits * sum(map(math.prod, shapes.values())) / 8
    assert budget_bytes is not None
    return budget_bytes


def predict_compression(
    config: ModelConfig,
    leaves: dict[str, Any],
    calibration: tuple[int, int],
    settings: dict[str, Any],
    directory: Path,
) -> dict[str, Any]:
    """Returns what ``lordjax compress`` is about to cost; for small jobs without seconds.

    Seconds need a benchmark of this machine, which would take longer than a small job.

    Args:
      config: architecture of the model.
      leaves: parameter path -> kernel, or shape and dtype.
      calibration: number of calibration sequences, and their length in tokens.
      settings: settings of `lordjax.compress`, and ``method``.
      directory: where the result is written.
    """
    if any(map(is_kernel, leaves.values())):
        leaves = trees.flatten(dense_shapes(config).params)
    before = stored(config, leaves)
    spec, after, sure, _ = parse_settings(config, before, calibration, settings)
    devices = (settings.get("mesh"), multihost.count())
    found = cost(spec, before, after, None, *devices)
    if worth_measuring(sum(found["flops"].values())):
        existing = next(p for p in directory.absolute().parents if p.exists())
        found = cost(spec, before, after, machine_rates.measure_rates(existing), *devices)
    return found | {"ranks_are": sure}


def parse_settings(
    config: ModelConfig,
    before: InMemory,
    calibration: tuple[int, int],
    settings: Mapping[str, Any],
) -> tuple[CalibrationSpec, dict[str, Any], str, Plan | None]:
    """Returns the job that settings of ``lordjax compress`` ask for.

    Args:
      config: architecture of the model.
      before: shapes of the stored model.
      calibration: number of calibration sequences, and their length in tokens.
      settings: settings of `lordjax.compress` or `lordjax.quantize`, and ``method``.

    Returns:
      the job; shapes of the result; `EXACT`, `ESTIMATED` or `MIXED`; and the plan, which is None
      if the method quantizes.

    Raises:
      KeyError: if no site is left for a pattern of ``ranks``.
      ValueError: if a budget cannot be met, or a rank does not fit its matrix.
    """
    method, dtype = settings["method"], settings["dtype"]
    if method in QUANTIZERS:
        given = {name: settings[name] for name in QUANTIZATION_SETTINGS}
        job, exact = quantized_spec(config, method, *calibration, given)
        after = quantized_outline(config, job.options, before, dtype, job.factors)
        return job, after, EXACT if exact else MIXED, None
    spec, plan, exact = _low_rank_spec(config, calibration, settings)
    source = stored(config, trees.flatten(before.params), dtype)
    after = outline(config, plan, source)
    if settings.get("factors") is not None:
        after = quantized_pairs(after, normal_float.Format.parse(settings["factors"]))
    return spec, after, EXACT if exact else ESTIMATED, plan


def _low_rank_spec(
    config: ModelConfig, calibration: tuple[int, int], settings: Mapping[str, Any]
) -> tuple[CompressionSpec, Plan, bool]:
    """The job of a low-rank method, its plan, and whether the plan is exact."""
    method, ranks, keep = settings["method"], settings["ranks"], settings["keep"]
    policy = "uniform" if ranks is not None else settings["allocation"]
    if settings.get("elastic"):
        sizes = site_sizes(dense_shapes(config), method)
        plan, exact, keep = Plan(method, dict.fromkeys(sizes), 1.0, policy), True, 1.0
    else:
        plan, exact = plan_or_estimate(config, method, keep, ranks, policy)
    spec = CompressionSpec(
        config,
        method,
        *calibration,
        allocation=policy,
        prefix=settings["prefix"],
        ranks=plan.ranks if exact else None,
        keep=keep,
        temperature=settings["temperature"],
    )
    return spec, plan, exact


def worth_measuring(operations: float) -> bool:
    """Returns whether measuring this machine's rates takes a small part of a job's time.

    Args:
      operations: FLOPs of the job.
    """
    if operations < SMALL_JOB:
        return False
    return operations / machine_rates.matmul_rate() > BENCHMARK_SECONDS / BENCHMARK_SHARE


def measured(report: dict[str, Any], predicted: dict[str, Any]) -> dict[str, Any]:
    """Returns what a run took, under the names of its prediction, and its speed.

    Args:
      report: report of `compress` or `quantize`.
      predicted: result of `predict_compression`.

    Returns:
      ``seconds`` of every stage, ``peak_rss_bytes``, ``bytes``, ``flops_per_second`` of every stage
      (predicted FLOPs over measured seconds) and, with several devices, ``devices``.
    """
    taken = dict(report["seconds"])
    both = taken.get("statistics and factors")
    if both is not None:
        taken["statistics"] = both - taken.get("factors", 0.0)
    by_stage = {name: taken[name] for name in TIMED if name in taken}
    for part in ("sequential", "decomposition"):  # the report counts them as part of "apply", too
        if part in by_stage:
            by_stage["apply"] = max(by_stage["apply"] - by_stage[part], 0.0)
    speeds = {
        name: predicted["flops"][name] / time
        for name, time in by_stage.items()
        if name in predicted["flops"] and time
    }
    found = {
        "seconds": by_stage | {"total": sum(by_stage.values())},
        "peak_rss_bytes": report["peak_rss_bytes"],
        "bytes": report["bytes"],
        "flops_per_second": speeds,
    }
    if "devices" in predicted:
        found["devices"] = {
            name: row | {"seconds": by_stage[name]}
            for name, row in predicted["devices"].items()
            if name in by_stage
        }
    return found
