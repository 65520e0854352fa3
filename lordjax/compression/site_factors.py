"""Factors of a site, and the block with its sites replaced by them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.allocation.plan import SiteSize
from lordjax.calibration.backward_pass import gradient_basis, site_gradients, site_total
from lordjax.calibration.forward_pass import activation_keys, statistic_width
from lordjax.calibration.observers import empty
from lordjax.kernels import trees
from lordjax.methods import METHODS, Factors, Method, Module, ModuleFactors, method_at, truncate
from lordjax.models.config import ModelConfig
from lordjax.models.head_axes import gather, scatter, widen
from lordjax.models.sites import Site, counted_sites, site_path, sites_for
from lordjax.models.source import Source
from lordjax.runtime import flops, target
from lordjax.storage.store import Store, get_or_compute

AnyFactors = Factors | ModuleFactors


@functools.cache
def factor_program(method: str, kind: str) -> Any:
    """Returns a method's jitted ``factor`` for a kind of site; call it with 64 bits enabled."""
    definition = METHODS[method]
    factor: Any = definition.factor if kind == "linear" else definition.modules[kind].factor

    def run(kernels: Any, stats: Any) -> AnyFactors:
        # Converted inside the program, so that arrays the factor does not read are never converted.
        factors = factor(*_cast(jnp.float64, (kernels, stats)))
        small = _cast(jnp.float32, factors)
        return dataclasses.replace(small, spectrum=factors.spectrum)

    return jax.jit(run)


@functools.cache
def errors_program(method: str, kind: str) -> Any:
    """Returns a jitted function ``(kernels, stats, other stats) -> errors at every rank``.

    It factors with the statistics of some tokens, in float32, and computes the errors by those of
    other tokens. None if the method cannot.
    """
    definition = METHODS[method]
    functions: Any = definition if kind == "linear" else definition.modules[kind]
    if functions.errors is None:
        return None

    def run(kernels: Any, stats: Any, others: Any) -> Any:
        kernels, stats, others = _cast(jnp.float32, (kernels, stats, others))
        return functions.errors(kernels, functions.factor(kernels, stats), others)

    return jax.jit(run)


def held_out_errors(
    method: str, site: Site, kernels: Any, folds: Sequence[Mapping[str, Any]], *, meshed: bool
) -> Any:
    """Returns the errors of a site at every rank on unseen tokens, by cross-fitting; or None.

    Each fold is judged by factors of the other one. These have seen half of the tokens, so that the
    errors are rather too large.

    Args:
      method: a key of `METHODS`.
      site: the site inside its block.
      kernels: kernel ``[in, out]``, or a module's arrays.
      folds: statistics of each fold.
      meshed: see `launch_factorization`.

    Returns:
      ``[m + 1]`` errors; None if there is one fold, or the method's errors are not those of data.
    """
    if len(folds) < 2:
        return None
    pairs = ((folds[0], folds[1]), (folds[1], folds[0]))
    module = None if meshed else on_host(method, site.kind)
    if module is not None and module.host is not None and module.host_errors is not None:
        found = 0.0
        for stats, others in pairs:
            factors = module.host(kernels, dict(stats), dtype=np.float32)
            found += module.host_errors(kernels, factors, dict(others)) / len(pairs)
            del factors
        return found
    name = method_at(method, site.layer) if site.kind == "linear" else method
    program = errors_program(name, site.kind)
    found = [program(kernels, *pair) for pair in pairs] if program else []
    return sum(found) / len(pairs) if found else None


def on_host(method: str, kind: str) -> Module | None:
    """Returns the module of a kind of site if it is factored on the host (CPU only), else None."""
    module = METHODS[method].modules.get(kind)
    if module is None or module.host is None or target.platform() != "cpu":
        return None
    return module


def factor_site(method: str, site: Site, path: str, kernels: Any, stats: Any) -> AnyFactors:
    """Factors one site in float64; returns float32 arrays on the host.

    Statistics are float32 sums. An eigendecomposition loses half of their digits again, so it runs
    in double precision. Columns from break-even on are dropped: no plan uses those ranks.

    Args:
      method: a key of `METHODS`.
      site: the site inside its block.
      path: path of the site in the model, for messages.
      kernels: kernel ``[in, out]``, or a module's arrays (`head_axes.gather`).
      stats: statistics that the method reads.

    Raises:
      ValueError: if a factor is not finite; names the site.
    """
    return collect_factors(
        method,
        path,
        kernels,
        launch_factorization(method, site, kernels, [dict(stats)], meshed=False),
    )


