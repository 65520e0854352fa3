"""A model's matrices as codes, products or both (`options`), chosen under one budget.

What an option loses is predicted from its own codes and the best product for what they miss; the
chosen one is then found by alternation (`methods.low_rank_quantized`).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lordjax import names
from lordjax.allocation.candidates import QUANTIZERS, Candidate, Table, candidate_bytes, ranks_tried
from lordjax.allocation.knapsack import SOLVERS
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
from lordjax.compression.quantized_matrix import (
    Matrices,
    best_pair,
    check_finite,
    encode_kernel,
    jitted_cost,
    layer_summary,
    pack,
    quantize_with_feedback,
    stage_groups,
)
from lordjax.compression.result import Result
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import nbytes
from lordjax.kernels.convert import cast, quantize_pair
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized
from lordjax.methods.quantized.best_product import FIRST_POWERS, start_basis
from lordjax.methods.quantized.lq import decompose_all
from lordjax.methods.quantized.predicted_loss import predict
from lordjax.methods.quantized.weightings import Weights, weighting_method
from lordjax.models.sites import LINEAR_SITES, Site, site_path
from lordjax.models.source import Source
from lordjax.names import layer_index
from lordjax.runtime.progress import Clock, Progress, peak_rss
from lordjax.storage.shards import REST, join_blocks, open_shards, write_shard_once
from lordjax.storage.store import MemoryStore, Store, digest


@dataclasses.dataclass
class Quantizer:
    """A model, and what every choice for its matrices would cost.

    Attributes:
      source: the untouched model.
      calibration: tokens; None for ``weighting="none"``.
      method: a key of `QUANTIZERS`.
      weighting: a key of `WEIGHTINGS`.
      formats: of codes that a budget may choose from.
      rank: of all products, where the solver does not choose it.
      factors: format of the products' factors; None: ``dtype``.
      dtype: of everything that is no code; None: float16 for the blocks' matrices, the rest as
        it is.
      steps: alternations.
      feedback: whether codes make up for each other's errors.
      gradients: layer -> gradient statistics.
      shapes: site path -> ``(in, out)``.
      report: what is known so far.
      store: where finished work is kept.
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
    gradients: Mapping[int, Mapping[str, Mapping[str, Any]]]
    shapes: dict[str, tuple[int, int]]
    report: dict[str, Any]
    store: Store
    progress: Progress | None = None

    @property
    def _dense(self) -> Any:
        """The dtype of blocks' matrices and factors that are no codes."""
        return jnp.dtype(self.dtype or "float16")

    @functools.cached_property
    def count(self) -> int:
        """Block weights of the untouched model."""
        return sum(fan_in * fan_out for fan_in, fan_out in self.shapes.values())

    @functools.cached_property
    def tables(self) -> dict[str, Table]:
        """Site path -> its options; walks the model when first asked for."""
        clock, layers = Clock(self.progress), range(self.source.config.num_layers)
        forms = [str(form) for form in (*self.formats, self.factors)]
        name = f"tables-{digest(self.method, forms, self.rank, str(self._dense))}"
        store = self.store if self.store.durable else MemoryStore()

        def done(i: int) -> bool:
            return f"{name}/{i}" in store

        for i, sites, matrix in self.walk(clock, "predictions", done):
            tables = {site_path(i, site): self._table(*matrix(site)).rows() for site in sites}
            store[f"{name}/{i}"] = tables
        self.report["seconds"] |= clock.seconds
        rows = [item for i in layers for item in store[f"{name}/{i}"].items()]
        return {path: Table.parse(found) for path, found in rows}

    def plan(
        self,
        *,
        bits: float | None = None,
        budget_bytes: int | None = None,
        solver: str = "bisection",
    ) -> Plan:
        """Chooses an option for every matrix: least predicted error within the budget.

        Args:
          bits: average per block weight that the options may take; see `Kind.all_in`.
          budget_bytes: the same as bytes of all block kernels together.
          solver: a key of `knapsack.SOLVERS`.

        Raises:
          KeyError: if the solver is unknown.
          ValueError: if not exactly one budget is given, or it cannot be met.
        """
        if bits is not None and budget_bytes is None:
            budget = bits * self.count / 8
        elif budget_bytes is not None and bits is None:
            budget = float(budget_bytes)
        else:
            raise ValueError(
                f"give exactly one of bits and budget_bytes, got {bits} and {budget_bytes}"
            )
        if solver not in SOLVERS:
            raise KeyError(f"no solver {solver!r}; {names.did_you_mean(solver, SOLVERS)}")
        tables = self.tables.values()
        bad = [path for path, table in self.tables.items() if not np.isfinite(table.errors).all()]
        if bad:
            raise ValueError(f"predicted errors are not finite at {', '.join(bad)}")
        least = sum(table.sizes[0] for table in tables)
        if least > budget:
            raise ValueError(
                f"{8 * budget / self.count:.4g} bits per weight cannot be met: method "
                f"{self.method!r} needs at least {8 * least / self.count:.4g}; ask for more"
            )
        found = SOLVERS[solver]([t.sizes for t in tables], [t.errors for t in tables], budget)
        index = zip(self.tables.items(), found.index, strict=True)
        chosen = {path: table.options[i] for (path, table), i in index}
        return self._plan(chosen, solver, found.gap, 8 * budget / self.count)

    def uniform(self, form: normal_float.Format | None, rank: int | None = None) -> Plan:
        """The plan that gives all matrices the same option."""
        return self._plan(dict.fromkeys(self.shapes, Candidate(form, rank)), "uniform", None, None)

    def compress(self, *, into: Any = None, **budget: Any) -> Result:
        """A model of one budget; arguments and errors as for `plan` and `apply`."""
        return self.apply(self.plan(**budget), into=into)

    def apply(self, plan: Plan, *, into: Any = None) -> Result:
        """The model of a plan.

        Args:
          plan: ranks and formats.
          into: where finished parts of the model go; see `Prepared.apply`.

        Raises:
          ValueError: if the plan does not fit the model.
        """
        start = time.perf_counter()
        options = self._options(plan)
        factors = None if plan.factors is None else normal_float.Format.parse(plan.factors)
        if factors != self.factors:  # an edited plan
            return dataclasses.replace(self, factors=factors).apply(plan, into=into)
        width = max((o.rank for o in options.values() if o.rank is not None), default=1)
        clock, parts = Clock(self.progress), open_shards(into, self.store, plan)
        abouts = [write_shard_once(parts, self.store, REST, lambda _: self._rest())]

        def done(i: int) -> bool:
            return f"layer_{i}" in parts

        for i, sites, matrix in self.walk(clock, "decomposition", done):
            chosen = {site: options[site_path(i, site)] for site in sites}
            make = functools.partial(self._block, chosen, matrix, width)
            write_shard_once(parts, self.store, f"layer_{i}", make)
        abouts += [self.store[f"about/layer_{i}"] for i in range(self.source.config.num_layers)]
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
            "peak_rss_bytes": peak_rss(),
        }
        return Result(
            self.source.config, join_blocks(parts) if into is None else into, plan, report
        )

    def _rest(self) -> tuple[Any, dict[str, Any]]:
        """What is no block, as it is stored, and what to know of it."""
        part = self._stored(self.source.non_block_params())
        check_finite(part, {})
        return part, {"bytes": nbytes(part), "matrices": 0, "layers": {}}

    def _block(
        self, chosen: Mapping[Site, Candidate], matrix: Matrices, width: int, name: str
    ) -> tuple[Any, dict[str, Any]]:
        """A block with its matrices as their options say, and what to know of it."""
        i = layer_index(name)
        flat = dict(trees.flatten(self._stored(self.source.block(i))))
        layers, size = {}, 0
        for sites in stage_groups(chosen, {site: flat[site.path].shape for site in chosen}):
            found = self._kernels({site: chosen[site] for site in sites}, matrix, width)
            for site, (new, about) in found.items():
                layers[site_path(i, site)], flat[site.path] = about, new
                size += nbytes(new)
        part = trees.unflatten(flat)
        check_finite({name: part}, layers)
        return part, {"bytes": nbytes(part), "matrices": size, "layers": layers}

    def walk(
        self, clock: Clock, stage: str, done: Callable[[int], bool]
    ) -> Iterator[tuple[int, tuple[Site, ...], Matrices]]:
        """Number, sites, and what finds a site's kernel and what errors of it cost, per block.

        Blocks that are ``done`` are left out, up to the first that is not.
        """
        config = self.source.config
        row = weighting_method(self.weighting)
        reads = self.calibration if needs_activations(row) else None
        states, layers = resume_pass(self.store, stage, self.source, reads, done)
        for i in clock.run(stage, layers, layers.start):
            block = self.source.block(i)
            flat = trees.flatten(block)
            sites = tuple(site for site in LINEAR_SITES if site.path in flat)
            stats: dict[str, Any] = {}
            keys = activation_keys(block, sites, row)
            if states is not None and self.calibration is not None:
                given = on_device(block), i, states, self.calibration, sites, keys, config
                stats = block_statistics(*given)
                del given
            own = {s: {name: stats[key] for name, key in keys[s.path].items()} for s in sites}
            yield i, sites, functools.partial(self._matrix, i, flat, own)
            if states is not None:
                states.commit(i + 1)
        if states is not None:
            states.close()

    def _matrix(
        self, i: int, flat: Mapping[str, Any], stats: Mapping[Site, Mapping[str, Any]], site: Site
    ) -> tuple[Any, Weights]:
        """A kernel, float32 on the device, and what errors of it cost.

        Made when it is asked for, so that one of a block is in memory at a time; that goes for
        gradients, too, of which a work directory maps each array until it is let go.
        """
        kernel = on_device(flat[site.path])
        gradients, row = self.gradients.get(i, {}), weighting_method(self.weighting)
        cost = jitted_cost(kernel, {**stats[site], **site_gradients(gradients, row, site, kernel)})
        return kernel, cost._replace(
            feedback=quantize_with_feedback(cost.inputs)
        ) if self.feedback else cost

    def _table(self, kernel: Any, weights: Weights) -> Table:
        """What a matrix may become."""
        row, shape = QUANTIZERS[self.method], tuple(kernel.shape)
        ranks, alone = ranks_tried(self.method, self.rank, shape)
        errors = np.asarray(predict(kernel, weights, forms=tuple(self.formats), ranks=ranks), float)
        rows = [
            (Candidate(form, rank or None), errors[i, j])
            for i, form in enumerate(self.formats)
            for j, rank in enumerate(ranks)
            if form.bits < 8 or j == 0  # of 8 bits nothing is left to make up for
        ]
        if alone:
            errors = np.asarray(predict(kernel, weights, forms=(None,), ranks=alone), float)[0]
            rows += [(Candidate(None, r), e) for r, e in zip(alone, errors, strict=True)]
        if row.all_in:
            rows.append((Candidate(None, None), 0.0))
        return Table.of((self._size(option, shape), error, option) for option, error in rows)

    def _size(self, option: Candidate, shape: tuple[int, ...]) -> int:
        """Bytes that a budget counts."""
        products = QUANTIZERS[self.method].all_in
        return candidate_bytes(option, shape, self._dense.itemsize, self.factors, products=products)

    def _kernels(
        self, options: Mapping[Site, Candidate], matrix: Matrices, width: int
    ) -> dict[Site, tuple[Any, dict[str, Any]]]:
        """Matrices of one of `_groups` as their options say, on the host; what to know of them."""
        found = [matrix(site) for site in options]
        new = self._decomposed(list(options.values()), found, width)
        return {
            site: (kernel, layer_summary(*before, kernel, options[site]))
            for site, before, kernel in zip(options, found, new, strict=True)
        }

    def _decomposed(
        self, options: Sequence[Candidate], found: Sequence[tuple[Any, Weights]], width: int
    ) -> list[Any]:
        """The same matrices, from their kernels and what errors of them cost."""
        form = options[0].form
        if form is None or options[0].rank is None:
            return [self._simple(*found[0], options[0], width)]
        kernels, costs = zip(*found, strict=True)
        ranks = [option.rank or 0 for option in options]
        made = decompose_all(kernels, ranks, costs, form=form, width=width, steps=self.steps)
        new = []
        for kernel, rank, each in zip(kernels, ranks, made, strict=True):
            packed = jax.device_get(pack(each.codes, form=form))
            pair = self._pair(np.asarray(each.left)[:, :rank], np.asarray(each.right)[:rank])
            new.append(LowRankPlusQuantized(NFQuantized.of(packed, kernel.shape, form), pair))
        return new

    def _simple(self, kernel: Any, weights: Weights, option: Candidate, width: int) -> Any:
        """A matrix that needs no alternation."""
        if option.form is not None:
            packed = jax.device_get(encode_kernel(kernel, weights.feedback, form=option.form))
            return NFQuantized.of(packed, kernel.shape, option.form)
        if option.rank is None:
            return cast(kernel, self._dense)
        basis, rank = start_basis(kernel.shape, width), jnp.asarray(option.rank)
        found = best_pair(kernel, rank, weights, basis, width=width, powers=FIRST_POWERS)
        left, right = np.asarray(found.left), np.asarray(found.right)
        return self._pair(left[:, : option.rank], right[: option.rank])

    def _stored(self, tree: Any) -> dict[str, Any]:
        """Parameters that are no matrices of blocks, as they are stored."""
        if self.dtype is None:
            return dict(tree)
        return jax.tree.map(lambda a: cast(a, self.dtype), dict(tree))

    def _pair(self, left: Any, right: Any) -> LowRank:
        """A product as it is stored."""
        if self.factors is None:
            return LowRank(*(cast(a, self._dense) for a in (left, right)))
        return quantize_pair(LowRank(left, right), self.factors)

    def _plan(
        self,
        chosen: Mapping[str, Candidate],
        policy: str,
        gap: float | None,
        bits: float | None,
    ) -> Plan:
        return Plan(
            method=self.method,
            ranks={path: option.rank for path, option in chosen.items()},
            keep=None,
            policy=policy,
            gap=gap,
            formats={path: str(o.form) for path, o in chosen.items() if o.form is not None},
            factors=None if self.factors is None else str(self.factors),
            bits=bits,
        )

    def _options(self, plan: Plan) -> dict[str, Candidate]:
        """What a plan chose; raises ValueError if it does not fit the model."""
        named = {*plan.ranks, *plan.formats}
        wrong = [f"{path} is no matrix of the blocks" for path in named - self.shapes.keys()]
        wrong += [f"{path} is missing" for path in self.shapes.keys() - plan.ranks]
        for path, rank in plan.ranks.items():
            if path in self.shapes and rank is not None and not 1 <= rank < min(self.shapes[path]):
                wrong.append(f"{path}: rank {rank} is not in [1, {min(self.shapes[path])})")
        if wrong:
            raise ValueError("the plan does not fit the model: " + "; ".join(sorted(wrong)))
        forms = {path: normal_float.Format.parse(text) for path, text in plan.formats.items()}
        return {path: Candidate(forms.get(path), rank) for path, rank in plan.ranks.items()}
