"""Calibration of one block after the other: hidden states forward, gradients backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax import linalg, trees
from lordjax.collect import (
    embed,
    empty,
    loss_gradient,
    moment_taps,
    observe,
    observe_gradients,
)
from lordjax.methods import Method
from lordjax.models.config import ModelConfig
from lordjax.progress import Clock
from lordjax.sites import LINEAR_SITES, Site
from lordjax.source import Calibration, Source
from lordjax.stats import Moments


def on_device(tree: Any) -> Any:
    """Parameters in float32: statistics do not depend on the dtype a model is stored in."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def hidden_states(source: Source, calibration: Calibration) -> list[Any]:
    """The residual stream before the first block, one array per batch."""
    rest = {"embed": on_device(source.rest()["embed"])}
    return [embed(rest, tokens, config=source.config) for tokens, _ in calibration.batches()]


def activation_keys(
    block: Mapping[str, Any], sites: tuple[Site, ...], method: Method
) -> dict[str, dict[str, str]]:
    """Site path -> ``{name that the method reads: accumulator key}``."""
    taps = moment_taps(block)
    keys: dict[str, dict[str, str]] = {}
    for site in sites:
        names = {}
        if "moments" in method.needs:
            side = "input" if taps[site.path] == site.input_tap else "output"
            names[side] = f"{taps[site.path]}:moments"
        if "abs_mean" in method.needs:
            names["abs_mean"] = f"{site.input_tap}:abs_mean"
        keys[site.path] = names
    return keys


def block_statistics(
    block: Mapping[str, Any],
    i: int,
    states: list[Any],
    calibration: Calibration,
    sites: tuple[Site, ...],
    keys: Mapping[str, Mapping[str, str]],
    config: ModelConfig,
    *,
    forward: bool = True,
) -> dict[str, Any]:
    """Runs a block on all batches and accumulates what ``keys`` asks for.

    With ``forward`` the entries of ``states`` are replaced by the block's outputs.

    Raises:
      ValueError: if an activation is not finite; names the tap.
    """
    flat, widths = trees.flatten(block), {}
    for site in sites:
        for name, key in keys[site.path].items():
            widths[key] = flat[site.path].shape[1 if name == "output" else 0]
    stats = empty(widths)
    for j, mask in enumerate(calibration.masks()):
        y, stats = observe(
            block, states[j], mask, stats, config=config, window=config.window(i), forward=forward
        )
        if forward:
            states[j] = y
    bad = [
        key
        for key, stat in stats.items()
        if not all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(stat))
    ]
    if bad:
        raise ValueError(
            f"layer_{i}: non-finite activations at {', '.join(bad)}, although computed in float32; "
            "a weight of this or an earlier block is broken"
        )
    return stats


def gradient_statistics(
    source: Source, calibration: Calibration, needs: tuple[str, ...], clock: Clock
) -> dict[int, dict[str, dict[str, Any]]]:
    """Loss gradients at every linear output, by a forward and a backward sweep over the blocks.

    Returns:
      layer -> ``{"gradients": {site: Moments}, "row_fisher": {site: [in]}}``, as ``needs`` asks;
      gradients in the coordinates of `gradient_basis`.
    """
    config, layers = source.config, range(source.config.num_layers)
    rest = on_device(source.rest())
    stats: dict[int, dict[str, dict[str, Any]]] = {}
    bases: dict[int, dict[str, Any]] = {}
    batches = list(calibration.batches())
    for b in clock.run("gradients", range(len(batches))):
        tokens, mask = batches[b]
        states = [embed({"embed": rest["embed"]}, tokens, config=config)]
        for i in layers:
            block = on_device(source.block(i))
            if i not in stats:
                stats[i], bases[i] = _empty_gradients(block, needs)
            y, _ = observe(block, states[-1], mask, {}, config=config, window=config.window(i))
            states.append(y)
        cotangent = loss_gradient(rest, states.pop(), tokens, mask, config=config)
        for i in reversed(layers):
            cotangent, stats[i] = observe_gradients(
                on_device(source.block(i)),
                states.pop(),
                mask,
                cotangent,
                bases[i],
                stats[i],
                config=config,
                window=config.window(i),
            )
    return stats


@jax.jit
def gradient_basis(kernel: Float[Array, "in out"]) -> Float[Array, "out m"] | None:
    """Coordinates that gradients at a kernel's output are taken in; None: as they are.

    Cheap enough to be computed again instead of kept for every kernel of the model.
    """
    return linalg.row_space(kernel.astype(jnp.float32))


def site_gradients(
    stats: Mapping[str, Mapping[str, Any]], path: str, kernel: Any
) -> dict[str, Any]:
    """What `methods` read of one site's gradients, by name; empty if there are none.

    Args:
      stats: gradient statistics of the block.
      path: of the site in the block.
      kernel: the untouched kernel, whose coordinates the gradients are in.
    """
    found = {name: sites[path] for name, sites in stats.items()}
    return found | ({"basis": gradient_basis(kernel)} if "gradients" in found else {})


def _empty_gradients(
    block: Mapping[str, Any], needs: tuple[str, ...]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Zero accumulators of one block, and the coordinates that the gradients are taken in."""
    kernels = {site.path: trees.flatten(block)[site.path] for site in LINEAR_SITES}
    stats: dict[str, dict[str, Any]] = {}
    if "gradients" in needs:
        stats["gradients"] = {p: Moments.zeros(min(k.shape)) for p, k in kernels.items()}
    if "row_fisher" in needs:
        stats["row_fisher"] = {p: jnp.zeros(k.shape[0]) for p, k in kernels.items()}
    bases = {p: gradient_basis(k) if "gradients" in needs else None for p, k in kernels.items()}
    return stats, bases