def launch_factorization(
    method: str, site: Site, kernels: Any, folds: list[dict[str, Any]], *, meshed: bool
) -> AnyFactors:
    """Starts the factorization of a site on a device; ``folds`` is emptied.

    With a mesh (``meshed``) nothing is factored on the host: every process predicts from shapes
    what the devices of the others do.

    Args:
      method: a key of `METHODS`.
      site: the site inside its block.
      kernels: kernel ``[in, out]``, or a module's arrays.
      folds: statistics of each fold; with two folds errors are cross-fitted (`held_out_errors`).
      meshed: whether a mesh factors the sites.
    """
    errors = held_out_errors(method, site, kernels, folds, meshed=meshed)
    stats = site_total(folds)
    folds.clear()
    module = None if meshed else on_host(method, site.kind)
    if module is not None and module.host is not None:
        factors = module.host(kernels, stats)
    else:
        name = method_at(method, site.layer) if site.kind == "linear" else method
        with jax.enable_x64(True):
            factors = factor_program(name, site.kind)(kernels, stats)
    return dataclasses.replace(factors, held_out=errors)


def collect_factors(method: str, path: str, kernels: Any, running: AnyFactors) -> AnyFactors:
    """Waits for the factors of `launch_factorization`; errors as for `factor_site`."""
    small = jax.tree.map(np.asarray, running)
    if not all(np.isfinite(a).all() for a in jax.tree.leaves(small)):
        raise ValueError(
            f"{path}: the factors of method {method!r} are not finite, because the weights or the "
            "statistics of this site are broken; use more calibration tokens or another method"
        )
    if isinstance(small, ModuleFactors):
        return small
    useful = int(np.ceil(SiteSize.matrix(*kernels.shape).limit))
    return dataclasses.replace(
        small,
        left=np.ascontiguousarray(small.left[:, :useful]),
        right=np.ascontiguousarray(small.right[:useful]),
        mean_in=None if small.mean_in is None else small.mean_in[:useful],
    )


def _cast(dtype: Any, tree: Any) -> Any:
    return jax.tree.map(
        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
    )


def site_kernels(site: Site, block: Mapping[str, Any], config: Any) -> Any:
    """Returns the kernel of a linear site, or a module's arrays in head form."""
    flat = trees.flatten(block)
    return flat[site.path] if site.kind == "linear" else gather(site.kind, flat, config)


def site_work(
    method: str, site: Site, kernels: Any, stats: Any, *, meshed: bool, folds: int = 1
) -> flops.OpCounts:
    """Counts the operations that factor one site.

    Args:
      method: a key of `METHODS`.
      site: the site inside its block.
      kernels: shapes of the kernels (`input_shapes`).
      stats: shapes of the statistics that the method reads.
      meshed: whether a mesh factors the sites; then nothing is factored on the host.
      folds: number of folds of the statistics; with two of them errors are cross-fitted.
    """
    leaves, tree = jax.tree.flatten((kernels, stats))
    return _site_work(method, site, meshed, folds, tree, tuple(leaves), flops.mode())


@functools.cache
def _site_work(
    method: str, site: Site, meshed: bool, folds: int, tree: Any, leaves: Any, _: Any
) -> flops.OpCounts:
    kernels, stats = jax.tree.unflatten(tree, leaves)
    module = None if meshed else on_host(method, site.kind)
    if module is not None and module.host_work is not None:
        return module.host_work(kernels, stats, folds=folds)
    name = method_at(method, site.layer) if site.kind == "linear" else method
    found: list[flops.OpCounts] = []
    if stats.get("basis") is not None:
        found.append(flops.count_ops(gradient_basis, kernels))
    with jax.enable_x64(True):
        found.append(flops.count_ops(factor_program(name, site.kind), kernels, stats))
    program = errors_program(name, site.kind) if folds > 1 else None
    if program is not None:
        found.append(flops.scaled(flops.count_ops(program, kernels, stats, stats), folds))
    return flops.merged(found)


