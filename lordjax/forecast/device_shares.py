"""What each device of a mesh ``data=N`` does of a job's work, from shapes: see `mesh`.

Of a pass over the blocks devices share the windows of every batch that divides; those of one that
does not are everybody's. A compiler does not share out loops, which attention is on CPU: every
device does all of them. Of as many blocks as there are devices, the largest matrix that is left
goes to the device with the least to factor. What is not shared at all - codes, comparisons - is the
first device's. Of ``sequential`` nothing is said.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lordjax.calibration.observers import observe, observe_gradients, windows_per_step
from lordjax.forecast.job import CompressionSpec
from lordjax.forecast.low_rank_cost import (
    all_factors,
    every_layer,
    forward_work,
    gradient_shapes,
    site_factors,
)
from lordjax.forecast.quantized_cost import QuantizationSpec
from lordjax.models.sites import Site
from lordjax.runtime import flops
from lordjax.runtime.flops import OpCounts
from lordjax.runtime.mesh import assign_tasks

UNKNOWN = ("sequential",)  # stages of which nothing is said


def shared(
    job: CompressionSpec, ops: Mapping[str, OpCounts], count: int
) -> dict[str, list[OpCounts]]:
    """Stage -> work of each of so many devices.

    Args:
      job: what is asked for.
      ops: of its stages (`stages.stages`, `coded.coded_stages`).
      count: of devices.
    """
    found = {}
    for name, whole in ops.items():
        if name in UNKNOWN:
            continue
        if name == "gradients":
            found[name] = _pass(job, whole, count, backward=True)
        elif name == "statistics":
            found[name] = _pass(job, whole, count, backward=False)
        elif name == "factors":
            found[name] = _in_groups(job, count)
        elif (
            isinstance(job, QuantizationSpec) and job.reads
        ):  # a pass, and what the first device does
            forward = forward_work(job)
            parts = _pass(job, forward, count, backward=False)
            found[name] = [flops.merged([parts[0], _minus(whole, forward)]), *parts[1:]]
        else:
            found[name] = [whole, *[Counter()] * (count - 1)]
    return found


def report(
    shares: Mapping[str, list[OpCounts]], ops: Mapping[str, OpCounts], seconds: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Of every stage with operations: its seconds, each device's operations, and their shares.

    Shares are those of the operations of one device alone; they add up to 1 if nothing is done
    twice.

    Args:
      shares: of `shared`.
      ops: of the stages on one device.
      seconds: that stages took, or will take.
    """
    found = {}
    for name, parts in shares.items():
        whole, each = flops.total(ops[name]), [flops.total(part) for part in parts]
        if whole:
            found[name] = {"flops": each, "shares": [n / whole for n in each]}
            found[name] |= {"seconds": seconds[name]} if name in seconds else {}
    return found


def together(parts: Sequence[OpCounts], processes: int = 1) -> OpCounts:
    """What a stage's time depends on: the busiest device; on CPU all of a process."""
    if jax.default_backend() == "cpu":
        own = len(parts) // processes
        parts = [flops.merged(parts[k : k + own]) for k in range(0, len(parts), own or 1)]
    return max(parts, key=flops.total)


def step(job: CompressionSpec, count: int, *, backward: bool) -> int:
    """Windows of a batch: as many for every device (`calibrate.checked`)."""
    each = windows_per_step(job.windows // count, job.length)
    return count * max(1, each // 2) if backward else count * each


def _pass(job: CompressionSpec, whole: OpCounts, count: int, *, backward: bool) -> list[OpCounts]:
    """Of a pass over the blocks; all devices do equally much."""
    windows = job.backward[0] if backward else job.windows - job.held_out
    last = windows % step(job, count, backward=backward)
    lonely = (last if last % count else 0) / windows
    loops = flops.scaled(_attention(job, backward=backward), windows)
    once = _minus(whole, loops)
    copied = lonely + (1 - lonely) / count
    each = flops.merged([loops, flops.scaled(once, copied)])
    return [each] * count


def _attention(job: CompressionSpec, *, backward: bool) -> OpCounts:
    """Loops over sequences and heads, in all blocks, of one window."""

    def forward(window: int | None) -> OpCounts:
        run = functools.partial(observe, config=job.config, window=window)
        return flops.count_loop_ops(run, job.block, job.stream(1), None, {})

    def back(window: int | None) -> OpCounts:
        stats, bases = gradient_shapes(job)
        # Weight gradients are taken in a loop, too, but each device has its own windows.
        stats = {name: table for name, table in stats.items() if "fisher" not in name}
        run = functools.partial(observe_gradients, config=job.config, window=window)
        x = job.stream(1)
        return flops.count_loop_ops(run, job.block, x, None, x, bases, stats)

    found = every_layer(job, forward)
    if backward:
        found = flops.merged([found, every_layer(job, back)])
    return Counter({kind: n for kind, n in found.items() if kind != "equations"})


def _in_groups(job: CompressionSpec, count: int) -> list[OpCounts]:
    """Of factors: sites of as many blocks as there are devices at a time (`factor_pass`)."""
    layers, sites = job.config.num_layers, job.sites
    each = {site: flops.total(site_factors(job, site)) for site in sites}
    counts: list[Counter[Site]] = [Counter() for _ in range(count)]
    for first in range(0, layers, count):
        group = range(first, min(first + count, layers))
        shares = assign_tasks({(i, site): each[site] for i in group for site in sites}, count)
        for found, jobs in zip(counts, shares, strict=True):
            found.update(site for _, site in jobs)
    return [all_factors(job, found) for found in counts]


def _minus(whole: OpCounts, part: OpCounts) -> OpCounts:
    return Counter({kind: max(n - part[kind], 0) for kind, n in whole.items()})
