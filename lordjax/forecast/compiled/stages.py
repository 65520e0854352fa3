"""Every stage of a job as it is compiled for a card: its memory and its least time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lordjax.forecast import peak_memory
from lordjax.forecast.compiled.programs import Compiled, Compiler
from lordjax.forecast.compiled.roofline import least_seconds
from lordjax.forecast.job import CalibrationSpec, CompressionSpec
from lordjax.forecast.low_rank_cost import stages
from lordjax.forecast.quantized_cost import QuantizationSpec, quantized_stages
from lordjax.runtime import flops
from lordjax.runtime.cards import Card
from lordjax.runtime.flops import OpCounts, Program
from lordjax.runtime.hlo import ProgramFacts

# Parts of `StageMemory` that are on the device in a stage beside its programs, and parts of which a
# program's arguments are some: one fold's statistics, one site's kernels.
RESIDENT = ("device: hidden states", "device: gradient statistics")
HELD = ("device: a block", "device: statistics")


def operations(spec: CalibrationSpec, count: int) -> dict[str, OpCounts]:
    """Returns the operation counts of every stage, on one of ``count`` devices' programs."""
    if isinstance(spec, CompressionSpec):
        return stages(dataclasses.replace(spec, meshed=count > 1))
    assert isinstance(spec, QuantizationSpec)
    return quantized_stages(spec)


def compiled_stages(
    spec: CalibrationSpec, compiler: Compiler, card: Card, before: Any, after: Any
) -> dict[str, dict[str, Any]]:
    """Returns stage -> its memory, time and programs; call it inside `target.absent_gpus`.

    Args:
      spec: the job.
      compiler: compiles for the devices.
      card: the GPU.
      before: shapes of the stored model, as a nested dict.
      after: shapes of the result.

    Returns:
      for each stage: ``bytes`` of a device at the peak; of these ``arguments``, ``outputs``,
      ``temporaries`` and ``resident``, which no program of the peak holds; ``forecast``, the same
      peak from shapes alone; ``seconds``, at least; ``launches``, ``sent`` bytes and
      ``collectives`` of a device; ``calls`` of library functions; ``programs``, their number; and
      ``peak``, the name of the program of the peak.
    """
    count = compiler.mesh.size
    with flops.recorded() as programs:
        ops = operations(spec, count)
    report = peak_memory.memory(spec, ops, before, after, count)["in memory"]["parts"]
    found = {}
    for stage, counts in ops.items():
        names = [kind for kind in counts if kind.startswith(flops.RUNS)]
        runs = [(programs[name], float(counts[name])) for name in names]
        if runs:
            found[stage] = _stage(runs, compiler, card, report[stage], spec)
    return found


def _stage(
    runs: Sequence[tuple[Program, float]],
    compiler: Compiler,
    card: Card,
    parts: Mapping[str, float],
    spec: CalibrationSpec,
) -> dict[str, Any]:
    count = compiler.mesh.size
    own = {part: n for part, n in parts.items() if part.startswith("device")}
    split = {part: n / (count if part in peak_memory.SPLIT else 1) for part, n in own.items()}
    held = sum(split.get(part, 0.0) for part in HELD)
    total = _Total(card, held)
    for program, times in runs:
        made, shared = compiler.compiled(program), compiler.splits(program.args)
        # Devices factorize different sites of low-rank methods; one of them quantizes.
        parallel = count if shared or isinstance(spec, CompressionSpec) else 1
        total.add(program, made, times / parallel)
    resident = sum(split.get(part, 0.0) for part in RESIDENT)
    resident += max(0.0, held - total.peak.arguments)
    return total.report() | {
        "bytes": round(total.peak.nbytes + resident),
        "resident": round(resident),
        "forecast": round(sum(split.values())),
        "programs": len(runs),
    }


class _Total:
    """Sums over the programs of a stage, on one device; ``held`` bytes are always on it."""

    def __init__(self, card: Card, held: float):
        self.card, self.held, self.peak = card, held, Compiled(0, 0, 0, ProgramFacts())
        self.name, self.seconds, self.launches, self.unknown = "", 0.0, 0.0, 0
        self.sent: dict[str, float] = {}
        self.calls: dict[str, float] = {}

    def add(self, program: Program, made: Compiled, times: float) -> None:
        """Adds ``times`` runs of a program."""
        facts = made.facts
        if self._at_once(made) > self._at_once(self.peak):
            self.peak, self.name = made, program_name(program)
        least = least_seconds(self.card, program.ops, facts.nbytes, facts.sent)
        self.seconds += times * least
        self.launches += times * facts.total_launches
        self.unknown += facts.unknown_loops
        for table, counted in ((self.sent, facts.sent), (self.calls, facts.calls)):
            for kind, n in counted.items():
                table[kind] = table.get(kind, 0.0) + times * n

    def _at_once(self, made: Compiled) -> float:
        """Bytes while a program runs, whose arguments are some of what is held."""
        return made.nbytes + max(0.0, self.held - made.arguments)

    def report(self) -> dict[str, Any]:
        """Returns the sums, and the parts of the peak."""
        return {
            "peak": self.name,
            "arguments": self.peak.arguments,
            "outputs": self.peak.outputs,
            "temporaries": self.peak.temporaries,
            "seconds": self.seconds,
            "launches": round(self.launches),
            "unknown_loops": self.unknown,
            "sent": round(sum(self.sent.values())),
            "collectives": {kind: round(n) for kind, n in self.sent.items()},
            "calls": {kind: round(n) for kind, n in self.calls.items()},
        }


def program_name(program: Program) -> str:
    """Returns the name of a program's function."""
    fn: Any = program.fn
    while hasattr(fn, "func"):
        fn = fn.func
    name = getattr(fn, "__name__", type(fn).__name__)
    # The programs of `factor_program` and `errors_program` are functions inside these.
    owner = getattr(fn, "__qualname__", name).split(".")[0]
    return owner if owner != name else name