def input_shapes(
    method: Method,
    site: Site,
    block: Mapping[str, Any],
    gradients: Mapping[str, Mapping[str, Any]],
    config: Any,
) -> tuple[Any, dict[str, Any]]:
    """Returns the shapes of the kernels and the statistics that `factor_site` reads.

    Args:
      method: the method.
      site: the site inside its block.
      block: parameters of the block, or their shapes.
      gradients: statistics of the block's backward pass, or their shapes.
      config: the architecture.
    """
    flat = trees.flatten(block)
    kernels = jax.eval_shape(lambda block: site_kernels(site, block, config), block)
    keys = activation_keys(block, (site,), method)[site.path]
    widths = {key: statistic_width(key, flat, config) for key in keys.values()}
    sums = jax.eval_shape(lambda: empty(widths))
    stats = {name: sums[key] for name, key in keys.items()}
    read = jax.eval_shape(lambda g, k: site_gradients([g], method, site, k), gradients, kernels)
    return kernels, stats | read[0]


def replace_kernels(
    block: Mapping[str, Any],
    i: int,
    factors: Mapping[str, AnyFactors],
    plan: Mapping[str, int | None],
    method: str,
    config: Any,
    *,
    padded: bool = False,
    kernels: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Returns block ``i`` with the planned sites replaced, on the host; the input is not changed.

    Args:
      block: parameters of the block.
      i: number of the block.
      factors: site path -> factors; planned sites without factors stay as they are.
      plan: site path -> rank; None: dense.
      method: method of the factors, a key of `METHODS`.
      config: the architecture.
      padded: whether arrays keep their original shapes: factor pairs are multiplied out, pruned
        modules are zero-padded. That computes the same function and shares compilations.
      kernels: path of a module -> arrays, by name, that were factored instead of the block's own.
    """
    modules = METHODS[method].modules
    before = trees.flatten(block)
    flat = dict(before)
    for site in sites_for(METHODS[method].kinds, config):
        path = site_path(i, site)
        rank = plan.get(path)
        if rank is None or path not in factors:
            continue
        found: Any = factors[path]
        if site.kind == "linear":
            flat |= _factored(site, flat, found, rank, padded=padded)
            continue
        own = gather(site.kind, before, config) | dict((kernels or {}).get(path, {}))
        new = modules[site.kind].prune(own, found, rank)
        new = widen(site.kind, new, own) if padded else new
        flat = scatter(site.kind, new, flat)
    return trees.unflatten(flat)


def _factored(
    site: Site, flat: Mapping[str, Any], factors: Any, rank: int, *, padded: bool
) -> dict[str, Any]:
    """Returns the new leaves of a linear site."""
    dtype = flat[site.path].dtype
    kernel, bias = truncate(factors, rank)
    # Views of the factors where the dtype allows: no second copy.
    new = kernel.materialize() if padded else kernel
    leaves = {site.path: jax.tree.map(lambda a: np.asarray(a, dtype), new)}
    if bias is not None:
        old = np.asarray(flat.get(f"{site.layer}/bias", 0), np.float32)
        leaves[f"{site.layer}/bias"] = np.asarray(bias + old, dtype)
    return leaves


def site_sizes(source: Source, method: str, store: Store | None = None) -> dict[str, SiteSize]:
    """Returns the size of every site in the original model, by site path."""
    sites = counted_sites(METHODS[method].kinds, source.config).values()

    def read() -> dict[str, dict[str, int]]:
        sizes = {}
        for i in range(source.config.num_layers):
            block = source.block(i)
            for site in sites:
                sizes[site_path(i, site)] = vars(site_size(site, block, source.config))
        return sizes

    found = read() if store is None else get_or_compute(store, "sizes", read)
    return {path: SiteSize(**size) for path, size in found.items()}


def site_size(site: Site, block: Mapping[str, Any], config: ModelConfig) -> SiteSize:
    """Returns the number of weights of a site of a block as a function of its rank."""
    flat = trees.flatten(block)
    shapes = [flat[path].shape for path in site.kernels if path in flat]
    if site.kind == "linear":
        return SiteSize.matrix(*shapes[0])
    dense = sum(fan_in * fan_out for fan_in, fan_out in shapes)
    if site.kind == "dense":
        return SiteSize(dense, dense)
    widths = {
        "mlp": flat["mlp/down/kernel"].shape[0],
        "qk": flat["attention/q/kernel"].shape[1] // config.num_heads,
        "vo": flat["attention/o/kernel"].shape[0] // config.num_heads,
        "heads": config.num_kv_heads,
    }
    moved = site.kind == "vo" and "attention/v/bias" in flat and "attention/o/bias" not in flat
    return SiteSize(
        dense,
        dense // widths[site.kind],
        bias=shapes[-1][1],
        moved=shapes[-1][1] if moved else 0,
        step=2 if site.kind == "qk" and config.rope is not None else 1,
        tiles={"mlp": 4, "heads": 0}.get(site.kind, 1),
    )
