"""`collect`: statistics of the inputs and gradients of a function's products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lordjax.allocation.candidates import QUANTIZERS
from lordjax.calibration.backward_pass import gradient_basis
from lordjax.functions.equations.tracing import Apply, Call, jitted_once, open_call, trace
from lordjax.functions.finding import sites_of
from lordjax.functions.held_out import MOST_HELD_OUT, HeldOut, Loss, held_out_count
from lordjax.functions.observing import Wanted, observe
from lordjax.functions.placing import statistic_shardings
from lordjax.functions.site_statistics import GRADIENTS, add, needs_of, statistics_of, zeros_of
from lordjax.functions.sites import Sites
from lordjax.functions.statistics import Fold, Statistics, checksums, inner_sites, site_matrices
from lordjax.methods import METHODS
from lordjax.names import did_you_mean
from lordjax.runtime.progress import Progress

FOLDS = 2


def collect(
    apply: Apply,
    params: Any,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    weights: Callable[..., Any] | None = None,
    method: str | Iterable[str] | None = None,
    where: str | None = None,
    sites: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Runs a function on batches and takes statistics of its products with parameters.

    The function's equations run as they are, in one jitted pass per batch; batches of one shape
    share a program. Sums are float32 at the highest matmul precision. Batches go to two folds in
    turn, so that errors can be judged on other data.

    Args:
      apply: function ``(params, *batch) -> outputs``.
      params: its parameters, a pytree of arrays.
      batches: what follows ``params`` in a call. A tuple is several arguments, anything else one.
        With a loss, the last one of 8 or more is held out, the last two of 32 or more, with which
        `compress_params` checks its predictions.
      loss: function ``(outputs, *batch) -> losses`` of the targets, 0 where there is none, of any
        shape. Their sum is differentiated by the outputs of all products, in one backward pass.
        A mean gives predicted errors in another unit than nats. None: no gradients.
      weights: function ``(*batch) -> one weight per token``, such as a mask; None: all count.
      method: the methods that will read the statistics; None: all but those that need Fisher
        information (``fwsvd``).
      where: regular expression that is searched in the paths of the sites; None: all.
      sites: exact paths of sites, also of parameters with other uses besides products. With
        several groups, ``collect(..., sites=a) | collect(..., sites=b)`` needs less memory.
      progress: called with (stage, done, total).

    Returns:
      The statistics of every chosen site, and the table of all parameters.

    Raises:
      KeyError: if no site matches, or a method is unknown.
      ValueError: if there is no batch, a method needs a loss, statistics are not finite (names the
        batch and the parameter), or the function has other products in a later batch.
    """
    methods = [method] if isinstance(method, str) else None if method is None else list(method)
    needs = _checked_needs(methods, loss)
    run: Collection | None = None
    last: list[tuple[Any, ...]] = []  # batches that may be held out
    count = 0
    for count, args in enumerate(_counted(batches, progress), 1):
        last.append(args)
        if run is None:
            run = Collection(apply, params, args, needs, loss, weights, where, sites)
        if count > MOST_HELD_OUT:
            run.add(last.pop(0))
    if run is None:
        raise ValueError("there is no batch; expected at least one")
    kept = held_out_count(count) if _may_check(methods, loss) else 0
    while len(last) > kept:
        run.add(last.pop(0))
    return run.statistics(last)


def _counted(batches: Iterable[Any], progress: Progress | None) -> Iterator[tuple[Any, ...]]:
    """Yields the arguments of every batch, and reports progress when it was used."""
    total = len(batches) if hasattr(batches, "__len__") else 0  # pyright: ignore
    for count, batch in enumerate(batches, 1):
        yield batch if isinstance(batch, tuple) else (batch,)
        if progress is not None:
            progress("statistics", count, max(total, count))


def _may_check(methods: Sequence[str] | None, loss: Loss | None) -> bool:
    """Returns whether some methods predict losses in nats, which can be checked."""
    if loss is None:
        return False
    return methods is None or any(m in METHODS and METHODS[m].in_nats for m in methods)


def _checked_needs(methods: Sequence[str] | None, loss: Loss | None) -> frozenset[str]:
    """Returns what methods need; raises KeyError or ValueError if that cannot be."""
    for name in methods or ():
        if name not in METHODS and name not in QUANTIZERS:
            raise KeyError(f"no method {name!r}; {did_you_mean(name, [*METHODS, *QUANTIZERS])}")
    needs = needs_of(methods, loss=loss is not None)
    lacking = sorted(needs & set(GRADIENTS))
    if lacking and loss is None:
        raise ValueError(
            f"{', '.join(methods or ())}: needs gradients ({', '.join(lacking)}); give a loss"
        )
    return needs


