"""Block after block on the model compressed so far: ROM, and the corrective target.

Inside a block the layers are replaced in the order in which they run - q, k, v; o; gate, up;
down - and every group sees inputs made by the groups before it. Compressed kernels are multiplied
out while they propagate, so that blocks have the same shapes and share compilations (but for the
biases that some methods add to the layers they factor).

ROM fits ``W x̂ ≈ W' x̂`` on the compressed prefix' inputs x̂. The *corrective* target fits
``W x ≈ W' x̂`` with x from the untouched model: reduced-rank regression, in which the kernel to be
factored is first replaced by the least-squares map from x̂ to the untouched output
(specs of LoRD §3.5).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lordjax import linalg, trees
from lordjax.calibrate import (
    activation_keys,
    block_statistics,
    hidden_states,
    on_device,
    site_gradients,
)
from lordjax.collect import observe_pair
from lordjax.factoring import replace_kernels
from lordjax.methods import METHODS, Factors, method_at
from lordjax.plan import Plan
from lordjax.progress import Clock
from lordjax.sites import LINEAR_SITES, Site, site_path
from lordjax.source import Calibration, Source
from lordjax.stats import Moments

RIDGE = 1e-4  # of the regression on the compressed inputs, relative to their mean variance
Factorise = Callable[[str, Any, Mapping[str, Any]], Factors]


def groups() -> list[tuple[Site, ...]]:
    """Sites that share an input, in the order in which they run."""
    numbers = sorted({site.group for site in LINEAR_SITES})
    return [tuple(s for s in LINEAR_SITES if s.group == n) for n in numbers]


def sequential(
    source: Source,
    calibration: Calibration,
    plan: Plan,
    factorise: Factorise,
    method: str,
    gradients: Mapping[int, Mapping[str, Mapping[str, Any]]],
    *,
    corrective: bool,
    clock: Clock,
) -> dict[str, Factors]:
    """Factors of every planned kernel, each from the model compressed before it.

    Args:
      source: the untouched model.
      calibration: tokens.
      plan: ranks; kernels left dense are passed through.
      factorise: ``(path, kernel, stats) -> Factors`` of the method.
      method: its name, for the statistics it needs.
      gradients: gradient statistics by layer, if the method needs any.
      corrective: fit the untouched model's outputs instead of the layer's own.
      clock: for progress.
    """
    config = source.config
    states = hidden_states(source, calibration)
    dense_states = list(states) if corrective else []
    factors: dict[str, Factors] = {}
    for i in clock.run("sequential", range(config.num_layers)):
        dense = on_device(source.block(i))
        current = dense
        for group in groups():
            sites = tuple(s for s in group if plan.ranks.get(site_path(i, s)) is not None)
            if not sites:
                continue
            run = functools.partial(
                _corrective_inputs if corrective else _own_inputs, config=config, method=method
            )
            inputs = run(i, sites, dense, current, dense_states, states, calibration)
            for site in sites:
                kernel, stats = inputs[site.path]
                untouched = trees.flatten(dense)[site.path]
                extra = site_gradients(gradients.get(i, {}), site.path, untouched)
                path = site_path(i, site)
                factors[path] = factorise(path, kernel, {**stats, **extra})
            current = on_device(replace_kernels(dense, i, factors, plan.ranks, multiplied=True))
        no_keys: dict[str, dict[str, str]] = {}
        block_statistics(current, i, states, calibration, (), no_keys, config)
        if corrective:
            block_statistics(dense, i, dense_states, calibration, (), no_keys, config)
    return factors


Inputs = dict[str, tuple[Any, dict[str, Any]]]  # site path -> kernel to factor, statistics


def _own_inputs(
    i: int,
    sites: tuple[Site, ...],
    dense: Any,
    current: Any,
    dense_states: list[Any],
    states: list[Any],
    calibration: Calibration,
    *,
    config: Any,
    method: str,
) -> Inputs:
    """ROM's target: the layer's own outputs on the compressed prefix."""
    del dense_states
    keys = activation_keys(dense, sites, METHODS[method])
    stats = block_statistics(current, i, states, calibration, sites, keys, config, forward=False)
    flat = trees.flatten(dense)
    return {
        s.path: (flat[s.path], {name: stats[key] for name, key in keys[s.path].items()})
        for s in sites
    }


def _corrective_inputs(
    i: int,
    sites: tuple[Site, ...],
    dense: Any,
    current: Any,
    dense_states: list[Any],
    states: list[Any],
    calibration: Calibration,
    *,
    config: Any,
    method: str,
) -> Inputs:
    """The corrective target: the untouched outputs, regressed on the compressed inputs."""
    flat = trees.flatten(dense)
    fan_in = {s.input_tap: flat[s.path].shape[0] for s in sites}
    target = {s.output_tap: Moments.zeros(flat[s.path].shape[1]) for s in sites}
    fitted = {tap: Moments.zeros(width) for tap, width in fan_in.items()}
    cross = {f"{s.input_tap}|{s.output_tap}": jnp.zeros(flat[s.path].shape) for s in sites}
    for j, mask in enumerate(calibration.masks()):
        target, fitted, cross = observe_pair(
            (dense, current),
            (dense_states[j], states[j]),
            mask,
            target,
            fitted,
            cross,
            config=config,
            window=config.window(i),
        )
    inputs: Inputs = {}
    for s in sites:
        x, y = fitted[s.input_tap], target[s.output_tap]
        bias = METHODS[method_at(method, s.layer)].bias
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
