"""Peak memory of a compression, predicted from shapes before it begins.

What is alive in each stage is added up (`StageMemory`); the largest stage is the peak::

    in memory            factors of all sites, statistics of one block (gradients: of all blocks),
                         hidden states of all sequences
    with a work directory   one block, its statistics, hidden states of one batch; the rest is on
                         disk, with the inputs of every block during the backward pass

Both hold the activations of one batch and the float64 workspace of the largest site; with N devices
also the statistics of N blocks, on the host. On CPU, device memory counts as host memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lordjax.forecast.job import CalibrationSpec, CompressionSpec
from lordjax.forecast.quantized_cost import QuantizationSpec
from lordjax.forecast.stage_memory import LowRankMemory, Parts, QuantizedMemory, StageMemory
from lordjax.runtime import target
from lordjax.runtime.flops import OpCounts

PROCESS = 600e6  # bytes of Python with JAX, the rest of the library and a tokenizer
EQUATION = 250e3  # host bytes of a compiled program and of its compilation, per jaxpr equation
# Programs that quantize are long and simple: they take fewer bytes per equation.
QUANTIZING_EQUATION, QUANTIZING = 5e3, ("predictions", "decomposition")
SPLIT = ("device: hidden states",)  # what devices split; each of them holds all the rest

MemoryReport = dict[str, Any]


def memory(
    spec: CalibrationSpec,
    ops: Mapping[str, OpCounts],
    before: Any,
    after: Any,
    devices: int = 1,
    processes: int = 1,
) -> dict[str, MemoryReport]:
    """Returns peak bytes ``in memory`` and ``with a work directory``.

    Args:
      spec: the job.
      ops: stage -> operation counts.
      before: shapes of the stored model, as a nested dict.
      after: shapes of the result.
      devices: number of devices that share the work.
      processes: number of processes, each with equally many devices.

    Returns:
      for each of both, in bytes of one process: ``host``; ``device``, which is 0 with one CPU
      device and else what each device holds; ``stage``, the stage of the peak; ``parts``, stage ->
      purpose -> bytes. With a work directory also ``disk``.
    """
    compiled = sum(
        counts["equations"] * (QUANTIZING_EQUATION if name in QUANTIZING else EQUATION)
        for name, counts in ops.items()
    )
    layer_batch = min(devices, spec.config.num_layers)
    stages = _stage_memory(spec, before, after, PROCESS + compiled, layer_batch, processes)
    whole = {name: stages.parts(name) for name in ops}
    streamed = {name: _streamed(stages, name) for name in ops}
    return {
        "in memory": _peak(whole, devices, processes),
        "with a work directory": _peak(streamed, devices, processes) | {"disk": stages.disk()},
    }


def _stage_memory(spec: CalibrationSpec, *others: Any) -> StageMemory:
    if isinstance(spec, QuantizationSpec):
        return QuantizedMemory(spec, *others)
    assert isinstance(spec, CompressionSpec)
    return LowRankMemory(spec, *others)


def _peak(stages: Mapping[str, Parts], devices: int, processes: int) -> MemoryReport:
    """The largest stage on the host and on a device."""
    on_cpu = target.platform() == "cpu"
    sums = {}
    for name, parts in stages.items():
        own = {part: n for part, n in parts.items() if part.startswith("device")}
        each = sum(n / (devices if part in SPLIT else 1) for part, n in own.items())
        sums[name] = (sum(parts.values()) - sum(own.values()), each)
    both = {name: host + devices // processes * each for name, (host, each) in sums.items()}
    at = max(both, key=lambda name: both[name])
    host = both[at] if on_cpu else max(host for host, _ in sums.values())
    device = 0 if on_cpu and devices == 1 else max(each for _, each in sums.values())
    table = {n: {part: round(v) for part, v in parts.items() if v} for n, parts in stages.items()}
    return {"host": round(host), "device": round(device), "stage": at, "parts": table}


def _streamed(stages: StageMemory, stage: str) -> Parts:
    """A stage with a work directory, where all but one block's data is on disk."""
    spec, table = stages.spec, stages.parts(stage)
    batch = spec.backward[1] if stage == "gradients" else spec.batch
    small = {
        "pages of the model": stages.stored / stages.layers,
        "factors": float(max(stages.factor_bytes, default=stages.gradient)),
        "device: hidden states": 2.0 * stages.state_bytes(batch),
        "device: gradient statistics": float(stages.gradient + stages.bases),
        "result": float(max(stages.non_block_params, stages.result / stages.layers)),
        "a file": float(stages.result / stages.layers),
    }
    small |= stages.streamed_parts(stage)
    if stage == "tables":  # few sequences, whose states stay in memory
        del small["device: hidden states"]
    if stage == "gradients":  # the head is read for the loss, and freed before the blocks are read
        head = ("device: embedding and head", "device: logits")
        blocks = ("device: a block", "device: activations", "device: gradient statistics")
        table |= {part: min(n, small.get(part, math.inf)) for part, n in table.items()}
        smaller = min(head, blocks, key=lambda parts: sum(table[part] for part in parts))
        small |= dict.fromkeys(smaller, 0.0)
    return {part: min(n, small.get(part, math.inf)) for part, n in table.items()}