class Collection:
    """Statistics of a function, batch by batch.

    With shapes in place of parameters and batches, it still makes the program of a batch.

    Args:
      apply: the function.
      params: its parameters.
      args: the other arguments of the first batch.
      needs: names of what methods need.
      loss: see `collect`.
      weights: see `collect`.
      where: see `collect`.
      paths: ``sites`` of `collect`.
    """

    def __init__(
        self,
        apply: Apply,
        params: Any,
        args: tuple[Any, ...],
        needs: frozenset[str],
        loss: Loss | None = None,
        weights: Callable[..., Any] | None = None,
        where: str | None = None,
        paths: Iterable[str] | None = None,
    ) -> None:
        self.apply, self.params, self.loss, self.weights = apply, params, loss, weights
        call = open_call(params, args, {}, kernels=False)
        self.sites = sites_of(call, trace(apply, call))
        chosen = self.sites.chosen(where, None if paths is None else list(paths))
        inner = inner_sites(self.sites)
        self.wanted: Wanted = {
            path: statistics_of(self.sites[path], needs, inner=path in inner) for path in chosen
        }
        self.leaves = [leaf if _is_shape(leaf) else jnp.asarray(leaf) for leaf in call.leaves]
        self.values = dict(zip(call.paths, self.leaves, strict=True))
        self.bases = {
            path: basis
            for path in chosen
            if "gradients" in self.wanted[path] and path not in inner
            if (basis := self._basis(path)) is not None
        }
        zeros = jax.eval_shape(lambda: _zeros(self.sites, self.wanted))
        self.shardings = self._shardings(zeros)
        self.folds: list[Fold] = [self._placed(zeros) for _ in range(FOLDS)]
        self.finite: list[Any] = []
        self.unweighted: set[str] = set()
        self.programs: dict[Any, Callable[..., Any]] = {}

    def _shardings(self, zeros: Fold) -> dict[str, Any]:
        """Returns the shardings of the statistics of parameters that devices share, by path."""
        found = {}
        for path, own in zeros.items():
            row = self.sites[path]
            assert row.matrix is not None  # a site has one
            given = own, self.values[path], row.matrix, row.fan_in
            found[path] = statistic_shardings(*given)
        return {path: own for path, own in found.items() if own is not None}

    def _basis(self, path: str) -> Any:
        """Returns the coordinates of the gradients at a site's outputs, or None."""
        basis, leaf = functools.partial(stacked_basis, self.sites, path), self.values[path]
        return jax.eval_shape(basis, leaf) if _is_shape(leaf) else basis(leaf)

    def _placed(self, zeros: Fold) -> Fold:
        """Returns statistics of nothing on the devices of their parameters."""
        found = {}
        for path, own in zeros.items():
            new = own if _is_shape(self.values[path]) else jax.tree.map(jnp.zeros_like, own)
            shardings = self.shardings.get(path)
            if _is_shape(self.values[path]) and shardings is not None:
                new = jax.tree.map(_with_sharding, new, shardings)
            elif shardings is not None:
                new = jax.device_put(new, shardings)
            found[path] = new
        return found

    def add(self, args: tuple[Any, ...]) -> None:
        """Adds the statistics of one batch, given by the arguments that follow the parameters."""
        call = open_call(self.params, args, {}, kernels=False)
        program = self.program(call)
        fold = len(self.finite) % FOLDS
        given = self.leaves, call.inputs, self.bases
        self.folds[fold], finite = program(self.folds[fold], *given)
        self.finite.append(finite)

    def program(self, call: Call) -> Callable[..., Any]:
        """Returns the jitted function ``(fold, leaves, inputs, bases) -> fold, what is finite``."""

        def step(fold: Fold, leaves: Any, inputs: Any, bases: Any) -> Any:
            own = call._replace(leaves=leaves, inputs=inputs)
            given = own, self.apply, self.sites, self.wanted, bases, self.loss, self.weights
            _, frame, unweighted = observe(*given)
            self.unweighted |= unweighted
            missing = [path for path in self.wanted if self.wanted[path] and path not in frame]
            if missing:
                raise ValueError(
                    f"{missing[0]}: no product uses it in this batch, but in the first one; "
                    "expected the same products for all batches"
                )
            sums = {path: add(fold[path], frame.get(path, {})) for path in fold}
            for path, own in self.shardings.items():
                sums[path] = jax.lax.with_sharding_constraint(sums[path], own)
            return sums, {path: _is_finite(own) for path, own in frame.items() if own}

        return jitted_once(self.programs, call.key, step, donate_argnums=0)

    def statistics(self, last: Sequence[tuple[Any, ...]] = ()) -> Statistics:
        """Returns the statistics of all batches.

        Args:
          last: arguments of the batches that are held out.

        Raises:
          ValueError: if some are not finite.
        """
        for number, row in enumerate(jax.device_get(self.finite)):
            broken = [path for path, finite in row.items() if not finite]
            if broken:
                raise ValueError(
                    f"batch {number}: the statistics of {broken[0]} are not finite; check this "
                    "batch, its loss, and the parameters"
                )
        return Statistics(
            self.sites,
            tuple(self.folds[: min(FOLDS, len(self.finite))]),
            checksums({path: self.values[path] for path in self.wanted}),
            tuple(sorted(self.unweighted)),
            self.loss is not None,
            HeldOut(self.apply, self.loss, last) if self.loss is not None and last else None,
        )


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _with_sharding(a: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)


def _zeros(sites: Sites, wanted: Wanted) -> Fold:
    inner = inner_sites(sites)
    return {p: zeros_of(sites[p], names, inner=p in inner) for p, names in wanted.items()}


def _is_finite(statistics: Mapping[str, Any]) -> Any:
    return jnp.all(jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves(statistics)]))


def stacked_basis(sites: Sites, path: str, leaf: Any) -> Any:
    """Returns the coordinates of the gradients at a site's outputs, or None.

    Args:
      sites: the sites.
      path: path of the site.
      leaf: its parameter.

    Returns:
      ``[*stack, out, m]``; every matrix by itself, by the program that later reads them again.
    """
    row = sites[path]
    if row.fan_out <= row.fan_in:
        return None
    found = [gradient_basis(matrix) for matrix in site_matrices(row, leaf)]
    return jnp.stack(found).reshape(*row.stack, row.fan_out, -1)
