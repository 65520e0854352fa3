"""Factors of every kernel of a model, and putting them back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lordjax import trees
from lordjax.calibrate import (
    activation_keys,
    block_statistics,
    hidden_states,
    on_device,
    site_gradients,
)
from lordjax.methods import METHODS, Factors, break_even, method_at, truncate
from lordjax.models import init
from lordjax.progress import Clock
from lordjax.sites import LINEAR_SITES, layer_type, site_path
from lordjax.source import Calibration, Source


@functools.cache
def _jitted(method: str) -> Any:
    return jax.jit(METHODS[method].factor)


def factor_site(method: str, path: str, kernel: Any, stats: Mapping[str, Any]) -> Factors:
    """A method's factors of one kernel, computed in float64, as float32 arrays on the host.

    Statistics are float32 sums; an eigendecomposition loses half of the digits again, so it runs
    in double precision. Ranks from break-even on are never used, so their columns are dropped.

    Raises:
      ValueError: if a factor is not finite; names the kernel.
    """
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (kernel, dict(stats)))
        factors = _jitted(method_at(method, layer_type(path)))(*double)
        spectrum = np.asarray(factors.spectrum)
    useful = int(np.ceil(break_even(*kernel.shape)))
    small = jax.tree.map(lambda a: np.asarray(a, np.float32), factors)
    if not all(np.isfinite(a).all() for a in jax.tree.leaves(small)):
        raise ValueError(
            f"{path}: the factors of method {method!r} are not finite; its weights or statistics "
            "are broken, leave the kernel out or choose another method"
        )
    return dataclasses.replace(
        small,
        left=np.ascontiguousarray(small.left[:, :useful]),
        right=np.ascontiguousarray(small.right[:useful]),
        spectrum=spectrum,
        mean_in=None if small.mean_in is None else small.mean_in[:useful],
    )


def factor_all(
    source: Source,
    calibration: Calibration,
    method: str,
    gradients: dict[int, dict[str, dict[str, Any]]],
    keep_gradients: bool,
    clock: Clock,
) -> dict[str, Factors]:
    """One pass over the untouched model: statistics of a block, its factors, the next block."""
    config, row = source.config, METHODS[method]
    factors: dict[str, Factors] = {}
    watches = bool({"moments", "abs_mean"} & set(row.needs))
    # A method without activation statistics needs no forward pass.
    states = hidden_states(source, calibration) if watches else []
    for i in clock.run("statistics and factors", range(config.num_layers)):
        block = on_device(source.block(i))
        keys = activation_keys(block, LINEAR_SITES, row)
        stats = {}
        if watches:
            stats = block_statistics(block, i, states, calibration, LINEAR_SITES, keys, config)
        with clock.part("factors"):
            for site in LINEAR_SITES:
                inputs = {name: stats[key] for name, key in keys[site.path].items()}
                kernel = trees.flatten(block)[site.path]
                inputs |= site_gradients(gradients.get(i, {}), site.path, kernel)
                factors[site_path(i, site)] = factor_site(
                    method, site_path(i, site), kernel, inputs
                )
        if not keep_gradients:
            gradients.pop(i, None)
    return factors


def replace_kernels(
    block: Mapping[str, Any],
    i: int,
    factors: Mapping[str, Factors],
    plan: Mapping[str, int | None],
    *,
    multiplied: bool = False,
) -> dict[str, Any]:
    """Block ``i`` with the planned kernels replaced, on the host; the input is untouched.

    Args:
      block: parameters of the block.
      i: its number.
      factors: kernel path -> factors; planned kernels without factors stay as they are.
      plan: kernel path -> rank.
      multiplied: put in the matrix instead of the pair.
    """
    flat = dict(trees.flatten(block))
    for site in LINEAR_SITES:
        path = site_path(i, site)
        rank = plan.get(path)
        if rank is None or path not in factors:
            continue
        dtype = flat[site.path].dtype
        kernel, bias = truncate(factors[path], rank)
        # Where the dtype allows, views of the factors: no second copy.
        new = kernel.materialize() if multiplied else kernel
        flat[site.path] = jax.tree.map(lambda a, dtype=dtype: np.asarray(a, dtype), new)
        if bias is not None:
            old = np.asarray(flat.get(f"{site.layer}/bias", 0), np.float32)
            flat[f"{site.layer}/bias"] = np.asarray(bias + old, dtype)
    return trees.unflatten(flat)


def site_shapes(source: Source) -> dict[str, tuple[int, int]]:
    """Kernel path -> ``(in, out)`` of the untouched model, without reading it."""
    config = source.config
    model = trees.flatten(jax.eval_shape(functools.partial(init, config), jax.random.key(0)))
    paths = [site_path(i, site) for i in range(config.num_layers) for site in LINEAR_SITES]
    return {path: model[path].shape for path in paths}
