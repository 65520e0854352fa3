"""Estimates how much of a job each device of a mesh ``data=N`` does, from shapes alone.

Batches of calibration sequences are split where the number of devices divides them; every device
runs the other batches in full. XLA does not partition loops, so every device runs all iterations of
a loop; attention on CPU is one. Blocks are factorized N at a time: matrices are assigned greedily,
the largest one to the device with the least work. Quantization and the search of a temperature run
on device 0 alone. The ``sequential`` stage is not estimated.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lordjax.calibration.observers import observe, observe_gradients, sequences_per_step
from lordjax.forecast.calibration_cost import forward_work, gradient_shapes, per_layer
from lordjax.forecast.job import CalibrationSpec, CompressionSpec
from lordjax.forecast.low_rank_cost import all_factors, site_factors
from lordjax.forecast.quantized_cost import QuantizationSpec
from lordjax.models.sites import Site
from lordjax.runtime import flops, target
from lordjax.runtime.flops import OpCounts
from lordjax.runtime.mesh import assign_tasks

NOT_ESTIMATED = ("sequential", "tables")  # stages


def device_work(
    spec: CalibrationSpec, ops: Mapping[str, OpCounts], count: int
) -> dict[str, list[OpCounts]]:
    """Returns stage -> operation counts of every device.

    Args:
      spec: the job.
      ops: stage -> operation counts on one device, from `stages` or `quantized_stages`.
      count: number of devices.
    """
    return {
        name: _stage_work(spec, name, whole, count)
        for name, whole in ops.items()
        if name not in NOT_ESTIMATED
    }


def _stage_work(spec: CalibrationSpec, name: str, whole: OpCounts, count: int) -> list[OpCounts]:
    """Operation counts of one stage on every device."""
    if name in ("gradients", "statistics"):
        return _pass(spec, whole, count, backward=name == "gradients")
    if name == "factors" and isinstance(spec, CompressionSpec):
        return _factorizations(spec, count)
    if isinstance(spec, QuantizationSpec) and spec.reads_inputs:
        # The forward pass is shared, the rest is done by the first device.
        forward = forward_work(spec)
        passes = _pass(spec, forward, count, backward=False)
        return [flops.merged([passes[0], _minus(whole, forward)]), *passes[1:]]
    return [whole, *[Counter()] * (count - 1)]


def report(
    work: Mapping[str, list[OpCounts]], ops: Mapping[str, OpCounts], seconds: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Returns stage -> FLOPs of every device, their shares, and seconds where they are known.

    A share is a device's FLOPs divided by those of one device that does the stage alone. Shares add
    up to 1 if nothing is done twice.

    Args:
      work: stage -> operation counts of every device, from `device_work`.
      ops: stage -> operation counts on one device.
      seconds: stage -> seconds, measured or predicted.
    """
    found = {}
    for name, each in work.items():
        whole, counted = flops.total(ops[name]), [flops.total(part) for part in each]
        if whole:
            found[name] = {"flops": counted, "shares": [n / whole for n in counted]}
            found[name] |= {"seconds": seconds[name]} if name in seconds else {}
    return found


def busiest(each: Sequence[OpCounts], processes: int = 1) -> OpCounts:
    """Returns the operation counts that a stage's time depends on: those of the busiest device.

    On CPU the devices of a process share its cores, so their operations are added up.

    Args:
      each: operation counts of every device.
      processes: number of processes, each with equally many devices.
    """
    if target.platform() == "cpu":
        own = len(each) // processes
        each = [flops.merged(each[k : k + own]) for k in range(0, len(each), own or 1)]
    return max(each, key=flops.total)


def _batch(spec: CalibrationSpec, count: int, *, backward: bool) -> int:
    """Sequences of a batch on ``count`` devices: equally many on each of them."""
    each = sequences_per_step(spec.sequences // count, spec.length)
    own = (spec.sequences - spec.held_out) // spec.folds // count  # of a fold, on each device
    each = min(each, own or each)
    return count * max(1, each // 2) if backward else count * each


def _pass(spec: CalibrationSpec, whole: OpCounts, count: int, *, backward: bool) -> list[OpCounts]:
    """A pass over the blocks, in which all devices do equally much."""
    sequences = spec.backward[0] if backward else spec.sequences - spec.held_out
    batch, first = _batch(spec, count, backward=backward), sequences // spec.folds
    rests = [size % batch for size in (first, sequences - first)]  # of each fold
    unsplit = sum(rest for rest in rests if rest % count) / sequences
    loops = flops.scaled(_loop_ops(spec, backward=backward), sequences)
    split = unsplit + (1 - unsplit) / count
    each = flops.merged([loops, flops.scaled(_minus(whole, loops), split)])
    return [each] * count


def _loop_ops(spec: CalibrationSpec, *, backward: bool) -> OpCounts:
    """Loops over sequences and heads in all blocks, for one sequence."""

    def forward_loops(sliding_window: int | None) -> OpCounts:
        run = functools.partial(observe, config=spec.config, sliding_window=sliding_window)
        return flops.count_loop_ops(run, spec.block, spec.residual_stream(1), None, {})

    def backward_loops(sliding_window: int | None) -> OpCounts:
        stats, bases = gradient_shapes(spec)
        # Fisher statistics loop over sequences too, but each device has its own sequences.
        stats = {name: table for name, table in stats.items() if "fisher" not in name}
        run = functools.partial(
            observe_gradients, config=spec.config, sliding_window=sliding_window
        )
        x = spec.residual_stream(1)
        return flops.count_loop_ops(run, spec.block, x, None, x, bases, stats)

    found = per_layer(spec, forward_loops)
    if backward:
        found = flops.merged([found, per_layer(spec, backward_loops)])
    return Counter({kind: n for kind, n in found.items() if kind != "equations"})


def _factorizations(spec: CompressionSpec, count: int) -> list[OpCounts]:
    """The factorizations of every device: the sites of ``count`` blocks are shared at a time."""
    layers = spec.config.num_layers
    cost = {site: flops.total(site_factors(spec, site)) for site in spec.sites}
    counts: list[Counter[Site]] = [Counter() for _ in range(count)]
    for first in range(0, layers, count):
        layer_batch = range(first, min(first + count, layers))
        tasks = {(i, site): cost[site] for i in layer_batch for site in spec.sites}
        for found, own in zip(counts, assign_tasks(tasks, count), strict=True):
            found.update(site for _, site in own)
    return [all_factors(spec, found) for found in counts]


def _minus(whole: OpCounts, part: OpCounts) -> OpCounts:
    return Counter({kind: max(n - part[kind], 0) for kind, n in whole.items()})
