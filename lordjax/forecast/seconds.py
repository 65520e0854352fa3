"""Seconds that a compression will take, from its operations and the rates of a machine."""

from __future__ import annotations

from collections.abc import Mapping

from lordjax.forecast.machine_rates import Rates, rate
from lordjax.runtime import flops
from lordjax.runtime.flops import OpCounts

SPREAD = 1.5  # a forecast of time is right within this factor, if nothing else changes


def seconds(ops: Mapping[str, OpCounts], rates: Rates) -> dict[str, float]:
    """Seconds of every stage, compiling included; ``compiling`` says how much of it that is."""
    found = {name: _seconds(of_stage, rates) for name, of_stage in ops.items()}
    compiling = sum(w["equations"] for w in ops.values()) / rates["compile"]
    return found | {"total": sum(found.values()), "compiling": compiling}


def _seconds(ops: OpCounts, rates: Rates) -> float:
    other = {kind: n for kind, n in ops.items() if kind != "equations"}
    time = sum(n / rate(rates, kind) for kind, n in other.items())
    return time + ops["equations"] / rates["compile"]


def total(ops: Mapping[str, OpCounts]) -> float:
    """Floating-point operations of all stages."""
    return sum(map(flops.total, ops.values()))
