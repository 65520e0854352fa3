"""Seconds that a compression will take, from its operations and the rates of a machine."""

from __future__ import annotations

from collections.abc import Mapping

from lordjax.forecast.machine_rates import Rates, rate
from lordjax.runtime import flops
from lordjax.runtime.flops import Work

SPREAD = 1.5  # a forecast of time is right within this factor, if nothing else changes


def seconds(work: Mapping[str, Work], rates: Rates) -> dict[str, float]:
    """Seconds of every stage, compiling included; ``compiling`` says how much of it that is."""
    found = {name: _seconds(of_stage, rates) for name, of_stage in work.items()}
    compiling = sum(w["equations"] for w in work.values()) / rates["compile"]
    return found | {"total": sum(found.values()), "compiling": compiling}


def _seconds(work: Work, rates: Rates) -> float:
    other = {kind: n for kind, n in work.items() if kind != "equations"}
    time = sum(n / rate(rates, kind) for kind, n in other.items())
    return time + work["equations"] / rates["compile"]


def total(work: Mapping[str, Work]) -> float:
    """Floating-point operations of all stages."""
    return sum(map(flops.total, work.values()))
