"""Block after block on the model compressed so far: ROM, and the corrective target.

Inside a block the layers are replaced in the order in which they run - q, k, v; o; gate, up;
down - and every group sees inputs made by the groups before it. Compressed kernels are
multiplied out, and narrow modules filled up with zeros, while they propagate, so that blocks have
the same shapes and share compilations (but for the biases that some methods add).

ROM fits ``W x̂ ≈ W' x̂`` on the compressed prefix' inputs x̂. The *corrective* target fits
``W x ≈ W' x̂`` with x from the untouched model: reduced-rank regression, in which the kernel to be
factored is first replaced by the least-squares map from x̂ to the untouched output
(theory/lord_rom §3.5).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.allocation.plan import Plan
from lordjax.calibration.backward_pass import site_gradients
from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import (
    activation_keys,
    block_statistics,
    on_device,
    start_pass,
)
from lordjax.calibration.hidden_states import Shifted
from lordjax.calibration.observers import observe_pair
from lordjax.calibration.statistics import Moments
from lordjax.compression.site_factors import AnyFactors, factor_site, replace_kernels, site_kernels
from lordjax.kernels import trees
from lordjax.methods import METHODS, Method, linalg, method_at
from lordjax.models.config import ModelConfig
from lordjax.models.head_axes import LAST_NAME
from lordjax.models.sites import LAST_LAYER, LINEAR_SITES, Site, site_path, sites_for
from lordjax.models.source import Source
from lordjax.runtime.mesh import gathered
from lordjax.runtime.progress import Clock
from lordjax.storage.store import Entries, MemoryStore, Store, digest

RIDGE = 1e-4  # of the regression on the compressed inputs, relative to their mean variance

Inputs = dict[str, tuple[Any, dict[str, Any]]]  # site path -> what to factor, statistics


@dataclasses.dataclass
class _Walk:
    """Where a sequential pass stands: the untouched model and the compressed one in lockstep.

    Attributes:
      config: the architecture.
      method: a key of `METHODS`.
      calibration: tokens.
      states: residual stream before this block in the compressed model, per batch.
      dense_states: the same in the untouched model; read only if the target is corrective.
      dense: this block, untouched.
      whole: the same, of several devices on the host.
      current: this block as far as it is compressed, in arrays of the original shapes.
    """

    config: ModelConfig
    method: str
    calibration: Calibration
    states: Any
    dense_states: Any
    dense: Any = None
    whole: Any = None
    current: Any = None

    @property
    def row(self) -> Method:
        """The method's row."""
        return METHODS[self.method]


def sequential(
    source: Source,
    calibration: Calibration,
    plan: Plan,
    method: str,
    gradients: Mapping[int, Mapping[str, Mapping[str, Any]]],
    *,
    corrective: bool,
    clock: Clock,
    store: Store | None = None,
) -> tuple[Mapping[str, AnyFactors], Mapping[str, dict[str, Any]]]:
    """Factors of every planned site, each from the model compressed before it.

    Args:
      source: the untouched model.
      calibration: tokens.
      plan: ranks; sites left dense are passed through.
      method: a key of `METHODS`.
      gradients: gradient statistics by layer, if the method needs any.
      corrective: fit the untouched model's outputs instead of the layer's own.
      clock: for progress.
      store: where factors go, and where a killed process left them; None: in memory.

    Returns:
      Site path -> factors; path of a module -> its last layer's kernel, by name in head form, where
      that was fitted to something else.
    """
    config, row = source.config, METHODS[method]
    store, name = (
        store or MemoryStore(),
        f"sequential-{digest(dict(plan.ranks), method, corrective)}",
    )
    factors, kernels = Entries(store, f"{name}/factors"), Entries(store, f"{name}/kernels")
    steps = groups(row, config)
    planned = [
        site_path(i, site) for i in range(config.num_layers) for group in steps for site in group
    ]
    if all(path in factors for path in planned if plan.ranks.get(path) is not None):
        return factors, kernels
    states = start_pass(store, f"{name}/states", source, calibration, 1 + corrective)
    own, dense = (Shifted(states, k * len(calibration.masks())) for k in range(2))
    walk = _Walk(config, method, calibration, own, dense)
    start = states.at or 0
    for i in clock.run("sequential", range(start, config.num_layers), start):
        walk.dense = walk.current = on_device(source.block(i), calibration.mesh)
        walk.whole = gathered(walk.dense, calibration.mesh)
        of_block = gradients.get(i, {})
        for group in steps:
            sites = tuple(s for s in group if plan.ranks.get(site_path(i, s)) is not None)
            if not sites:
                continue
            if any(site_path(i, site) not in factors for site in sites):
                _factor_group(walk, i, sites, of_block, store, name, corrective=corrective)
            ranks = plan.ranks
            compressed = replace_kernels(
                walk.whole, i, factors, ranks, method, config, widened=True, kernels=kernels
            )
            walk.current = on_device(compressed, calibration.mesh)
        no_keys: dict[str, dict[str, str]] = {}
        block_statistics(walk.current, i, walk.states, calibration, (), no_keys, config)
        if corrective:
            block_statistics(walk.dense, i, walk.dense_states, calibration, (), no_keys, config)
        states.commit(i + 1)
    states.close()
    return factors, kernels


