"""`compress_params`: a parameter tree and statistics become a tree with kernels, and a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from lordjax.allocation.candidates import QUANTIZERS
from lordjax.allocation.plan import Plan
from lordjax.functions.equations.tracing import open_call
from lordjax.functions.fitting.low_rank import LowRankFit
from lordjax.functions.fitting.quantized import Quantization
from lordjax.functions.held_out import Comparison
from lordjax.functions.sites import FunctionSite, Sites
from lordjax.functions.statistics import Fold, Statistics
from lordjax.methods import DEFAULT_METHOD, METHODS, SHAPES, shape_of
from lordjax.names import did_you_mean
from lordjax.runtime.progress import Progress


def compress_params(
    params: Any,
    stats: Statistics | Sites,
    *,
    method: str = DEFAULT_METHOD,
    keep: float | None = None,
    bits: float | None = None,
    budget_bytes: int | None = None,
    plan: Plan | None = None,
    allocation: str | None = None,
    where: str | None = None,
    sites: Collection[str] | None = None,
    check: bool = True,
    progress: Progress | None = None,
    **quantization: Any,
) -> tuple[Any, Plan]:
    """Compresses a parameter tree within a budget, for a function of any kind.

    Only the chosen sites count for a budget; all other parameters stay as they are. A parameter
    that stacks matrices, of scanned layers or of experts, has one rank for all of them.

    Args:
      params: the parameters, a pytree of arrays.
      stats: what `collect` returned; what `find_sites` returned is enough for methods without data
        (``svd``, ``nf``, and ``lq`` with weighting ``none``).
      method: a key of `METHODS` that needs no attention module, or of `QUANTIZERS`.
      keep: fraction of the weights of all sites to keep, in (0, 1], for `METHODS`.
      bits: average bits per weight of all sites, for `QUANTIZERS`.
      budget_bytes: bytes of all sites together, instead of ``keep`` or ``bits``.
      plan: a plan that this function returned, or a person edited, instead of a budget.
      allocation: ``uniform``, ``energy`` or ``global``; None: the method's own.
      where: regular expression that is searched in the paths of the sites; None: all.
      sites: exact paths; see `collect`.
      check: whether losses in nats are measured on what `collect` held out, and predictions mended.
      progress: called with (stage, done, total).
      **quantization: options of `QUANTIZERS`: ``weighting``, ``rank``, ``formats``, ``factors``,
        ``feedback``, ``dtype`` and ``solver``, as for `lordjax.quantize`.

    Returns:
      A tree of the same structure in which leaves are kernels, for `compressed`; and the plan.

    Raises:
      KeyError: if the method, the policy or the solver is unknown, or no site matches.
      ValueError: if not exactly one budget or plan is given, a budget cannot be met, the statistics
        are those of another tree or lack what the method needs, or the plan does not fit.
    """
    method = method if plan is None else plan.method
    _check_method(method, quantization)
    _check_budget(method, keep, bits, budget_bytes, plan)
    given = _opened(params, stats, where, sites)
    if method in QUANTIZERS:
        new, plan = _quantized(method, given, bits, budget_bytes, plan, **quantization)
        return given.tree(new), plan
    run = LowRankFit(method, given.table, given.rows, given.leaves, given.folds, progress)
    if plan is None:
        if check and isinstance(stats, Statistics) and stats.held_out is not None:
            run.check(Comparison(stats.held_out, params), given.tree, allocation)
        whole = keep if keep is not None else (budget_bytes or 0) / run.bytes
        plan = run.plan(min(1.0, whole), allocation)
    return given.tree(run.apply(plan)), plan


def _check_method(method: str, options: Collection[str]) -> None:
    """Raises KeyError or ValueError unless a method works on any function and has the options."""
    if method not in METHODS and method not in QUANTIZERS:
        known = [*METHODS, *QUANTIZERS]
        raise KeyError(f"no method {method!r}; {did_you_mean(method, known)}")
    if method in QUANTIZERS:
        return
    if options:
        raise ValueError(
            f"method {method!r} does not quantize; leave out {', '.join(options)}, or use one of "
            f"{', '.join(QUANTIZERS)}"
        )
    others = METHODS[method].kinds - {"linear", "mlp"}
    shaped = shape_of(method) != SHAPES[0]
    if others or shaped or METHODS[method].prefix != "dense":
        why = "a model that is run block by block"
        why = "attention modules" if others else "the blocks of a model" if shaped else why
        raise ValueError(
            f"method {method!r} needs {why}, which the equations of a function do not show; use "
            "modegpt or lord"
        )


def _check_budget(method: str, keep: Any, bits: Any, budget_bytes: Any, plan: Plan | None) -> None:
    """Raises ValueError unless exactly one budget is given, and it is one of the method."""
    given = {"keep": keep, "bits": bits, "budget_bytes": budget_bytes, "plan": plan}
    found = [name for name, value in given.items() if value is not None]
    other = "keep" if method in QUANTIZERS else "bits"
    if len(found) != 1 or found == [other]:
        own = "bits" if method in QUANTIZERS else "keep"
        raise ValueError(
            f"method {method!r} takes exactly one of {own}, budget_bytes and plan, got "
            f"{', '.join(found) or 'none'}"
        )
    if bits is not None and not bits > 0:
        raise ValueError(f"bits must be positive, got {bits}")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")


class _Opened(NamedTuple):
    """Parameters and statistics of the chosen sites.

    Attributes:
      leaves: path -> parameter.
      tree: function ``new leaves by path -> parameters``.
      table: all sites.
      folds: the statistics.
      rows: the chosen sites.
    """

    leaves: dict[str, Any]
    tree: Callable[[Mapping[str, Any]], Any]
    table: Sites
    folds: Sequence[Fold]
    rows: list[FunctionSite]


def _opened(
    params: Any, stats: Statistics | Sites, where: str | None, sites: Collection[str] | None
) -> _Opened:
    """Returns the table, the statistics and the chosen sites.

    Raises:
      ValueError: if a site has no parameter of its shape, or not with the values that the
        statistics were taken with.
    """
    call = open_call(params, (), {}, kernels=False)
    leaves = dict(zip(call.paths, call.leaves, strict=True))
    folds: Sequence[Fold] = ()
    table = stats if isinstance(stats, Sites) else stats.sites
    if isinstance(stats, Statistics):
        stats.check(leaves)
        folds = stats.folds
        sites = list(folds[0]) if sites is None else sites
    rows = [table[path] for path in table.chosen(where, sites)]
    for row in rows:
        leaf = leaves.get(row.path)
        if leaf is None or tuple(leaf.shape) != row.shape:
            got = "nothing" if leaf is None else str(list(leaf.shape))
            raise ValueError(
                f"{row.path}: the table of sites is that of another tree; expected "
                f"{list(row.shape)}, got {got}"
            )

    def tree(new: Mapping[str, Any]) -> Any:
        return call.rebuild([new.get(path, leaf) for path, leaf in leaves.items()], ())[0][0]

    return _Opened(leaves, tree, table, folds, rows)


def _quantized(
    method: str,
    given: _Opened,
    bits: float | None,
    budget_bytes: int | None,
    plan: Plan | None,
    solver: str = "bisection",
    **options: Any,
) -> tuple[dict[str, Any], Plan]:
    """Returns the new leaves of a budget or a plan, and the plan."""
    run = Quantization(method, given.rows, given.leaves, given.folds, **options)
    if plan is None:
        budget = bits * run.count / 8 if bits is not None else float(budget_bytes or 0)
        plan = run.plan(budget, 8 * budget / run.count, solver)
    return run.apply(plan), plan
