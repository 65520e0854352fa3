"""Lifts a method from one kernel to a model: statistics, factors, plan, truncation.

The model is walked block by block; at any time one block's statistics are in memory, besides the
hidden states of the calibration tokens and the factors found so far::

    prepare(source, tokens, method) -> Prepared      statistics and rank-free factors, once
    Prepared.compress(keep)         -> Result        allocation and slicing, cheap, any budget
    compress(source, tokens, ...)   -> Result        both

Methods that calibrate on the compressed prefix (ROM) know their inputs only once the ranks before
are fixed; for them ``Prepared.compress`` walks the model again (`sequential`).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lordjax import trees
from lordjax.allocation import CURVELESS, POLICIES, TILE, Curve, allocate
from lordjax.calibrate import gradient_statistics
from lordjax.data import fingerprint
from lordjax.factoring import factor_all, factor_site, replace_kernels, site_shapes
from lordjax.kernels import nbytes
from lordjax.methods import METHODS, Factors, break_even, method_at
from lordjax.models import ModelConfig
from lordjax.plan import Plan, summary, weights
from lordjax.progress import Clock, Progress, peak_rss
from lordjax.sequential import sequential
from lordjax.sites import layer_type
from lordjax.source import Calibration, InMemory, Materialized, Source, check_tokens

# The backward pass costs about four forward passes; more windows than this gain little (CHANGELOG).
GRADIENT_WINDOWS = 32
PREFIXES = ("dense", "compressed", "corrective")

__all__ = ["InMemory", "Prepared", "Result", "Source", "compress", "prepare"]


@dataclasses.dataclass(frozen=True)
class Result:
    """A compressed model: the same module with other leaves, and how it came about.

    The leaves are host arrays; putting them on devices is the caller's choice.
    """

    config: ModelConfig
    params: dict[str, Any]
    plan: Plan
    report: dict[str, Any]


@dataclasses.dataclass
class Prepared:
    """A model's factors for all ranks, ready to be compressed to any budget.

    Attributes:
      source: the untouched model.
      calibration: tokens, for methods that walk the model again.
      method: a key of `METHODS`.
      prefix: what later statistics are taken from: one of ``dense``, ``compressed``,
        ``corrective``; see `Method`.
      factors: kernel path -> factors; empty if the policy and the method need none beforehand.
      gradients: layer -> gradient statistics, kept for a sequential pass only.
      report: what is known so far.
    """

    source: Source
    calibration: Calibration
    method: str
    prefix: str
    factors: dict[str, Factors]
    gradients: dict[int, dict[str, dict[str, Any]]]
    report: dict[str, Any]
    shapes: dict[str, tuple[int, int]]
    progress: Progress | None = None

    def curves(self, sensitivity: Mapping[str, float] | None = None) -> dict[str, Curve]:
        """Kernel path -> the predicted error at every rank.

        Errors in the metric of the loss compare across kernels as they are. Others are taken
        relative to the layer's output: absolute ones are dominated by the layers of large norm.

        Args:
          sensitivity: kernel path -> factor on its errors; None = 1 for all.
        """
        absolute = "gradients" in METHODS[self.method].needs
        curves = {}
        for path, shape in self.shapes.items():
            errors = np.zeros(min(shape) + 1)
            if path in self.factors:
                errors = _tails(self.factors[path].spectrum)
                if not absolute:
                    errors = errors / (errors[0] if errors[0] > 0 else 1.0)
                if sensitivity is not None:
                    errors = errors * sensitivity[path]
            bias = METHODS[method_at(self.method, layer_type(path))].bias
            curves[path] = Curve(shape, errors, shape[1] if bias else 0)
        return curves

    def plan(
        self,
        keep: float,
        allocation: str | None = None,
        tile: int = TILE,
        sensitivity: Mapping[str, float] | None = None,
    ) -> Plan:
        """Allocates ranks; arguments as for `allocate` and `curves`.

        Raises:
          KeyError: if the policy is unknown.
          ValueError: if ``keep`` is outside (0, 1] or cannot be met, or the policy needs error
            curves and the model was prepared without.
        """
        policy = allocation or METHODS[self.method].allocation
        check_policy(policy)
        if not self.factors and policy not in CURVELESS:
            raise ValueError(
                f"policy {policy!r} needs error curves, but the model was prepared for policies "
                f"without ({', '.join(CURVELESS)}); name the policy when preparing"
            )
        ranks, gap = allocate(self.curves(sensitivity), keep, policy, tile)
        return Plan(self.method, ranks, keep, policy, gap)

    def compress(
        self,
        keep: float,
        allocation: str | None = None,
        *,
        tile: int = TILE,
        dtype: Any = None,
    ) -> Result:
        """A model of one budget; the source is untouched. Errors: see `plan` and `apply`."""
        return self.apply(self.plan(keep, allocation, tile), dtype=dtype)

    def apply(self, plan: Plan, *, dtype: Any = None) -> Result:
        """The model of a plan, made by `plan` or edited.

        Raises:
          ValueError: if the plan does not fit the model, or the result is not of the size that
            the plan promises.
        """
        start = time.perf_counter()
        self._check(plan)
        clock, factors = Clock(self.progress), self.factors
        if self.prefix != "dense":
            factors = sequential(
                self.source,
                self.calibration,
                plan,
                functools.partial(factor_site, self.method),
                self.method,
                self.gradients,
                corrective=self.prefix == "corrective",
                clock=clock,
            )
        params = dict(self.source.rest())
        for i in range(self.source.config.num_layers):
            params[f"layer_{i}"] = replace_kernels(self.source.block(i), i, factors, plan.ranks)
        if dtype is not None:
            params = jax.tree.map(lambda a: np.asarray(a).astype(dtype), params)
        verify(params, plan, self.shapes)
        seconds = {**self.report["seconds"], "apply": time.perf_counter() - start}
        report = {
            **self.report,
            "seconds": seconds,
            "plan": summary(plan, self.shapes) | {"gap": plan.gap, "policy": plan.policy},
            "bytes": nbytes(params),
            "layers": _layer_report(factors, plan),
            "peak_rss_bytes": peak_rss(),
        }
        return Result(self.source.config, params, plan, report)

    def _check(self, plan: Plan) -> None:
        """Raises ValueError unless the plan has a usable rank for every kernel and no others."""
        wrong = [f"{p} is not a kernel of this model" for p in set(plan.ranks) - set(self.shapes)]
        wrong += [f"{path} is missing" for path in set(self.shapes) - set(plan.ranks)]
        for path in set(plan.ranks) & set(self.shapes):
            rank, limit = plan.ranks[path], break_even(*self.shapes[path])
            if rank is not None and not 1 <= rank < limit:
                wrong.append(f"{path}: rank {rank} is not in [1, {limit:.0f}); null keeps it dense")
        if wrong:
            raise ValueError("the plan does not fit the model: " + "; ".join(sorted(wrong)))


def _tails(spectrum: Any) -> np.ndarray:
    """``tails[r] = sum(spectrum[r:])`` for r = 0…m, added from small to large."""
    sums = np.cumsum(np.asarray(spectrum, float)[::-1])[::-1]
    return np.concatenate([sums, np.zeros(1)])


def _layer_report(factors: Mapping[str, Factors], plan: Plan) -> dict[str, dict[str, Any]]:
    """Per kernel: rank, relative error, condition number, summary of the spectrum."""
    rows = {}
    tiny, eps = np.finfo(float).tiny, np.finfo(float).eps
    for path, factor in factors.items():
        spectrum, rank = np.asarray(factor.spectrum, float), plan.ranks[path]
        total = max(float(spectrum.sum()), tiny)
        energy = np.cumsum(spectrum) / total
        rows[path] = {
            "rank": rank,
            "relative_error": 0.0 if rank is None else float(spectrum[rank:].sum() / total),
            # Capped at 1/eps: beyond it the spectrum's end is rounding error.
            "condition": float(spectrum[0] / max(spectrum[-1], spectrum[0] * eps, tiny)),
            "stable_rank": total / max(float(spectrum[0]), tiny),
            "rank_of_energy": {
                str(share): min(int(np.searchsorted(energy, share)) + 1, len(spectrum))
                for share in (0.5, 0.9, 0.99)
            },
        }
    return rows


def verify(params: Any, plan: Plan, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Checks that every planned kernel was replaced and has the planned size, and all is finite.

    Raises:
      ValueError: names the kernels that do not agree with the plan or are not finite.
    """
    flat, wrong = trees.flatten(params), []
    for path, rank in plan.ranks.items():
        have = sum(leaf.size for leaf in jax.tree.leaves(flat[path]))
        want = weights(shapes[path], rank)
        if have != want:
            wrong.append(f"{path} has {have} weights, the plan says {want}")
    for path, leaf in flat.items():
        if not all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(leaf)):
            wrong.append(f"{path} is not finite (does it overflow in {leaf.dtype}?)")
    if wrong:
        raise ValueError("the compressed model is not what was planned: " + "; ".join(wrong))


