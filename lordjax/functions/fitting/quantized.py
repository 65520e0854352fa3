"""Quantized sites of a function: candidates of every site under one budget, and their kernels."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lordjax.allocation.candidates import FORMATS, Candidate, Table, check_solver, choose
from lordjax.allocation.plan import Plan
from lordjax.calibration.statistics import merged
from lordjax.compression.quantized import check_rank, method_options
from lordjax.compression.quantized_matrix import (
    candidate_rows,
    check_finite,
    matrix_weights,
    replaced_matrices,
)
from lordjax.functions.fitting.linear import as_leaf, read, stacked
from lordjax.functions.sites import FunctionSite
from lordjax.functions.statistics import Fold, of_matrix, site_matrices
from lordjax.kernels import normal_float
from lordjax.methods.quantized.lq import STEPS
from lordjax.methods.quantized.weightings import WEIGHTINGS, Weights
from lordjax.models.sites import Site
from lordjax.names import did_you_mean


class Quantization:
    """The sites of a function, ready to be quantized to a budget.

    Args:
      method: a key of `QUANTIZERS`.
      rows: the sites.
      leaves: path -> parameter.
      folds: statistics; none for weighting ``none``.
      formats: formats that a budget may choose from.
      dtype: dtype of what is not quantized; None: float16. The function sees the parameter's own.
      **options: ``weighting``, ``rank``, ``factors`` and ``feedback``; see `lordjax.quantize`.
    """

    def __init__(
        self,
        method: str,
        rows: Sequence[FunctionSite],
        leaves: Mapping[str, Any],
        folds: Sequence[Fold],
        formats: Sequence[normal_float.Format] = FORMATS,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        names = ("weighting", "rank", "factors", "feedback")
        unknown = [name for name in options if name not in names]
        if unknown:
            known = (*names, "formats", "dtype", "solver")
            raise TypeError(f"no option {unknown[0]!r}; {did_you_mean(unknown[0], known)}")
        found = method_options(method, **{name: options.get(name) for name in names})
        self.method, self.rank, self.factors = method, found["rank"], found["factors"]
        self.weighting, self.feedback = found["weighting"], found["feedback"]
        self.rows = {row.path: row for row in rows}
        self.leaves, self.folds, self.formats, self.dtype = leaves, folds, tuple(formats), dtype
        check_rank(self.rank, {row.path: (row.fan_in, row.fan_out) for row in rows})

    @property
    def count(self) -> int:
        """Number of weights of all sites."""
        return sum(int(np.prod(row.stack)) * row.fan_in * row.fan_out for row in self.rows.values())

    def matrix(self, row: FunctionSite, index: int) -> tuple[Any, Weights]:
        """Returns one matrix of a site, and the weights of its errors."""
        kernel = site_matrices(row, self.leaves[row.path])[index].astype(jnp.float32)
        needs = WEIGHTINGS[self.weighting]
        if not needs:
            return kernel, matrix_weights(kernel, {}, feedback=self.feedback)
        own = [
            of_matrix(read(fold.get(row.path, {}), needs, row.path, self.method), row, index)
            for fold in self.folds or ({},)
        ]
        return kernel, matrix_weights(kernel, merged(own), feedback=self.feedback)

    @functools.cached_property
    def tables(self) -> dict[str, Table]:
        """Path -> candidates; those of a stack have the sum of its matrices' sizes and errors."""
        given = self.method, self.rank, self.formats
        tables = {}
        for path, row in self.rows.items():
            totals: dict[Candidate, tuple[int, float]] = {}
            for i in range(int(np.prod(row.stack))):
                for size, error, candidate in candidate_rows(
                    *given, *self.matrix(row, i), self.dtype, self.factors
                ):
                    before = totals.get(candidate, (0, 0.0))
                    totals[candidate] = before[0] + size, before[1] + float(error)
            tables[path] = Table.pareto((*total, each) for each, total in totals.items())
            if not np.isfinite(tables[path].errors).all():
                raise ValueError(f"{path}: predicted errors are not finite; check its weights")
        return tables

    def plan(self, budget: float, bits: float | None, solver: str) -> Plan:
        """Chooses a candidate for every site: least predicted error within a number of bytes.

        Raises:
          KeyError: if the solver is unknown.
          ValueError: if the budget cannot be met.
        """
        check_solver(solver)
        chosen, gap = choose(self.tables, budget, self.count, self.method, solver)
        return Plan(
            method=self.method,
            ranks={path: each.rank for path, each in chosen.items()},
            keep=None,
            policy=solver,
            gap=gap,
            formats={path: str(c.form) for path, c in chosen.items() if c.form is not None},
            factors=None if self.factors is None else str(self.factors),
            bits=bits,
        )

    def apply(self, plan: Plan) -> dict[str, Any]:
        """Returns the new leaves of a plan, by path.

        Raises:
          ValueError: if the plan does not fit the sites, or a number is not finite.
        """
        self._check(plan)
        forms = {path: normal_float.Format.parse(text) for path, text in plan.formats.items()}
        factors = None if plan.factors is None else normal_float.Format.parse(plan.factors)
        width = max((rank for rank in plan.ranks.values() if rank is not None), default=1)
        new = {}
        for path, row in self.rows.items():
            candidate, made = Candidate(forms.get(path), plan.ranks[path]), []
            site = Site(path, 0, "linear", (path,), "")
            for i in range(int(np.prod(row.stack))):
                found = replaced_matrices(
                    {site: candidate},
                    lambda site, i=i, row=row: self.matrix(row, i),
                    self.dtype,
                    factors,
                    width=width,
                    steps=STEPS,
                )
                matrix, report = found[site]
                check_finite({path: matrix}, {path: report})
                made.append(matrix)
            new[path] = as_leaf(row, stacked(made, row), self.leaves[path])
        return new

    def _check(self, plan: Plan) -> None:
        """Raises ValueError unless the plan has a valid rank for every site and for no other."""
        wrong = [f"{p} is no site" for p in {*plan.ranks, *plan.formats} - self.rows.keys()]
        wrong += [f"{path} is missing" for path in self.rows.keys() - plan.ranks]
        for path in self.rows.keys() & plan.ranks:
            rank, row = plan.ranks[path], self.rows[path]
            if rank is not None and not 1 <= rank < min(row.fan_in, row.fan_out):
                wrong.append(
                    f"{path}: rank {rank} is not in [1, {min(row.fan_in, row.fan_out)}); null "
                    "means no low-rank term"
                )
        if wrong:
            raise ValueError("the plan does not fit the sites: " + "; ".join(sorted(wrong)))
