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
import jax.numpy as jnp
import numpy as np

from lordjax import trees
from lordjax.allocation import CURVELESS, POLICIES, TILE, Curve, allocate
from lordjax.calibrate import (
    activation_keys,
    block_statistics,
    gradient_statistics,
    hidden_states,
)
from lordjax.kernels import nbytes
from lordjax.methods import METHODS, Factors, break_even, method_at, truncate
from lordjax.models.config import ModelConfig
from lordjax.plan import Plan, summary, weights
from lordjax.progress import Clock, Progress, peak_rss
from lordjax.sequential import sequential
from lordjax.sites import LINEAR_SITES, layer_type, site_path
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


@functools.cache
def _jitted(method: str) -> Any:
    return jax.jit(METHODS[method].factor)


def factor_site(method: str, layer: str, kernel: Any, stats: Mapping[str, Any]) -> Factors:
    """A method's factors of one layer, computed in float64, as float32 arrays on the host.

    Statistics are float32 sums; an eigendecomposition loses half of the digits again, so it runs
    in double precision. Ranks from break-even on are never used, so their columns are dropped.
    """
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (kernel, dict(stats)))
        factors = _jitted(method_at(method, layer))(*double)
        spectrum = np.asarray(factors.spectrum)
    useful = int(np.ceil(break_even(*kernel.shape)))
    small = jax.tree.map(lambda a: np.asarray(a, np.float32), factors)
    return dataclasses.replace(
        small,
        left=np.ascontiguousarray(small.left[:, :useful]),
        right=np.ascontiguousarray(small.right[:useful]),
        spectrum=spectrum,
        mean_in=None if small.mean_in is None else small.mean_in[:useful],
    )


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

    def curves(self) -> dict[str, Curve]:
        """Kernel path -> the predicted error at every rank.

        Errors in the metric of the loss compare across kernels as they are. Others are taken
        relative to the layer's output: absolute ones are dominated by the layers of large norm.
        """
        absolute = "gradients" in METHODS[self.method].needs
        curves = {}
        for path, shape in self.shapes.items():
            errors = np.zeros(min(shape) + 1)
            if path in self.factors:
                errors = _tails(self.factors[path].spectrum)
                if not absolute:
                    errors = errors / (errors[0] if errors[0] > 0 else 1.0)
            bias = METHODS[method_at(self.method, layer_type(path))].bias
            curves[path] = Curve(shape, errors, shape[1] if bias else 0)
        return curves

    def plan(self, keep: float, allocation: str | None = None, tile: int = TILE) -> Plan:
        """Allocates ranks.

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
        ranks, gap = allocate(self.curves(), keep, policy, tile)
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
          ValueError: if the result is not of the size that the plan promises.
        """
        start = time.perf_counter()
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
            params[f"layer_{i}"] = _truncate_block(self.source.block(i), i, factors, plan)
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


def _truncate_block(
    block: Mapping[str, Any], i: int, factors: Mapping[str, Factors], plan: Plan
) -> dict[str, Any]:
    """A block with the planned kernels replaced; the input is untouched."""
    flat = dict(trees.flatten(block))
    for site in LINEAR_SITES:
        rank = plan.ranks.get(site_path(i, site))
        if rank is None:
            continue
        dtype = flat[site.path].dtype
        kernel, bias = truncate(factors[site_path(i, site)], rank)
        # On the host, and where the dtype allows a view of the factors: no second copy.
        flat[site.path] = jax.tree.map(lambda a, dtype=dtype: np.asarray(a, dtype), kernel)
        if bias is not None:
            old = np.asarray(flat.get(f"{site.layer}/bias", 0), np.float32)
            flat[f"{site.layer}/bias"] = np.asarray(bias + old, dtype)
    return trees.unflatten(flat)


def verify(params: Any, plan: Plan, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Checks that every planned kernel was replaced and has the planned size.

    Raises:
      ValueError: names the kernels that do not agree with the plan.
    """
    flat, wrong = trees.flatten(params), []
    for path, rank in plan.ranks.items():
        have = sum(leaf.size for leaf in jax.tree.leaves(flat[path]))
        want = weights(shapes[path], rank)
        if have != want:
            wrong.append(f"{path} has {have} weights, the plan says {want}")
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
    if prefix not in PREFIXES:
        raise ValueError(f"prefix must be one of {', '.join(PREFIXES)}, got {prefix!r}")
    if prefix == "corrective" and "abs_mean" in row.needs:
        raise ValueError(f"method {method!r} has no corrective target: it does not fit outputs")
    tokens = check_tokens(config, tokens)
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
        factors = _factor_all(source, calibration, method, gradients, prefix != "dense", clock)
    shapes = _shapes(source)
    report = {
        "method": method,
        "prefix": prefix,
        "calibration": {"windows": len(tokens), "length": tokens.shape[1]},
        "seconds": clock.seconds,
    }
    return Prepared(
        source, calibration, method, prefix, factors, gradients, report, shapes, progress
    )


def _shapes(source: Source) -> dict[str, tuple[int, int]]:
    shapes = {}
    for i in range(source.config.num_layers):
        flat = trees.flatten(source.block(i))
        for site in LINEAR_SITES:
            fan_in, fan_out = flat[site.path].shape
            shapes[site_path(i, site)] = (fan_in, fan_out)
    return shapes


def _factor_all(
    source: Source,
    calibration: Calibration,
    method: str,
    gradients: dict[int, dict[str, dict[str, Any]]],
    keep_gradients: bool,
    clock: Clock,
) -> dict[str, Factors]:
    """One pass over the untouched model: statistics of a block, its factors, the next block."""
    config, row = source.config, METHODS[method]
    factors: dict[str, Factors] = {}
    watches = bool({"moments", "abs_mean"} & set(row.needs))
    # A method without activation statistics needs no forward pass.
    states = hidden_states(source, calibration) if watches else []
    for i in clock.run("statistics and factors", range(config.num_layers)):
        block = jax.tree.map(jnp.asarray, source.block(i))
        keys = activation_keys(block, LINEAR_SITES, row)
        stats = {}
        if watches:
            stats = block_statistics(block, i, states, calibration, LINEAR_SITES, keys, config)
        with clock.part("factors"):
            for site in LINEAR_SITES:
                inputs = {name: stats[key] for name, key in keys[site.path].items()}
                inputs |= {n: per_site[site.path] for n, per_site in gradients.get(i, {}).items()}
                kernel = trees.flatten(block)[site.path]
                factors[site_path(i, site)] = factor_site(method, site.layer, kernel, inputs)
        if not keep_gradients:
            gradients.pop(i, None)
    return factors


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
