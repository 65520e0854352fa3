"""A model with its factors for all ranks, and how a budget is cut from them.

::

    Prepared.plan(keep)       -> Plan       numbers only
    Prepared.apply(plan)      -> Result     slicing; verified against the plan
    Prepared.compress(keep)   -> Result     both
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lordjax.allocation.curves import Curve
from lordjax.allocation.measured_errors import Correction, Place, predicted_loss
from lordjax.allocation.plan import Plan, SiteSize, summary
from lordjax.allocation.policies import CURVELESS, INFLUENCED, TILE, allocate, check_policy
from lordjax.calibration.calibration_set import Calibration
from lordjax.compression.measured.held_out import places_of, predicted_errors
from lordjax.compression.measured.temperature import best_plan
from lordjax.compression.result import Result, layer_report, verify
from lordjax.compression.sequential import sequential
from lordjax.compression.site_factors import AnyFactors, replace_kernels
from lordjax.compression.whole_file.budget import plan_in_file
from lordjax.compression.whole_file.tables import Tables
from lordjax.kernels import normal_float
from lordjax.kernels.base import nbytes
from lordjax.kernels.convert import cast, quantize_pairs
from lordjax.methods import METHODS, Method, corrects_bias
from lordjax.models.config import ModelConfig
from lordjax.models.sites import counted_sites
from lordjax.models.source import Source
from lordjax.models.stock import reshaped
from lordjax.names import layer, layer_index, layer_type
from lordjax.runtime.progress import Clock, Progress, peak_rss
from lordjax.storage import shards
from lordjax.storage.shards import REST, join_blocks, open_shards, write_shard_once
from lordjax.storage.store import MemoryStore, Store, get_or_compute


@dataclasses.dataclass
class Prepared:
    """A model's factors for all ranks, ready to be compressed to any budget.

    Attributes:
      source: the original model.
      calibration: tokens, for methods that run over the model again.
      held_out: ``[n, length]`` calibration tokens that no statistic has seen; they choose a
        temperature.
      method: a key of `METHODS`.
      prefix: model that later statistics are taken from: one of ``dense``, ``compressed``,
        ``corrective``; see `Method`.
      factors: site path -> factors, read from ``store`` on access; empty if policy and method need
        none beforehand.
      influences: layer -> block influence; empty unless the policy needs it.
      checked: measured against predicted losses of some sites and of a plan (`held_out.check`);
        they correct the predicted errors.
      tile: ranks are multiples of this, in policies that optimize.
      gradients: layer -> gradient statistics of each fold; kept for a sequential pass only.
      report: entries of the report that are known so far.
      sizes: site path -> its size.
      progress: called with (stage, done, total).
      store: where finished work is kept.
    """

    source: Source
    calibration: Calibration
    held_out: np.ndarray
    method: str
    prefix: str
    factors: Mapping[str, AnyFactors]
    influences: dict[int, float]
    gradients: Mapping[int, Sequence[Mapping[str, Mapping[str, Any]]]]
    report: dict[str, Any]
    sizes: dict[str, SiteSize]
    progress: Progress | None = None
    store: Store = dataclasses.field(default_factory=MemoryStore)
    checked: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tile: int = TILE

    @property
    def definition(self) -> Method:
        """The method."""
        return METHODS[self.method]

    @property
    def places(self) -> dict[str, Place]:
        """Site path -> where it is in the model."""
        return places_of(self.sizes)

    @functools.cached_property
    def _site_errors(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Site path -> its errors in sample, and on unseen tokens; factors are read once."""
        found = self.factors
        return {path: predicted_errors(found[path]) for path in self.sizes if path in found}

    def curves(
        self, sensitivity: Mapping[str, float] | None = None, *, in_sample: bool = False
    ) -> dict[str, Curve]:
        """Returns the predicted error of every site at every rank, by site path.

        They are errors on unseen tokens if there were enough sequences to cross-fit them, and they
        are corrected by what was measured (`held_out`). Errors in the metric of the loss are
        comparable between sites. All others are divided by the site's whole error, because layers
        of large norm would dominate the sum.

        Args:
          sensitivity: site path -> factor on its errors; None: 1 for all.
          in_sample: whether to return the errors on the tokens that the factors are fitted to.
        """
        method, correction = self.definition, Correction(self.checked, self.places)
        sites = counted_sites(method.kinds, self.source.config)
        curves = {}
        for path, size in self.sizes.items():
            site = sites[path.split("/", 1)[1]]
            errors = np.zeros(int(np.ceil(size.limit)) + 1)
            if path in self._site_errors:
                fitted, unseen = self._site_errors[path]
                errors = fitted if in_sample else correction.errors(path, fitted, unseen)
                if not method.in_nats:
                    errors = errors / (errors[0] if errors[0] > 0 else 1.0)
                if sensitivity is not None:
                    errors = errors * sensitivity[path]
            bias = corrects_bias(self.method, site.kind, layer_type(path))
            influence = self.influences.get(layer_index(path), 0.0)
            extra = max(size.moved, size.bias if bias else 0)
            removal = correction.removal.get(layer_index(path), np.inf) / len(sites)
            curves[path] = Curve(size, errors, extra, influence, removal)
        return curves

    def plan(
        self,
        keep: float,
        allocation: str | None = None,
        tile: int | None = None,
        sensitivity: Mapping[str, float] | None = None,
        temperature: float | None = None,
    ) -> Plan:
        """Allocates ranks within a budget.

        Args:
          keep: fraction of the block linear weights to keep, in (0, 1].
          allocation: a key of `POLICIES`; None: the method's own.
          tile: ranks are multiples of this, in policies that optimize; None: ``self.tile``.
          sensitivity: site path -> factor on its errors; None: 1 for all.
          temperature: temperature of ``block-influence``; None: the one of `TEMPERATURES` whose
            model has the least loss on the held-out calibration sequences.

        Returns:
          The rank of every site.

        Raises:
          KeyError: if the policy is unknown.
          ValueError: if ``keep`` is outside (0, 1] or cannot be met, or the policy needs error
            curves or influences and the model was prepared without.
        """
        policy = allocation or METHODS[self.method].allocation
        check_policy(policy, temperature)
        tile = self.tile if tile is None else tile
        no_errors = not self.factors and policy not in CURVELESS
        if no_errors or (policy in INFLUENCED and not self.influences):
            raise ValueError(
                f"policy {policy!r} needs statistics that this model was prepared without; call "
                f"prepare with allocation={policy!r}"
            )
        curves = self.curves(sensitivity)

        if policy not in INFLUENCED:
            ranks, gap = allocate(curves, keep, policy, tile)
            return Plan(self.method, ranks, keep, policy, gap, predicted=self._loss(ranks))

        def planned(temperature: float) -> Plan:
            ranks, gap = allocate(curves, keep, policy, tile, temperature=temperature)
            return Plan(self.method, ranks, keep, policy, gap, temperature)

        if keep == 1:
            return Plan(self.method, dict.fromkeys(curves, None), keep, policy)
        return best_plan(self, planned) if temperature is None else planned(temperature)

    def _loss(self, ranks: Mapping[str, int | None]) -> dict[str, float] | None:
        """Returns the predicted loss of ranks in nats, or None if errors are in other units."""
        if not self.definition.in_nats or not self.factors:
            return None
        return predicted_loss(self, ranks)

    def compress(
        self,
        keep: float,
        allocation: str | None = None,
        *,
        tile: int | None = None,
        temperature: float | None = None,
        dtype: Any = None,
        factors: str | None = None,
        embeddings: str | None = None,
        file_bytes: int | None = None,
        into: Any = None,
    ) -> Result:
        """Compresses to one budget; the original model is not changed.

        Args:
          keep: fraction of the block linear weights to keep, in (0, 1]; with ``file_bytes`` unused.
          allocation: see `plan`.
          tile: see `plan`.
          temperature: see `plan`.
          dtype: dtype of the result; None: that of the source.
          factors: quantization format of factor pairs (`normal_float.Format.parse`); None: plain
            arrays.
          embeddings: format of embeddings and head (`kernels.table.parse`); None: as they are.
          file_bytes: bytes of all files with weights, instead of ``keep``.
          into: see `apply`.

        Returns:
          The compressed model, its plan and its report.

        Raises:
          KeyError: see `plan`.
          ValueError: see `plan` and `apply`.
        """
        forms = self._tables(dtype).all_in(embeddings)
        self._tables(dtype).collect_for(forms)

        def planned() -> Plan:
            if file_bytes is None:
                return self.plan(keep, allocation, tile, temperature=temperature)
            given = {"allocation": allocation, "tile": tile, "temperature": temperature}
            return plan_in_file(self, self._tables(dtype), forms, file_bytes, **given)

        # A run that was killed goes on with the plan that it began with.
        plan = get_or_compute(self.store, "plan", planned) if self.store.durable else planned()
        plan = dataclasses.replace(plan, factors=factors, tables=forms, file_bytes=file_bytes)
        return self.apply(plan, dtype=dtype, into=into)

    def _tables(self, dtype: Any) -> Tables:
        """Returns the matrices outside the blocks, of a result in a dtype."""
        kept = self.store, self.report["seconds"], self.progress
        return Tables(self.source, self.calibration, dtype, *kept)

    def apply(self, plan: Plan, *, dtype: Any = None, into: Any = None) -> Result:
        """Builds the model of a plan that `plan` made or a person edited.

        Args:
          plan: rank of every site.
          dtype: dtype of the result; None: that of the source.
          into: where finished parts of the model go, by name (`Shards`); parts that are there are
            not made again. None: a dictionary, and ``Result.params`` is the model.

        Returns:
          The compressed model, its plan and its report.

        Raises:
          ValueError: if the plan does not fit the model, or the result does not have the size that
            the plan promises.
        """
        start = time.perf_counter()
        self._check(plan)
        clock, (config, layers) = Clock(self.progress), self._shape(plan)
        parts = open_shards(into, self.store, plan)
        factors, kernels = self.factors, None
        if self.prefix != "dense":
            factors, kernels = sequential(
                self.source,
                self.calibration,
                plan,
                self.method,
                self.gradients,
                corrective=self.prefix == "corrective",
                clock=clock,
                store=self.store if self.store.durable else None,
            )

        def make(name: str) -> Any:
            old = name if name == REST else layer(layers[layer_index(name)])
            return self._part(old, plan, factors, kernels, dtype)

        size, names = 0, shards.names(config)
        for k in clock.run("writing", range(len(names))):
            size += write_shard_once(parts, self.store, names[k], make)["bytes"]
        seconds = {**self.report["seconds"], "apply": time.perf_counter() - start}
        report = {
            **self.report,
            "seconds": seconds,
            "plan": summary(plan, self.sizes)
            | {"gap": plan.gap, "policy": plan.policy, "temperature": plan.temperature}
            | ({} if plan.predicted is None else {"predicted_nats": dict(plan.predicted)}),
            **({"held_out_check": self.checked} if self.checked else {}),
            **({"original_config": self.source.config.to_json()} if self.definition.stock else {}),
            "bytes": size,
            "layers": layer_report(factors, plan),
            "peak_rss_bytes": peak_rss(),
        }
        return Result(config, join_blocks(parts) if into is None else into, plan, report)

    def _shape(self, plan: Plan) -> tuple[ModelConfig, Sequence[int]]:
        """Returns the architecture of a plan's result, and the original numbers of its blocks."""
        config = self.source.config
        if self.definition.stock:
            return reshaped(config, plan.ranks)
        return config, range(config.num_layers)

    def _part(
        self,
        name: str,
        plan: Plan,
        factors: Mapping[str, AnyFactors],
        kernels: Mapping[str, Mapping[str, Any]] | None,
        dtype: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Returns a part of the compressed model by its name, and its size in bytes."""
        config = self.source.config
        if name == REST:
            part: Any = dict(self.source.non_block_params())
        else:
            i, ranks = layer_index(name), plan.ranks
            block = self.source.block(i)
            part = replace_kernels(block, i, factors, ranks, self.method, config, kernels=kernels)
        if dtype is not None:
            part = jax.tree.map(lambda a: cast(a, dtype), part)
        if plan.factors is not None:
            part = quantize_pairs(part, normal_float.Format.parse(plan.factors))
        if name == REST:
            part, _ = self._tables(dtype).stored(part, plan.tables)
        own = {path: rank for path, rank in plan.ranks.items() if path.startswith(f"{name}/")}
        whole = part if name == REST else {name: part}
        verify(whole, dataclasses.replace(plan, ranks=own), self.sizes, config)
        return part, {"bytes": nbytes(part)}

    def _check(self, plan: Plan) -> None:
        """Raises ValueError unless the plan has a valid rank for every site and for no other."""
        wrong = [f"{p} is not a site of this method" for p in set(plan.ranks) - set(self.sizes)]
        wrong += [f"{path} is missing" for path in set(self.sizes) - set(plan.ranks)]
        for path in set(plan.ranks) & set(self.sizes):
            rank, size = plan.ranks[path], self.sizes[path]
            if rank is None or (rank == 0 and self.definition.stock):
                continue
            if not 1 <= rank < size.limit or rank % size.step:
                multiple = f" or no multiple of {size.step}" if size.step > 1 else ""
                wrong.append(
                    f"{path}: rank {rank} is not in [1, {size.limit:.0f}){multiple}; null keeps it "
                    "dense"
                )
        if wrong:
            raise ValueError("the plan does not fit the model: " + "; ".join(sorted(wrong)))
