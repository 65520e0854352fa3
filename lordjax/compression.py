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
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lordjax import trees
from lordjax.allocation import CURVELESS, INFLUENCED, POLICIES, TILE, Curve, allocate
from lordjax.calibrate import gradient_statistics, needs_gradients
from lordjax.data import fingerprint
from lordjax.evaluate.perplexity import perplexity
from lordjax.factoring import AnyFactors, factor_all, replace_kernels, site_sizes
from lordjax.kernels import nbytes
from lordjax.methods import METHODS, method_at
from lordjax.models import ModelConfig
from lordjax.plan import Plan, Size, summary
from lordjax.progress import Clock, Progress, peak_rss
from lordjax.sequential import sequential
from lordjax.sites import layer_index, layer_type, sites_for
from lordjax.source import Calibration, InMemory, Materialized, Source, check_tokens

# The backward pass costs about four forward passes; more windows than this gain little (CHANGELOG).
GRADIENT_WINDOWS = 32
# MoDeGPT's temperatures, and how many calibration windows choose one of them.
TEMPERATURES = (0.03, 0.045, 0.06, 0.08, 0.1, 0.15, 0.3, float("inf"))
HELD_OUT = 4
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
      held_out: calibration tokens that no statistic has seen, to choose a temperature with.
      method: a key of `METHODS`.
      prefix: what later statistics are taken from: one of ``dense``, ``compressed``,
        ``corrective``; see `Method`.
      factors: site path -> factors; empty if the policy and the method need none beforehand.
      influences: layer -> block influence; empty unless the policy needs it.
      gradients: layer -> gradient statistics, kept for a sequential pass only.
      report: what is known so far.
      sizes: site path -> its size.
    """

    source: Source
    calibration: Calibration
    held_out: np.ndarray
    method: str
    prefix: str
    factors: dict[str, AnyFactors]
    influences: dict[int, float]
    gradients: dict[int, dict[str, dict[str, Any]]]
    report: dict[str, Any]
    sizes: dict[str, Size]
    progress: Progress | None = None

    def curves(self, sensitivity: Mapping[str, float] | None = None) -> dict[str, Curve]:
        """Site path -> the predicted error at every rank.

        Errors in the metric of the loss compare across sites as they are. Others are taken
        relative to the site's output: absolute ones are dominated by the layers of large norm.

        Args:
          sensitivity: site path -> factor on its errors; None = 1 for all.
        """
        row = METHODS[self.method]
        sites = {site.path: site for site in sites_for(row.kinds)}
        curves = {}
        for path, size in self.sizes.items():
            site = sites[path.split("/", 1)[1]]
            errors = np.zeros(int(np.ceil(size.limit)) + 1)
            if path in self.factors:
                errors = _tails(self.factors[path].spectrum)
                if not row.in_nats:
                    errors = errors / (errors[0] if errors[0] > 0 else 1.0)
                if sensitivity is not None:
                    errors = errors * sensitivity[path]
            if site.kind == "linear":
                bias = METHODS[method_at(self.method, layer_type(path))].bias
            else:
                bias = row.modules[site.kind].bias
            influence = self.influences.get(layer_index(path), 0.0)
            curves[path] = Curve(size, errors, size.bias if bias else 0, influence)
        return curves

    def plan(
        self,
        keep: float,
        allocation: str | None = None,
        tile: int = TILE,
        sensitivity: Mapping[str, float] | None = None,
        temperature: float | None = None,
    ) -> Plan:
        """Allocates ranks; arguments as for `allocate` and `curves`.

        Args:
          keep: share of the block linear weights that stays, in (0, 1].
          allocation: a key of `POLICIES`; None = the method's own.
          tile: ranks are multiples of this, in policies that optimise.
          sensitivity: site path -> factor on its errors.
          temperature: of ``block-influence``; None = the one of `TEMPERATURES` whose model has the
            least loss on the held-out calibration windows.

        Raises:
          KeyError: if the policy is unknown.
          ValueError: if ``keep`` is outside (0, 1] or cannot be met, or the policy needs error
            curves or influences and the model was prepared without.
        """
        policy = allocation or METHODS[self.method].allocation
        check_policy(policy)
        lacks = not self.factors and policy not in CURVELESS
        if lacks or (policy in INFLUENCED and not self.influences):
            raise ValueError(
                f"policy {policy!r} needs statistics that this model was prepared without; "
                "name the policy when preparing"
            )
        curves = self.curves(sensitivity)

        def planned(**options: Any) -> Plan:
            ranks, gap = allocate(curves, keep, policy, tile, **options)
            return Plan(self.method, ranks, keep, policy, gap)

        if policy not in INFLUENCED or keep == 1:
            return planned()
        if temperature is None:
            temperature = self._temperature({t: planned(temperature=t) for t in TEMPERATURES})
        return planned(temperature=temperature)

    def _temperature(self, plans: Mapping[float, Plan]) -> float:
        """The temperature whose plan has the least loss on the held-out windows."""
        if self.calibration.mask is not None:
            raise ValueError("calibration windows are padded; name a temperature")
        losses: dict[tuple[Any, ...], float] = {}
        clock, best, config = Clock(self.progress), (np.inf, 0.0), self.source.config
        temperatures = list(plans)
        for j in clock.run("temperature", range(len(temperatures))):
            plan = plans[temperatures[j]]
            same = tuple(plan.ranks.items())
            if same not in losses:
                # Widened, so that all candidates share one compilation.
                params = self._params(plan, self.factors, widened=True)
                losses[same] = perplexity(config, params, self.held_out)["nll_per_token"]
            best = min(best, (losses[same], temperatures[j]))
        self.report["temperature"] = best[1]
        return best[1]

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
        clock, factors, kernels = Clock(self.progress), self.factors, None
        if self.prefix != "dense":
            factors, kernels = sequential(
                self.source,
                self.calibration,
                plan,
                self.method,
                self.gradients,
                corrective=self.prefix == "corrective",
                clock=clock,
            )
        params = self._params(plan, factors, kernels=kernels)
        if dtype is not None:
            params = jax.tree.map(lambda a: _cast(a, dtype), params)
        verify(params, plan, self.sizes)
        seconds = {**self.report["seconds"], "apply": time.perf_counter() - start}
        report = {
            **self.report,
            "seconds": seconds,
            "plan": summary(plan, self.sizes) | {"gap": plan.gap, "policy": plan.policy},
            "bytes": nbytes(params),
            "layers": _layer_report(factors, plan),
            "peak_rss_bytes": peak_rss(),
        }
        return Result(self.source.config, params, plan, report)

    def _params(self, plan: Plan, factors: dict[str, AnyFactors], **options: Any) -> dict[str, Any]:
        """The parameters of a plan; options as for `replace_kernels`."""
        config, params = self.source.config, dict(self.source.rest())
        for i in range(config.num_layers):
            params[f"layer_{i}"] = replace_kernels(
                self.source.block(i), i, factors, plan.ranks, self.method, config, **options
            )
        return params

    def _check(self, plan: Plan) -> None:
        """Raises ValueError unless the plan has a usable rank for every site and no others."""
        wrong = [f"{p} is not a site of this method" for p in set(plan.ranks) - set(self.sizes)]
        wrong += [f"{path} is missing" for path in set(self.sizes) - set(plan.ranks)]
        for path in set(plan.ranks) & set(self.sizes):
            rank, size = plan.ranks[path], self.sizes[path]
            if rank is not None and (not 1 <= rank < size.limit or rank % size.step):
                multiple = f" or no multiple of {size.step}" if size.step > 1 else ""
                wrong.append(
                    f"{path}: rank {rank} is not in [1, {size.limit:.0f}){multiple}; null keeps it "
                    "dense"
                )
        if wrong:
            raise ValueError("the plan does not fit the model: " + "; ".join(sorted(wrong)))


def _cast(a: Any, dtype: Any) -> np.ndarray:
    """In another dtype, unless it is an index."""
    a = np.asarray(a)
    return a if np.issubdtype(a.dtype, np.integer) else a.astype(dtype)


def _tails(spectrum: Any) -> np.ndarray:
    """``tails[r] = sum(spectrum[r:])`` for r = 0…m, added from small to large."""
    sums = np.cumsum(np.asarray(spectrum, float)[::-1])[::-1]
    return np.concatenate([sums, np.zeros(1)])


def _layer_report(factors: Mapping[str, AnyFactors], plan: Plan) -> dict[str, dict[str, Any]]:
    """Per site: rank, relative error, condition number, summary of the spectrum."""
    rows = {}
    tiny, eps = np.finfo(float).tiny, np.finfo(float).eps
    for path, factor in factors.items():
        spectrum, rank = np.asarray(factor.spectrum, float), plan.ranks[path]
        total = max(float(spectrum.sum()), tiny)
        energy = np.cumsum(spectrum) / total
        largest, least = float(spectrum.max()), float(spectrum.min())
        rows[path] = {
            "rank": rank,
            "relative_error": 0.0 if rank is None else float(spectrum[rank:].sum() / total),
            # Capped at 1/eps: beyond it the spectrum's end is rounding error.
            "condition": largest / max(least, largest * eps, tiny),
            "stable_rank": total / max(largest, tiny),
            "rank_of_energy": {
                str(share): min(int(np.searchsorted(energy, share)) + 1, len(spectrum))
                for share in (0.5, 0.9, 0.99)
            },
        }
    return rows


def verify(params: Any, plan: Plan, sizes: Mapping[str, Size]) -> None:
    """Checks that every planned site was replaced and has the planned size, and all is finite.

    Raises:
      ValueError: names the sites that do not agree with the plan or are not finite.
    """
    flat, wrong = trees.flatten(params), []
    sites = {site.path: site for site in sites_for(METHODS[plan.method].kinds)}
    for path, rank in plan.ranks.items():
        layer, inside = path.split("/", 1)
        kernels = [flat.get(f"{layer}/{kernel}") for kernel in sites[inside].kernels]
        have = sum(leaf.size for leaf in jax.tree.leaves(kernels))
        want = sizes[path].weights(rank)
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
    calibration, held_out = Calibration(tokens, mask, batch_size), tokens[:0]
    if policy in INFLUENCED:
        calibration, held_out = calibration.split(HELD_OUT)
    gradients: dict[int, dict[str, dict[str, Any]]] = {}
    if needs_gradients(row):
        few = calibration.spread(gradient_windows)
        # A backward pass holds every activation of a block: half the batch, the same memory.
        few = dataclasses.replace(few, batch_size=max(1, batch_size // 2))
        gradients = gradient_statistics(source, few, row, clock)
    factors: dict[str, AnyFactors] = {}
    influences: dict[int, float] = {}
    if prefix == "dense" or policy not in CURVELESS:
        factors, influences = factor_all(
            source,
            calibration,
            method,
            gradients,
            clock,
            keep_gradients=prefix != "dense",
            influence=policy in INFLUENCED,
        )
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
        source=source,
        calibration=calibration,
        held_out=held_out,
        method=method,
        prefix=prefix,
        factors=factors,
        influences=influences,
        gradients=gradients,
        report=report,
        sizes=site_sizes(source, method),
        progress=progress,
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
