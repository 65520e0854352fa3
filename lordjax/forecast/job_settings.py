"""Jobs that settings of ``lordjax compress`` ask for, and shapes of their results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lordjax.allocation.candidates import QUANTIZERS, Candidate
from lordjax.allocation.plan import Plan
from lordjax.allocation.policies import CURVELESS, GIVEN, ranks_by_pattern
from lordjax.compression import quantized
from lordjax.compression.site_factors import site_sizes
from lordjax.forecast.job import CalibrationSpec, CompressionSpec
from lordjax.forecast.quantized_cost import QuantizationSpec, estimate
from lordjax.forecast.shapes import (
    Candidates,
    dense_shapes,
    outline,
    plan_by_shapes,
    quantized_outline,
    quantized_pairs,
    stored,
    stored_tables,
)
from lordjax.forecast.whole_file import (
    estimated_tables,
    keep_by_shapes,
    matrix_bytes,
    tables_of,
)
from lordjax.kernels import normal_float, trees
from lordjax.methods.quantized.weightings import MOMENTS
from lordjax.models.config import ModelConfig
from lordjax.models.sites import LINEAR_SITES, site_path
from lordjax.models.source import InMemory

# Settings of `quantized_spec`.
QUANTIZATION_SETTINGS = (
    *("bits", "budget_bytes", "form", "rank", "weighting", "feedback", "factors", "dtype"),
)

# How sure the ranks or formats of a prediction are; in files under ``ranks_are``.
EXACT = "exact"
ESTIMATED = "uniform ranks, an estimate: the policy decides from calibration data"
MIXED = "an estimate: formats next to the budget, which the weights decide"


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
        given |= _left_for_matrices(config, before, settings)
        job, exact = quantized_spec(config, method, *calibration, given)
        after = quantized_outline(config, job.options, before, dtype, job.factors)
        embeddings, budget = _whole_file(settings)
        forms = estimated_tables(config, before, embeddings, budget)
        chooses = embeddings is None and budget is not None
        job = dataclasses.replace(job, tables=forms, chooses_tables=chooses)
        return job, stored_tables(after, forms), EXACT if exact else MIXED, None
    source = stored(config, trees.flatten(before.params), dtype)
    embeddings, budget = _whole_file(settings)
    if budget is not None:
        sizes = site_sizes(dense_shapes(config), method)
        keep = keep_by_shapes(source, method, sizes, embeddings, budget)
        settings = {**settings, "keep": keep}
    spec, plan, exact = _low_rank_spec(config, calibration, settings)
    after = outline(config, plan, source)
    spec = dataclasses.replace(spec, tables=tables_of(source).all_in(embeddings))
    after = stored_tables(after, spec.tables)
    if settings.get("factors") is not None:
        after = quantized_pairs(after, normal_float.Format.parse(settings["factors"]))
    return spec, after, EXACT if exact else ESTIMATED, plan


def _whole_file(settings: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """The format of the tables, and the budget of the files' bytes, if they are given."""
    return settings.get("embeddings"), settings.get("file_bytes")


def _left_for_matrices(
    config: ModelConfig, before: InMemory, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The budget of a quantizing method's matrices, if one of the files' bytes is given."""
    embeddings, budget = _whole_file(settings)
    if budget is None:
        return {}
    method, dtype = settings["method"], settings["dtype"]
    defaults = QUANTIZERS[method]
    given = {
        "method": method,
        "rank": defaults.rank if settings["rank"] is None else settings["rank"],
        "factors": _factor_format(defaults.factors, settings["factors"]),
        "itemsize": jnp.dtype(dtype or "float16").itemsize,
    }
    source = stored(config, trees.flatten(before.params), dtype)
    forms = estimated_tables(config, source, embeddings, budget)
    left = matrix_bytes(source, _linear_shapes(config), forms, given, budget)
    return {"budget_bytes": left}


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
