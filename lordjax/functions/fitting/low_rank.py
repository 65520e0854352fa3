"""The sites and MLPs of a function with their factors for all ranks, and how a budget is cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from lordjax.allocation.curves import Curve
from lordjax.allocation.measured_errors import Correction, Place, check, predicted_loss
from lordjax.allocation.plan import Plan
from lordjax.allocation.policies import CURVELESS, TILE, allocate, check_policy
from lordjax.functions.fitting.linear import Fitted, fit_linear, linear_leaves
from lordjax.functions.fitting.mlp import fit_mlp, mlp_leaves
from lordjax.functions.held_out import Comparison
from lordjax.functions.placing import placed_like
from lordjax.functions.sites import FunctionModule, FunctionSite, Sites
from lordjax.functions.statistics import Fold
from lordjax.kernels.base import materialize
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
        self.bytes = sum(leaves[path].nbytes for path in chosen)
        self.checked: list[dict[str, Any]] = []
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

    @property
    def places(self) -> dict[str, Place]:
        """Name -> where a site or an MLP is in the function."""
        return places_of(self.fitted, self.modules, self.table)

    def curves(self, *, in_sample: bool = False) -> dict[str, Curve]:
        """Returns the predicted errors at every rank, by name; see `Prepared.curves`.

        Args:
          in_sample: whether to return the errors on the data that the factors are fitted to.
        """
        correction, found = Correction(self.checked, self.places), {}
        for name, each in self.fitted.items():
            fitted, unseen = each.errors
            errors = fitted if in_sample else correction.errors(name, fitted, unseen)
            if not METHODS[self.method].in_nats and errors[0] > 0:
                errors = errors / errors[0]
            found[name] = Curve(each.size, errors, each.extra)
        return found

    def plan(self, keep: float, allocation: str | None = None) -> Plan:
        """Allocates ranks within a budget.

        Raises:
          KeyError: if the policy is unknown.
          ValueError: if the policy needs names of blocks, or the budget cannot be met.
        """
        policy = allocation or METHODS[self.method].allocation
        check_policy(policy)
        if policy not in NAMELESS:
            raise ValueError(
                f"policy {policy!r} knows blocks by their numbers, which a function's parameters "
                f"do not have; use {', '.join(NAMELESS)}"
            )
        ranks, gap = allocate(self.curves(), keep, policy, TILE)
        in_nats = METHODS[self.method].in_nats
        loss = predicted_loss(self, ranks) if in_nats else None
        return Plan(self.method, ranks, keep, policy, gap, predicted=loss)

    def check(
        self,
        comparison: Comparison,
        tree: Callable[[Mapping[str, Any]], Any],
        allocation: str | None,
    ) -> None:
        """Measures predicted losses on held-out batches; they correct errors from then on.

        Args:
          comparison: compares the losses of parameters.
          tree: function ``new leaves -> parameters``.
          allocation: the policy; None: the method's own.
        """
        method = METHODS[self.method]
        reads = method.in_nats and (allocation or method.allocation) not in CURVELESS
        if not reads or not comparison.enough:
            return

        def added(ranks: Mapping[str, int]) -> float:
            new = {
                path: placed_like(materialize(leaf), self.leaves[path])
                for path, leaf in self._new(ranks).items()
            }
            return comparison.added(tree(new))

        check(self, lambda variants: [added(ranks) for ranks in variants])

    def apply(self, plan: Plan) -> dict[str, Any]:
        """Returns the new leaves of a plan, by path.

        Raises:
          ValueError: if the plan does not fit the sites.
        """
        self._check(plan)
        return self._new(plan.ranks)

    def _new(self, ranks: Mapping[str, int | None]) -> dict[str, Any]:
        """Returns the new leaves of ranks, by path; None: dense."""
        new: dict[str, Any] = {}
        for path, rank in ranks.items():
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


def places_of(
    names: Collection[str], modules: Mapping[str, FunctionModule], table: Sites
) -> dict[str, Place]:
    """Returns where sites and MLPs are in a function.

    Names that differ in their numbers only are of one kind. A block ends where a kind comes again,
    in the order of the program.

    Args:
      names: paths of sites, and names of MLPs.
      modules: name -> MLP.
      table: the sites.
    """
    order = {path: i for i, path in enumerate(table)}
    mlps = {path for module in table.modules for path in (*module.ups, module.down)}

    def first(name: str) -> int:
        return min(order[path] for path in (modules[name].ups if name in modules else [name]))

    found: dict[str, Place] = {}
    block, seen = 0, set()
    for name in sorted(names, key=first):
        kind = re.sub(r"\d+", "#", name)
        if kind in seen:
            block, seen = block + 1, set()
        seen.add(kind)
        group = "mlp" if name in modules or name in mlps else "linear"
        found[name] = Place(block, group, kind)
    return found
