"""The sites and MLPs of a function with their factors for all ranks, and how a budget is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lordjax.allocation.plan import Plan
from lordjax.allocation.policies import TILE, allocate, check_policy
from lordjax.functions.fitting.linear import Fitted, fit_linear, linear_leaves
from lordjax.functions.fitting.mlp import fit_mlp, mlp_leaves
from lordjax.functions.sites import FunctionSite, Sites
from lordjax.functions.statistics import Fold
from lordjax.methods import METHODS
from lordjax.runtime.progress import Progress

# Policies that read nothing of a site's name; the others know blocks by their numbers.
NAMELESS = ("uniform", "energy", "global")


class LowRankFit:
    """The sites and MLPs of a function with their factors for all ranks, by name."""

    def __init__(
        self,
        method: str,
        table: Sites,
        rows: Sequence[FunctionSite],
        leaves: Mapping[str, Any],
        folds: Sequence[Fold],
        progress: Progress | None,
    ) -> None:
        self.method, self.table, self.leaves = method, table, leaves
        chosen = {row.path for row in rows}
        modules = table.modules if "mlp" in METHODS[method].kinds else ()
        self.modules = {m.name: m for m in modules if {*m.ups, m.down} <= chosen}
        inside = {path for m in self.modules.values() for path in (*m.ups, m.down)}
        self.rows = {row.path: row for row in rows if row.path not in inside}
        self.weights = sum(leaves[path].nbytes for path in chosen)
        self.fitted: dict[str, Fitted] = {}
        names = [*self.modules, *self.rows]
        for done, name in enumerate(names, 1):
            if name in self.modules:
                found = fit_mlp(method, self.modules[name], table, leaves, folds)
            else:
                found = fit_linear(method, self.rows[name], leaves[name], folds)
            self.fitted[name] = found
            if progress is not None:
                progress("factors", done, len(names))

    def plan(self, keep: float | None, budget_bytes: int | None, allocation: str | None) -> Plan:
        """Allocates ranks within a budget."""
        policy = allocation or METHODS[self.method].allocation
        check_policy(policy)
        if policy not in NAMELESS:
            raise ValueError(
                f"policy {policy!r} knows blocks by their numbers, which a function's parameters "
                f"do not have; use {', '.join(NAMELESS)}"
            )
        if keep is None:
            keep = min(1.0, (budget_bytes or 0) / self.weights)
        in_nats = METHODS[self.method].in_nats
        curves = {path: each.curve(in_nats=in_nats) for path, each in self.fitted.items()}
        ranks, gap = allocate(curves, keep, policy, TILE)
        return Plan(self.method, ranks, keep, policy, gap, predicted=self._loss(ranks))

    def _loss(self, ranks: Mapping[str, int | None]) -> dict[str, float] | None:
        """Returns the predicted loss of ranks in nats, or None if errors are in other units."""
        if not METHODS[self.method].in_nats:
            return None
        chosen = {path: rank for path, rank in ranks.items() if rank is not None}
        return {
            name: sum(float(self.fitted[path].errors[i][rank]) for path, rank in chosen.items())
            for i, name in enumerate(("in_sample", "held_out"))
        }

    def apply(self, plan: Plan) -> dict[str, Any]:
        """Returns the new leaves of a plan, by path.

        Raises:
          ValueError: if the plan does not fit the sites.
        """
        self._check(plan)
        new: dict[str, Any] = {}
        for path, rank in plan.ranks.items():
            if rank is None:
                continue
            fitted = self.fitted[path]
            if path in self.modules:
                given = self.modules[path], self.table, rank, self.leaves
                new |= mlp_leaves(self.method, fitted, *given)
            else:
                new |= linear_leaves(fitted, self.rows[path], rank, self.leaves)
        return new

    def _check(self, plan: Plan) -> None:
        """Raises ValueError unless the plan has a valid rank for every site and for no other."""
        wrong = [f"{path} is no site" for path in plan.ranks.keys() - self.fitted]
        wrong += [f"{path} is missing" for path in self.fitted.keys() - plan.ranks]
        for path in self.fitted.keys() & plan.ranks:
            rank, size = plan.ranks[path], self.fitted[path].size
            if rank is not None and not 1 <= rank < size.limit:
                wrong.append(
                    f"{path}: rank {rank} is not in [1, {size.limit:.0f}); null keeps it dense"
                )
        if wrong:
            raise ValueError("the plan does not fit the sites: " + "; ".join(sorted(wrong)))
