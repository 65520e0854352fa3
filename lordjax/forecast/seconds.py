"""Predicted seconds of a compression: operation counts divided by the rates of a machine."""

from __future__ import annotations

from collections.abc import Mapping

from lordjax.forecast.machine_rates import Rates, rate
from lordjax.runtime.flops import OpCounts

SPREAD = 1.5  # predicted seconds are within this factor of the measured ones


def seconds(ops: Mapping[str, OpCounts], rates: Rates) -> dict[str, float]:
    """Returns predicted seconds of every stage.

    Args:
      ops: stage -> its operation counts.
      rates: operations per second of this machine.

    Returns:
      stage -> seconds, compilation included; ``total``; and ``compiling``, the part of the total
      that is spent on compilation.
    """
    found = {name: _stage_seconds(counts, rates) for name, counts in ops.items()}
    compiling = sum(counts["equations"] for counts in ops.values()) / rates["compile"]
    return found | {"total": sum(found.values()), "compiling": compiling}


def _stage_seconds(ops: OpCounts, rates: Rates) -> float:
    running = sum(n / rate(rates, kind) for kind, n in ops.items() if kind != "equations")
    return running + ops["equations"] / rates["compile"]
