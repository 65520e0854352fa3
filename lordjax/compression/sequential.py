"""Compresses block after block, with inputs from the model compressed so far (ROM, corrective).

Inside a block the layers are replaced in the order in which they run (q, k, v; o; gate, up; down),
and every stage sees inputs that the compressed stages before it produce. While the states pass
through a block, low-rank kernels are multiplied out and pruned modules are zero-padded. So all
blocks have the same shapes and share compilations, except for biases that some methods add.

ROM fits ``W x̂ ≈ W' x̂`` on the inputs x̂ that the compressed blocks produce. The *corrective* target
fits ``W x ≈ W' x̂`` with x from the original model. This is reduced-rank regression: the kernel to
factor is first replaced by the least-squares map from x̂ to the original output
(theory/lord_rom §3.5).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
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
from lordjax.calibration.statistics import Moments, merged
from lordjax.compression.site_factors import AnyFactors, factor_site, replace_kernels, site_kernels
from lordjax.kernels import trees
from lordjax.methods import METHODS, Method, linalg, method_at
from lordjax.models.config import ModelConfig
from lordjax.models.head_axes import LAST_NAME
from lordjax.models.sites import LAST_LAYER, LINEAR_SITES, Site, site_path, sites_for
from lordjax.models.source import Source
from lordjax.runtime.mesh import to_host
from lordjax.runtime.progress import Clock
from lordjax.storage.store import Entries, MemoryStore, Store, digest

RIDGE = 1e-4  # ridge of the regression, relative to the mean variance of the compressed inputs

Inputs = dict[str, tuple[Any, dict[str, Any]]]  # site path -> kernels to factor, statistics


@dataclasses.dataclass
class _Pass:
    """State of a sequential pass: the original and the compressed model advance in lockstep.

    Attributes:
      config: the architecture.
      plan: ranks; sites left dense are passed through.
      method: a key of `METHODS`.
      calibration: tokens.
      corrective: whether the original model's outputs are fitted instead of the layer's own.
      store: where factors go.
      name: prefix of the keys of this pass in ``store``.
      states: block inputs of the compressed model, per batch.
      dense_states: block inputs of the original model; read only if the target is corrective.
      dense: the current block of the original model.
      whole: the same block on the host, also where devices share it.
      current: the current block, compressed so far, in arrays of the original shapes.
    """

    config: ModelConfig
    plan: Plan
    method: str
    calibration: Calibration
    corrective: bool
    store: Store
    name: str
    states: Any = None
    dense_states: Any = None
    dense: Any = None
    whole: Any = None
    current: Any = None

    @property
    def factors(self) -> Entries:
        """Site path -> factors that are found."""
        return Entries(self.store, f"{self.name}/factors")

    @property
    def kernels(self) -> Entries:
        """Path of a module -> its last layer's kernel, where that was fitted to other outputs."""
        return Entries(self.store, f"{self.name}/kernels")

    def planned(self, i: int, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """Returns the sites of a block that the plan compresses."""
        return tuple(s for s in sites if self.plan.ranks.get(site_path(i, s)) is not None)


def sequential(
    source: Source,
    calibration: Calibration,
    plan: Plan,
    method: str,
    gradients: Mapping[int, Sequence[Mapping[str, Mapping[str, Any]]]],
    *,
    corrective: bool,
    clock: Clock,
    store: Store | None = None,
) -> tuple[Mapping[str, AnyFactors], Mapping[str, dict[str, Any]]]:
    """Factors every planned site, each with inputs from the model compressed before it.

    Args:
      source: the original model.
      calibration: tokens.
      plan: ranks; sites left dense are passed through.
      method: a key of `METHODS`.
      gradients: layer -> gradient statistics of each fold, if the method needs any.
      corrective: whether the original model's outputs are fitted instead of the layer's own.
      clock: reports progress.
      store: where factors go, and where a run that was killed left them; None: in memory.

    Returns:
      Site path -> factors. Path of a module -> its last layer's kernel, by name in head form, where
      that was fitted to other outputs than its own.
    """
    config, steps = source.config, sites_by_stage(METHODS[method], source.config)
    name = f"sequential-{digest(dict(plan.ranks), method, corrective)}"
    store = store or MemoryStore()
    run = _Pass(config, plan, method, calibration, corrective, store, name)
    planned = [
        site_path(i, site)
        for i in range(config.num_layers)
        for sites in steps
        for site in run.planned(i, sites)
    ]
    if all(path in run.factors for path in planned):
        return run.factors, run.kernels
    states = start_pass(store, f"{name}/states", source, calibration, 1 + corrective)
    run.states, run.dense_states = (Shifted(states, k * len(calibration.masks())) for k in range(2))
    start = states.at or 0
    for i in clock.run("sequential", range(start, config.num_layers), start):
        _compress_block(run, i, source.block(i), steps, merged(gradients.get(i, [{}])))
        states.commit(i + 1)
    states.close()
    return run.factors, run.kernels


def sites_by_stage(method: Method, config: ModelConfig) -> list[tuple[Site, ...]]:
    """Returns the sites of a method in the order in which they run, by stage.

    Sites of one stage do not feed each other.
    """
    sites = sites_for(method.kinds, config)
    return [tuple(s for s in sites if s.stage == n) for n in sorted({s.stage for s in sites})]


def _compress_block(
    run: _Pass,
    i: int,
    block: Mapping[str, Any],
    steps: list[tuple[Site, ...]],
    gradients: Mapping[str, Mapping[str, Any]],
) -> None:
    """Factors the planned sites of a block, stage by stage, and moves the states past it."""
    config, mesh = run.config, run.calibration.mesh
    run.dense = run.current = on_device(block, mesh)
    run.whole = to_host(run.dense, mesh)
    for step in steps:
        sites = run.planned(i, step)
        if not sites:
            continue
        if any(site_path(i, site) not in run.factors for site in sites):
            _factor_stage(run, i, sites, gradients)
        compressed = replace_kernels(
            run.whole,
            i,
            run.factors,
            run.plan.ranks,
            run.method,
            config,
            padded=True,
            kernels=run.kernels,
        )
        run.current = on_device(compressed, mesh)
    no_keys: dict[str, dict[str, str]] = {}
    block_statistics(run.current, i, run.states, run.calibration, (), no_keys, config)
    if run.corrective:
        block_statistics(run.dense, i, run.dense_states, run.calibration, (), no_keys, config)


def _factor_stage(
    run: _Pass, i: int, sites: tuple[Site, ...], gradients: Mapping[str, Mapping[str, Any]]
) -> None:
    """Puts the factors of one stage's sites into the store."""
    inputs = (_corrective_inputs if run.corrective else _own_inputs)(run, i, sites)
    for site in sites:
        path, (own, stats) = site_path(i, site), inputs[site.path]
        original = site_kernels(site, run.whole, run.config)
        stats |= site_gradients([gradients], METHODS[run.method], site, original)[0]
        if run.corrective and site.kind in LAST_NAME:
            last = LAST_NAME[site.kind]
            run.store[f"{run.name}/kernels/{path}"] = {last: np.asarray(own[last], np.float32)}
        run.store[f"{run.name}/factors/{path}"] = factor_site(run.method, site, path, own, stats)


def _own_inputs(run: _Pass, i: int, sites: tuple[Site, ...]) -> Inputs:
    """Returns the inputs for ROM's target: the layer's own outputs on the compressed prefix."""
    keys = activation_keys(run.dense, sites, METHODS[run.method])
    folds = block_statistics(
        run.current, i, run.states, run.calibration, sites, keys, run.config, forward=False
    )
    stats = merged(folds)
    return {
        site.path: (
            site_kernels(site, run.whole, run.config),
            {name: stats[key] for name, key in keys[site.path].items()},
        )
        for site in sites
    }


def _corrective_inputs(run: _Pass, i: int, sites: tuple[Site, ...]) -> Inputs:
    """Returns the inputs for the corrective target: a regression on the compressed inputs.

    In a module only the last layer is regressed. The columns before a nonlinearity are chosen, not
    fitted, so they have no such freedom.
    """
    modules = tuple(site for site in sites if site.kind != "linear")
    inputs = _own_inputs(run, i, modules) if modules else {}
    last = {LAST_LAYER.get(site.kind, site.path): site for site in sites}
    fitted = _regressed(run, i, tuple(layer for layer in LINEAR_SITES if layer.path in last))
    for path, (kernel, stats) in fitted.items():
        site = last[path]
        if site.kind == "linear":
            inputs[site.path] = (kernel, stats)
            continue
        own, statistics = inputs[site.path]
        name = LAST_NAME[site.kind]
        inputs[site.path] = (own | {name: kernel.reshape(own[name].shape)}, statistics)
    return inputs


def _regressed(run: _Pass, i: int, layers: tuple[Site, ...]) -> Inputs:
    """Returns each layer's least-squares kernel from compressed inputs to original outputs."""
    flat = trees.flatten(run.dense)
    fan_in = {s.input_tap: flat[s.path].shape[0] for s in layers}
    target = {s.output_tap: Moments.zeros(flat[s.path].shape[1]) for s in layers}
    fitted = {tap: Moments.zeros(width) for tap, width in fan_in.items()}
    cross = {f"{s.input_tap}|{s.output_tap}": jnp.zeros(flat[s.path].shape) for s in layers}
    if not layers:
        return {}
    for j, mask in enumerate(run.calibration.masks()):
        target, fitted, cross = observe_pair(
            (run.dense, run.current),
            (run.dense_states[j], run.states[j]),
            mask,
            target,
            fitted,
            cross,
            config=run.config,
            sliding_window=run.config.window(i),
        )
    target, fitted, cross = to_host((target, fitted, cross), run.calibration.mesh)
    inputs: Inputs = {}
    for s in layers:
        x, y = fitted[s.input_tap], target[s.output_tap]
        bias = METHODS[method_at(run.method, s.layer)].bias
        sums = (x, y, cross[f"{s.input_tap}|{s.output_tap}"])
        with jax.enable_x64(True):
            sums = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), sums)
            kernel = _regress(*sums, centred=bias)
        stats = {"input": x} | ({"target_mean": y.mean} if bias else {})
        inputs[s.path] = (kernel, stats)
    return inputs


@functools.partial(jax.jit, static_argnames=("centred",))
def _regress(x: Moments, y: Moments, cross: Any, centred: bool) -> Any:
    """Returns the least-squares kernel from the compressed inputs to the original outputs."""
    between = cross / x.count
    if centred:
        between = between - jnp.outer(x.mean, y.mean)
    gram = x.covariance() if centred else x.second_moment()
    return linalg.solve_psd(gram, between, RIDGE)
