"""What a compression will cost and produce, for ``lordjax plan`` and the report of ``compress``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lordjax.forecast import device_shares, machine_rates, peak_memory
from lordjax.forecast.job import CalibrationSpec, CompressionSpec
from lordjax.forecast.job_settings import parse_settings
from lordjax.forecast.low_rank_cost import stages
from lordjax.forecast.machine_rates import Rates
from lordjax.forecast.quantized_cost import QuantizationSpec, quantized_stages
from lordjax.forecast.seconds import SPREAD, seconds
from lordjax.forecast.shapes import dense_shapes, stored
from lordjax.forecast.whole_file import table_stages
from lordjax.kernels import trees
from lordjax.kernels.base import is_kernel, nbytes
from lordjax.models.config import ModelConfig
from lordjax.models.source import InMemory
from lordjax.runtime import flops, multihost
from lordjax.runtime.mesh import DATA_AXIS, parse

BENCHMARK_SECONDS = 5.0  # the longest that measuring this machine's rates takes
BENCHMARK_SHARE = 0.02  # of a job's time, at most, that measuring may take
SMALL_JOB = 1e11  # FLOPs: a second on any machine
# Stages of the reports of `prepare`, `compress` and `quantize`.
TIMED = (
    *("gradients", "statistics", "factors", "held-out check", "comparison", "sequential"),
    *("scales", "predictions", "tables", "decomposition", "apply"),
)


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
    for name, work in table_stages(spec).items():
        ops[name] = flops.merged([ops.pop(name, flops.OpCounts()), work])
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
    axes = {DATA_AXIS: 1} if mesh is None else parse(mesh)
    if set(axes) != {DATA_AXIS}:
        raise ValueError(
            f"--mesh {mesh}: the cost of an axis other than {DATA_AXIS} cannot be predicted; give "
            f"{DATA_AXIS}=N"
        )
    return axes[DATA_AXIS]


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
    before = _stored_before(config, leaves)
    spec, after, sure, _ = parse_settings(config, before, calibration, settings)
    devices = (settings.get("mesh"), multihost.process_count())
    found = cost(spec, before, after, None, *devices)
    if worth_measuring(sum(found["flops"].values())):
        existing = next(p for p in directory.absolute().parents if p.exists())
        found = cost(spec, before, after, machine_rates.measure_rates(existing), *devices)
    return found | {"ranks_are": sure}


def check_budget(config: ModelConfig, leaves: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises an error if the shapes of a model alone show that a budget cannot be met.

    Args:
      config: architecture of the model.
      leaves: parameter path -> kernel, or shape and dtype.
      settings: settings of `lordjax.compress`, and ``method``.

    Raises:
      KeyError: if no site is left for a pattern of ``ranks``.
      ValueError: if the budget cannot be met, or a rank does not fit its matrix.
    """
    enough = (16, 2)  # sequences and tokens; the budget does not depend on them
    parse_settings(config, _stored_before(config, leaves), enough, settings)


def _stored_before(config: ModelConfig, leaves: dict[str, Any]) -> InMemory:
    """Returns the shapes of the model that is compressed; kernels count as dense."""
    if any(map(is_kernel, leaves.values())):
        leaves = trees.flatten(dense_shapes(config).params)
    return stored(config, leaves)


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