def check_method(name: str) -> None:
    """Raises KeyError with a hint if there is no such method."""
    if name not in METHODS:
        raise KeyError(f"no method {name!r}; {trees.did_you_mean(name, METHODS)}")


def check_policy(name: str) -> None:
    """Raises KeyError with a hint if there is no such allocation policy."""
    if name not in POLICIES:
        raise KeyError(f"no allocation policy {name!r}; {trees.did_you_mean(name, POLICIES)}")


def _check_options(method: str, prefix: str, batch_size: int, gradient_windows: int | None) -> None:
    """Raises ValueError for options of `prepare` that are out of range or do not go together."""
    if prefix not in PREFIXES:
        raise ValueError(f"prefix must be one of {', '.join(PREFIXES)}, got {prefix!r}")
    if prefix == "corrective" and "abs_mean" in METHODS[method].needs:
        raise ValueError(f"method {method!r} has no corrective target: it does not fit outputs")
    if batch_size < 1 or (gradient_windows is not None and gradient_windows < 1):
        raise ValueError(
            f"batch_size and gradient_windows must be at least 1, got {batch_size} and "
            f"{gradient_windows}"
        )


def prepare(
    source: Source,
    tokens: np.ndarray,
    *,
    method: str = "lord",
    allocation: str | None = None,
    prefix: str | None = None,
    mask: np.ndarray | None = None,
    batch_size: int = 4,
    gradient_windows: int | None = GRADIENT_WINDOWS,
    progress: Progress | None = None,
) -> Prepared:
    """Collects statistics of the untouched model and factors every linear layer for all ranks.

    Args:
      source: the model. A compressed one is compressed again; its kernels count as dense.
      tokens: calibration ids ``[windows, length]``.
      method: a key of `METHODS`.
      allocation: the policy that will be used, if not the method's own; a sequential method whose
        policy needs no error curves (ROM's) skips the pass over the untouched model.
      prefix: where later statistics come from, if not the method's own choice; see `Method`.
      mask: ``[windows, length]``, False at padding.
      batch_size: windows per step.
      gradient_windows: how many windows, spread evenly, the backward pass sees; None = all.
      progress: called with (stage, done, total).

    Raises:
      KeyError: if the method or the policy is unknown.
      ValueError: if tokens do not fit the model, or an activation is not finite.
    """
    check_method(method)
    row, config = METHODS[method], source.config
    policy, prefix = allocation or row.allocation, prefix or row.prefix
    check_policy(policy)
    _check_options(method, prefix, batch_size, gradient_windows)
    tokens = check_tokens(config, tokens)
    if mask is not None and np.shape(mask) != tokens.shape:
        raise ValueError(f"mask {np.shape(mask)}: expected the shape of the tokens {tokens.shape}")
    source = Materialized(source)
    clock = Clock(progress)
    calibration = Calibration(tokens, mask, batch_size)
    gradients: dict[int, dict[str, dict[str, Any]]] = {}
    if {"gradients", "row_fisher"} & set(row.needs):
        few = calibration.spread(gradient_windows)
        # A backward pass holds every activation of a block: half the batch, the same memory.
        few = dataclasses.replace(few, batch_size=max(1, batch_size // 2))
        gradients = gradient_statistics(source, few, row.needs, clock)
    factors: dict[str, Factors] = {}
    if prefix == "dense" or policy not in CURVELESS:
        factors = factor_all(source, calibration, method, gradients, prefix != "dense", clock)
    shapes = site_shapes(source)
    report = {
        "method": method,
        "prefix": prefix,
        "calibration": {
            "windows": len(tokens),
            "length": tokens.shape[1],
            "tokens_sha256": fingerprint(tokens),
        },
        "seconds": clock.seconds,
    }
    return Prepared(
        source, calibration, method, prefix, factors, gradients, report, shapes, progress
    )


def compress(
    source: Source,
    tokens: np.ndarray,
    *,
    keep: float = 0.8,
    allocation: str | None = None,
    dtype: Any = None,
    **options: Any,
) -> Result:
    """Compresses a model: `prepare`, then one budget.

    Args:
      source: the model.
      tokens: calibration ids ``[windows, length]``.
      keep: share of the block linear weights that stays, in (0, 1].
      allocation: a key of `POLICIES`; None = the method's own.
      dtype: of the result; None = that of the source.
      **options: see `prepare`.

    Raises:
      KeyError: if the method or the policy is unknown.
      ValueError: see `prepare` and `Prepared.plan`.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    prepared = prepare(source, tokens, allocation=allocation, **options)
    return prepared.compress(keep, allocation, dtype=dtype)