def _factor_group(
    walk: _Walk,
    i: int,
    sites: tuple[Site, ...],
    gradients: Mapping[str, Mapping[str, Any]],
    store: Store,
    name: str,
    *,
    corrective: bool,
) -> None:
    """Puts factors of sites that do not feed each other below ``name``."""
    inputs = (_corrective_inputs if corrective else _own_inputs)(walk, i, sites)
    for site in sites:
        path, (own, stats) = site_path(i, site), inputs[site.path]
        untouched = site_kernels(site, walk.whole, walk.config)
        stats |= site_gradients(gradients, walk.row, site, untouched)
        if corrective and site.kind in LAST_NAME:
            last = LAST_NAME[site.kind]
            store[f"{name}/kernels/{path}"] = {last: np.asarray(own[last], np.float32)}
        store[f"{name}/factors/{path}"] = factor_site(walk.method, site, path, own, stats)


def groups(row: Method, config: ModelConfig) -> list[tuple[Site, ...]]:
    """Sites of a method that do not feed each other, in the order in which they run."""
    sites = sites_for(row.kinds, config)
    return [tuple(s for s in sites if s.stage == n) for n in sorted({s.stage for s in sites})]


def _own_inputs(walk: _Walk, i: int, sites: tuple[Site, ...]) -> Inputs:
    """ROM's target: the layer's own outputs on the compressed prefix."""
    keys = activation_keys(walk.dense, sites, walk.row)
    stats = block_statistics(
        walk.current, i, walk.states, walk.calibration, sites, keys, walk.config, forward=False
    )
    return {
        site.path: (
            site_kernels(site, walk.whole, walk.config),
            {name: stats[key] for name, key in keys[site.path].items()},
        )
        for site in sites
    }


def _corrective_inputs(walk: _Walk, i: int, sites: tuple[Site, ...]) -> Inputs:
    """The corrective target: the untouched outputs, regressed on the compressed inputs.

    Of a module it is the last layer that is regressed; columns that are chosen before a
    nonlinearity have no such freedom.
    """
    modules = tuple(site for site in sites if site.kind != "linear")
    inputs = _own_inputs(walk, i, modules) if modules else {}
    last = {LAST_LAYER.get(site.kind, site.path): site for site in sites}
    fitted = _regressed(walk, i, tuple(layer for layer in LINEAR_SITES if layer.path in last))
    for path, (kernel, stats) in fitted.items():
        site = last[path]
        if site.kind == "linear":
            inputs[site.path] = (kernel, stats)
            continue
        own, statistics = inputs[site.path]
        name = LAST_NAME[site.kind]
        inputs[site.path] = (own | {name: kernel.reshape(own[name].shape)}, statistics)
    return inputs


def _regressed(walk: _Walk, i: int, layers: tuple[Site, ...]) -> Inputs:
    """Layer path -> the best kernel from compressed inputs to untouched outputs, statistics."""
    flat = trees.flatten(walk.dense)
    fan_in = {s.input_tap: flat[s.path].shape[0] for s in layers}
    target = {s.output_tap: Moments.zeros(flat[s.path].shape[1]) for s in layers}
    fitted = {tap: Moments.zeros(width) for tap, width in fan_in.items()}
    cross = {f"{s.input_tap}|{s.output_tap}": jnp.zeros(flat[s.path].shape) for s in layers}
    if not layers:
        return {}
    for j, mask in enumerate(walk.calibration.masks()):
        target, fitted, cross = observe_pair(
            (walk.dense, walk.current),
            (walk.dense_states[j], walk.states[j]),
            mask,
            target,
            fitted,
            cross,
            config=walk.config,
            sliding_window=walk.config.window(i),
        )
    target, fitted, cross = gathered((target, fitted, cross), walk.calibration.mesh)
    inputs: Inputs = {}
    for s in layers:
        x, y = fitted[s.input_tap], target[s.output_tap]
        bias = METHODS[method_at(walk.method, s.layer)].bias
        sums = (x, y, cross[f"{s.input_tap}|{s.output_tap}"])
        with jax.enable_x64(True):
            sums = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), sums)
            kernel = _regress(*sums, centred=bias)
        stats = {"input": x} | ({"target_mean": y.mean} if bias else {})
        inputs[s.path] = (kernel, stats)
    return inputs


@functools.partial(jax.jit, static_argnames=("centred",))
def _regress(x: Moments, y: Moments, cross: Any, centred: bool) -> Any:
    """Least-squares kernel from the compressed inputs to the untouched outputs."""
    between = cross / x.count
    if centred:
        between = between - jnp.outer(x.mean, y.mean)
    gram = x.covariance() if centred else x.second_moment()
    return linalg.solve_psd(gram, between, RIDGE)
