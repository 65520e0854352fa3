"""The result of a compression, its report, and the check against the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lordjax.allocation.plan import Plan, SiteSize
from lordjax.compression.site_factors import AnyFactors
from lordjax.kernels import trees
from lordjax.kernels.kinds import weights
from lordjax.methods import METHODS, ModuleFactors
from lordjax.models import ModelConfig
from lordjax.models.sites import counted_sites
from lordjax.storage.tensor_check import check_finite


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """A compressed model: the same module with other leaves, its plan and its report.

    The leaves are host arrays; putting them on devices is the caller's choice.

    Attributes:
      config: the architecture.
      params: nested dict of arrays and kernels; the caller's ``into``, if that was given.
      plan: rank and format of every site.
      report: sizes, errors of every layer, seconds of every stage, and the calibration.
    """

    config: ModelConfig
    params: Any
    plan: Plan
    report: dict[str, Any]

    def __repr__(self) -> str:
        """The model, the plan and the sizes in a few lines, without arrays."""
        plan, config = self.plan, self.config
        asked = ("keep", "bits", "file_bytes")
        named = [f"{n}={getattr(plan, n)}" for n in asked if getattr(plan, n) is not None]
        budget = ", ".join(named) or "keep=None"
        dense = sum(rank is None and path not in plan.formats for path, rank in plan.ranks.items())
        lines = [
            f"Result(method={plan.method!r}, {budget}, policy={plan.policy!r})",
            f"  model: {config.num_layers} blocks of width {config.hidden_size}",
            f"  sites: {len(plan.ranks) - dense} compressed, {dense} dense",
        ]
        found = self.report.get("plan", {})
        if "kept" in found:
            counts = f"{found['weights_after']:,} of {found['weights_before']:,}"
            lines.append(f"  kept: {counts} block linear weights ({found['kept']:.4f})")
        if "bits_per_weight" in found:
            lines.append(f"  bits: {found['bits_per_weight']:.3f} per block linear weight")
        lines += [f"  {path}: {form}" for path, form in plan.tables.items()]
        if "bytes" in self.report:
            lines.append(f"  bytes: {self.report['bytes']:,}")
        return "\n".join(lines)


def layer_report(factors: Mapping[str, AnyFactors], plan: Plan) -> dict[str, dict[str, Any]]:
    """Returns rank and relative error of every site; for matrices also condition and spectrum.

    Args:
      factors: site path -> factors; planned sites without factors are left out.
      plan: ranks.
    """
    rows = {}
    tiny, eps = np.finfo(float).tiny, np.finfo(float).eps
    for path, rank in plan.ranks.items():
        if path not in factors:
            continue
        factor = factors[path]
        spectrum = np.asarray(factor.spectrum, float)
        total = max(float(spectrum.sum()), tiny)
        rows[path] = {
            "rank": rank,
            "relative_error": 0.0 if rank is None else float(spectrum[rank:].sum() / total),
        }
        if isinstance(factor, ModuleFactors):
            continue
        energy = np.cumsum(spectrum) / total
        rows[path] |= {
            # Capped at 1/eps, because the end of the spectrum is rounding error beyond it.
            "condition": float(spectrum[0] / max(spectrum[-1], spectrum[0] * eps, tiny)),
            "stable_rank": total / max(float(spectrum[0]), tiny),
            "rank_of_energy": {
                str(part): min(int(np.searchsorted(energy, part)) + 1, len(spectrum))
                for part in (0.5, 0.9, 0.99)
            },
        }
    return rows


def verify(params: Any, plan: Plan, sizes: Mapping[str, SiteSize], config: ModelConfig) -> None:
    """Checks that every planned site has the planned size and that all numbers are finite.

    Args:
      params: nested dict of arrays and kernels.
      plan: rank of every site to check.
      sizes: site path -> its size.
      config: the architecture.

    Raises:
      ValueError: if a site does not agree with the plan or is not finite; names them all.
    """
    flat, wrong = trees.flatten(params), []
    sites = counted_sites(METHODS[plan.method].kinds, config)
    for path, rank in plan.ranks.items():
        layer, inside = path.split("/", 1)
        kernels = [flat.get(f"{layer}/{kernel}") for kernel in sites[inside].kernels]
        have = sum(weights(kernel) for kernel in kernels if kernel is not None)
        expected = sizes[path].weights(rank)
        if have != expected:
            wrong.append(f"{path} has {have} weights, the plan says {expected}")
    for path, leaf in flat.items():
        try:
            for array in jax.tree.leaves(leaf):
                check_finite(np.asarray(array), f"{path} (does it overflow in {leaf.dtype}?) holds")
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("the compressed model is not what was planned: " + "; ".join(wrong))
