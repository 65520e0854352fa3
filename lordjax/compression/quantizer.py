"""A model whose matrices are quantized, low rank or both (`candidates`), under one budget.

The error of a candidate is predicted: quantize, then fit the best low-rank term to the residual.
The chosen candidate is then found by alternation (`methods.quantized.lq`).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from lordjax.allocation.candidates import Candidate, Table, check_choice, choose
from lordjax.allocation.plan import Plan
from lordjax.calibration.backward_pass import site_gradients
from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import (
    activation_keys,
    block_statistics,
    needs_activations,
    on_device,
    resume_pass,
)
from lordjax.calibration.statistics import merged
from lordjax.compression.kept_pairs import KeptPairs
from lordjax.compression.measured.held_out import group_of
from lordjax.compression.measured.scale_search import searched_groups
from lordjax.compression.quantized_matrix import (
    Matrices,
    candidate_table,
    check_finite,
    dense_dtype,
    matrix_weights,
    planned_candidates,
    replaced_matrices,
    solved_together,
)
from lordjax.compression.result import Result
from lordjax.compression.whole_file.budget import chosen_in_file, formats_of
from lordjax.compression.whole_file.tables import Tables
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import nbytes
from lordjax.kernels.convert import cast
from lordjax.methods.quantized.weightings import WEIGHTINGS, Weights, weighting_method
from lordjax.models.sites import LINEAR_SITES, Site, site_path
from lordjax.models.source import Source
from lordjax.names import layer, layer_index
from lordjax.runtime.progress import Clock, Progress, peak_rss
from lordjax.storage.shards import REST, join_blocks, open_shards, write_shard_once
from lordjax.storage.store import MemoryStore, Store, digest


@dataclasses.dataclass
class Quantizer:
    """A model with predicted errors of all candidates, ready to be quantized to any budget.

    Attributes:
      source: the original model.
      calibration: tokens; None for ``weighting="none"``.
      method: a key of `QUANTIZERS`.
      weighting: weighting of errors, a key of `WEIGHTINGS`.
      formats: quantization formats that a budget may choose from.
      rank: rank of all low-rank terms, where the solver does not choose it.
      factors: format of the low-rank factors; None: they are arrays of ``dtype``.
      dtype: dtype of everything that is not quantized; None: float16 for block matrices, and all
        other parameters as they are.
      steps: number of alternations between quantized weights and low-rank term.
      feedback: whether later weights compensate for the errors of earlier ones (GPTQ).
      embeddings: format of embeddings and head (`kernels.table.parse`); None: they stay as they
        are, unless a budget of bytes of the files chooses their formats.
      pairs: low-rank pairs of a model that was compressed before; they are no sites.
      gradients: layer -> gradient statistics of each fold.
      shapes: site path -> ``(in, out)``.
      others: path -> shape and dtype of the parameters that are neither sites nor tables.
      report: entries of the report that are known so far.
      store: where finished work is kept.
      progress: called with (stage, done, total).
    """

    source: Source
    calibration: Calibration | None
    method: str
    weighting: str
    formats: Sequence[normal_float.Format]
    rank: int | None
    factors: normal_float.Format | None
    dtype: Any | None
    steps: int
    feedback: bool
    embeddings: str | None
    pairs: KeptPairs
    gradients: Mapping[int, Sequence[Mapping[str, Mapping[str, Any]]]]
    shapes: dict[str, tuple[int, int]]
    others: dict[str, Any]
    report: dict[str, Any]
    store: Store
    progress: Progress | None = None

    @functools.cached_property
    def count(self) -> int:
        """Number of block weights of the original model."""
        return sum(fan_in * fan_out for fan_in, fan_out in self.shapes.values())

    @functools.cached_property
    def outer(self) -> Tables:
        """The matrices outside the blocks."""
        tokens = self.calibration if WEIGHTINGS[self.weighting] else None
        kept = self.store, self.report["seconds"], self.progress, self.feedback
        return Tables(self.source, tokens, self.dtype, *kept)

    @functools.cached_property
    def searches(self) -> frozenset[str]:
        """Groups of sites whose scales are searched; the first access may run over the model."""
        return searched_groups(self)

    @functools.cached_property
    def tables(self) -> dict[str, Table]:
        """Site path -> table of candidates; the first access runs over the model."""
        clock, layers = Clock(self.progress), range(self.source.config.num_layers)
        forms = list(map(str, (*self.formats, self.factors)))
        name = f"tables-{digest(self.method, forms, self.rank, str(dense_dtype(self.dtype)))}"
        store = self.store if self.store.durable else MemoryStore()

        def done(i: int) -> bool:
            return f"{name}/{i}" in store

        for i, sites, matrix in self.walk(clock, "predictions", done):
            store[f"{name}/{i}"] = {
                site_path(i, site): candidate_table(
                    self.method, self.rank, self.formats, *matrix(site), self.dtype, self.factors
                ).rows()
                for site in sites
            }
        self.report["seconds"] |= clock.seconds
        found = (store[f"{name}/{i}"] for i in layers)
        return {path: Table.parse(rows) for block in found for path, rows in block.items()}

    def plan(
        self,
        *,
        bits: float | None = None,
        budget_bytes: int | None = None,
        file_bytes: int | None = None,
        solver: str = "bisection",
    ) -> Plan:
        """Chooses a candidate for every matrix: least predicted error within the budget.

        Args:
          bits: average bits per block weight; `QuantizationMethod.counts_low_rank` says whether
            low-rank terms count.
          budget_bytes: the same budget as bytes of all block kernels together.
          file_bytes: bytes of all files with weights. Tables get a format within it, unless
            ``embeddings`` is given.
          solver: a key of `knapsack.SOLVERS`.

        Returns:
          Format and rank of every matrix.

        Raises:
          KeyError: if the solver is unknown.
          ValueError: if not exactly one budget is given, or it cannot be met.
        """
        check_choice(solver, bits=bits, budget_bytes=budget_bytes, file_bytes=file_bytes)
        if file_bytes is not None:
            chosen, gap = chosen_in_file(self, file_bytes, solver)
            plan = self._plan({path: chosen[path] for path in self.shapes}, solver, gap, None)
            return dataclasses.replace(plan, tables=formats_of(chosen), file_bytes=file_bytes)
        budget = float(budget_bytes or 0) if bits is None else bits * self.count / 8
        chosen, gap = choose(self.tables, budget, self.count, self.method, solver)
        return self._plan(chosen, solver, gap, 8 * budget / self.count)

    def uniform(self, form: normal_float.Format | None, rank: int | None = None) -> Plan:
        """Returns the plan that stores all matrices alike.

        Args:
          form: quantization format of all matrices; None: they are not quantized.
          rank: rank of all low-rank terms; None: there are none.
        """
        return self._plan(dict.fromkeys(self.shapes, Candidate(form, rank)), "uniform", None, None)

    def compress(self, *, into: Any = None, **budget: Any) -> Result:
        """Quantizes to one budget.

        Args:
          into: where finished parts of the model go; see `apply`.
          **budget: keyword arguments of `plan`.

        Returns:
          The quantized model, its plan and its report.

        Raises:
          KeyError: see `plan`.
          ValueError: see `plan` and `apply`.
        """
        return self.apply(self.plan(**budget), into=into)

    def apply(self, plan: Plan, *, into: Any = None) -> Result:
        """Builds the model of a plan that `plan` made or a person edited.

        Args:
          plan: rank and format of every matrix.
          into: where finished parts of the model go; see `Prepared.apply`.

        Returns:
          The quantized model, its plan and its report.

        Raises:
          ValueError: if the plan does not fit the model, or a number is not finite.
        """
        self.outer.collect_for(plan.tables)
        searches, start = self.searches, time.perf_counter()
        candidates = planned_candidates(plan, self.shapes)
        factors = None if plan.factors is None else normal_float.Format.parse(plan.factors)
        if factors != self.factors:  # an edited plan
            return dataclasses.replace(self, factors=factors).apply(plan, into=into)
        width = max((c.rank for c in candidates.values() if c.rank is not None), default=1)
        clock, parts = Clock(self.progress), open_shards(into, self.store, plan)
        abouts = [write_shard_once(parts, self.store, REST, lambda _: self._rest(plan.tables))]

        def done(i: int) -> bool:
            return layer(i) in parts

        for i, sites, matrix in self.walk(clock, "decomposition", done, searches):
            chosen = {site: candidates[site_path(i, site)] for site in sites}
            make = functools.partial(self._block, chosen, matrix, width)
            write_shard_once(parts, self.store, layer(i), make)
        abouts += [self.store[f"about/{layer(i)}"] for i in range(self.source.config.num_layers)]
        seconds = {**self.report["seconds"], **clock.seconds, "apply": time.perf_counter() - start}
        report = {
            **self.report,
            "seconds": seconds,
            "plan": {
                "bits_per_weight": 8 * sum(about["matrices"] for about in abouts) / self.count,
                "gap": plan.gap,
                "policy": plan.policy,
            },
            "bytes": sum(about["bytes"] for about in abouts),
            "layers": {path: row for about in abouts for path, row in about["layers"].items()},
            "tables": abouts[0]["tables"],
            "peak_rss_bytes": peak_rss(),
        }
        params = join_blocks(parts) if into is None else into
        return Result(self.source.config, params, plan, report)

    def _rest(self, tables: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
        """Returns the parameters outside the blocks as they are stored, and their report."""
        part, layers = self.outer.stored(self._stored(self.source.non_block_params()), tables)
        check_finite(part, layers)
        return part, {"bytes": nbytes(part), "matrices": 0, "layers": {}, "tables": layers}

    def _block(
        self, chosen: Mapping[Site, Candidate], matrix: Matrices, width: int, name: str
    ) -> tuple[Any, dict[str, Any]]:
        """Returns a block with its matrices stored as planned, and its report."""
        i = layer_index(name)
        flat = dict(trees.flatten(self._stored(self.source.block(i))))
        if len(chosen) < len({site.path for site in LINEAR_SITES} & flat.keys()):
            flat |= self.pairs.stored(i)  # some matrices are no sites
        layers, size = {}, 0
        for sites in solved_together(chosen, {site: flat[site.path].shape for site in chosen}):
            candidates = {site: chosen[site] for site in sites}
            made = replaced_matrices(
                candidates, matrix, self.dtype, self.factors, width=width, steps=self.steps
            )
            for site, (new, report) in made.items():
                layers[site_path(i, site)], flat[site.path] = report, new
                size += nbytes(new)
        part = trees.unflatten(flat)
        check_finite({name: part}, layers)
        return part, {"bytes": nbytes(part), "matrices": size, "layers": layers}

    def walk(
        self, clock: Clock, stage: str, done: Callable[[int], bool], searches: Any = None
    ) -> Iterator[tuple[int, tuple[Site, ...], Matrices]]:
        """Yields each block's number, its sites, and a function ``site -> (kernel, weights)``.

        Args:
          clock: reports progress.
          stage: name of the stage.
          done: function ``block number -> whether the block is finished``. Finished blocks at the
            start are left out.
          searches: groups of sites whose scales are searched; None: as measured.
        """
        config, method = self.source.config, weighting_method(self.weighting)
        searches = self.searches if searches is None else searches
        reads = self.calibration if needs_activations(method) else None
        states, layers = resume_pass(self.store, stage, self.source, reads, done)
        for i in clock.run(stage, layers, layers.start):
            block = self.source.block(i)
            flat = trees.flatten(block)
            sites = tuple(site for site in LINEAR_SITES if site_path(i, site) in self.shapes)
            folds = [{}] * (self.calibration.num_folds if self.calibration else 1)
            keys = activation_keys(block, sites, method)
            if states is not None and self.calibration is not None:
                given = on_device(block), i, states, self.calibration, sites, keys, config
                folds = block_statistics(*given)
                del given
            own = {
                s: [{name: stats[key] for name, key in keys[s.path].items()} for stats in folds]
                for s in sites
            }
            yield i, sites, functools.partial(self._matrix, i, flat, own, searches)
            if states is not None:
                states.commit(i + 1)
        if states is not None:
            states.close()

    def _matrix(
        self, i: int, flat: Mapping[str, Any], folds: Mapping[Site, Any], searches: Any, site: Site
    ) -> tuple[Any, Weights]:
        """Returns a kernel as float32 on the device, and the weights of its errors.

        They are read on demand, so that one matrix of a block is in memory at a time.
        """
        kernel, method = on_device(flat[site.path]), weighting_method(self.weighting)
        gradients = self.gradients.get(i) or [{}] * len(folds[site])
        gradients = site_gradients(gradients, method, site, kernel)
        stats = merged([{**own, **read} for own, read in zip(folds[site], gradients, strict=True)])
        how = {"feedback": self.feedback, "searches": group_of(site_path(i, site)) in searches}
        return kernel, matrix_weights(kernel, stats, **how)

    def _stored(self, tree: Any) -> dict[str, Any]:
        """Returns parameters that are not quantized, in the dtype in which they are stored."""
        if self.dtype is None:
            return dict(tree)
        return jax.tree.map(lambda a: cast(a, self.dtype), dict(tree))

    def _plan(
        self,
        chosen: Mapping[str, Candidate],
        policy: str,
        gap: float | None,
        bits: float | None,
    ) -> Plan:
        """Returns the plan that stores every site as its candidate."""
        return Plan(
            method=self.method,
            ranks={path: candidate.rank for path, candidate in chosen.items()},
            keep=None,
            policy=policy,
            gap=gap,
            formats={path: str(c.form) for path, c in chosen.items() if c.form is not None},
            factors=None if self.factors is None else str(self.factors),
            bits=bits,
            tables=self.outer.all_in(self.embeddings),
        )
