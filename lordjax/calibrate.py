"""Calibration of one block after the other: hidden states forward, gradients backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lordjax import linalg, objective, trees
from lordjax.collect import (
    BLOCK,
    EMBEDDINGS,
    embed,
    empty,
    moment_taps,
    observe,
    observe_gradients,
    windows_per_step,
)
from lordjax.methods import Method
from lordjax.models.config import ModelConfig
from lordjax.objective import loss_gradient
from lordjax.progress import Clock
from lordjax.sites import LAST_LAYER, LINEAR_SITES, Site, sites_for
from lordjax.source import Calibration, Source, check_tokens
from lordjax.stats import HeadMoments, MeanSquare, SecondMoment

# Hidden states that a backward sweep may hold; a few batches already hide the reading of blocks.
STATE_BYTES = 2**28
QUERIES = "attention/queries"
INFLUENCE = f"{BLOCK}:influence"


def on_device(tree: Any) -> Any:
    """Weights in float32: statistics do not depend on the dtype a model is stored in."""

    def put(a: Any) -> Any:
        return jnp.asarray(a, jnp.float32 if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype)

    return jax.tree.map(put, tree)


def hidden_states(source: Source, calibration: Calibration) -> list[Any]:
    """The residual stream before the first block, one array per batch."""
    rest, config = source.rest(), source.config
    tables = on_device({key: rest[key] for key in EMBEDDINGS if key in rest})
    return [
        embed(tables, calibration.read(config, tokens, mask), mask, config=config)
        for tokens, mask in calibration.batches()
    ]


# What a module's ``needs`` mean; ``moments`` are those of its last layer's input.
MODULE_KEYS = {
    "queries": f"{QUERIES}:heads",
    "keys": "attention/keys:heads",
    "values": "attention/v/out:heads",
}


def activation_keys(
    block: Mapping[str, Any], sites: tuple[Site, ...], method: Method
) -> dict[str, dict[str, str]]:
    """Site path -> ``{name that the method reads: accumulator key}``."""
    taps = moment_taps(block)
    keys: dict[str, dict[str, str]] = {}
    for site in sites:
        names = {}
        if site.kind != "linear":
            table = {**MODULE_KEYS, "moments": f"{site.input_tap}:moments"}
            names = {n: table[n] for n in method.modules[site.kind].needs if n in table}
        elif "moments" in method.needs:
            side = "input" if taps[site.path] == site.input_tap else "output"
            names[side] = f"{taps[site.path]}:moments"
        if site.kind == "linear" and "inputs" in method.needs:
            names["inputs"] = f"{site.input_tap}:moments"
        if site.kind == "linear" and "abs_mean" in method.needs:
            names["abs_mean"] = f"{site.input_tap}:abs_mean"
        keys[site.path] = names
    return keys


def statistic_width(key: str, flat: Mapping[str, Any], config: ModelConfig) -> Any:
    """How wide the statistic of a key is: see the ``zeros`` of its kind."""
    tap, kind = key.rsplit(":", 1)
    inputs = {site.input_tap: site.path for site in LINEAR_SITES if site.path in flat}
    if tap in inputs:
        return flat[inputs[tap]].shape[0]
    layer = {QUERIES: "attention/q", "attention/keys": "attention/k"}.get(tap)
    width = flat[f"{layer or tap.removesuffix('/out')}/kernel"].shape[1]
    heads = config.num_heads if layer == "attention/q" else config.num_kv_heads
    return (heads, width // heads) if kind == "heads" else width


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
    influence: bool = False,
) -> dict[str, Any]:
    """Runs a block on all batches and accumulates what ``keys`` asks for.

    With ``influence`` the block's own is among them, at `INFLUENCE`. With ``forward`` the entries
    of ``states`` are replaced by the block's outputs.

    Raises:
      ValueError: if an activation is not finite; names the tap.
    """
    flat = trees.flatten(block)
    wanted = {key for site in sites for key in keys[site.path].values()}
    stats = empty({key: statistic_width(key, flat, config) for key in sorted(wanted)})
    if influence:
        stats |= empty({INFLUENCE: None})
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


def checked(
    config: ModelConfig,
    tokens: Any,
    mask: Any | None,
    batch_size: int | None,
    mask_token: int | None = None,
) -> Calibration:
    """Calibration tokens ready to run; ``batch_size=None``: as many as this backend does best.

    Raises:
      ValueError: if tokens do not fit the model, or the mask does not fit the tokens, or the mask
        token is missing.
    """
    tokens = check_tokens(config, tokens)
    if mask is not None and np.shape(mask) != tokens.shape:
        raise ValueError(f"mask {np.shape(mask)}: expected the shape of the tokens {tokens.shape}")
    objective.inputs(config, tokens[:1], None, mask_token)  # raises
    return Calibration(tokens, mask, batch_size or windows_per_step(*tokens.shape), mask_token)


def few_gradients(
    source: Source, calibration: Calibration, method: Method, windows: int | None, clock: Clock
) -> dict[int, dict[str, dict[str, Any]]]:
    """`gradient_statistics` of ``windows`` of the calibration; empty if the method reads none."""
    if not needs_gradients(method, source.config):
        return {}
    objective.of(source.config)  # raises before the work begins
    few = calibration.spread(windows)
    # A backward pass holds every activation of a block: half the batch, about the same memory.
    few = dataclasses.replace(few, batch_size=max(1, few.batch_size // 2))
    return gradient_statistics(source, few, method, clock)


def gradient_statistics(
    source: Source, calibration: Calibration, method: Method, clock: Clock
) -> dict[int, dict[str, dict[str, Any]]]:
    """Loss gradients inside every block, by forward and backward sweeps over the blocks.

    A sweep takes as many batches as their hidden states fit `STATE_BYTES`: the more, the less
    often a block is read.

    Args:
      source: the model.
      calibration: tokens.
      method: says which statistics are taken, at which sites.
      clock: for progress.

    Returns:
      layer -> statistics as in `collect.observe_gradients`.
    """
    config, layers = source.config, range(source.config.num_layers)
    rest = on_device(source.rest())
    stats: dict[int, dict[str, dict[str, Any]]] = {}
    bases: dict[int, dict[str, Any]] = {}
    batches = list(calibration.batches())
    state = batches[0][0].size * config.hidden_size * 4  # bytes of one batch between two blocks
    together = max(1, STATE_BYTES // (state * config.num_layers))
    for start in clock.run("gradients", range(0, len(batches), together)):
        sweep = batches[start : start + together]
        states = [
            [embed(rest, calibration.read(config, tokens, mask), mask, config=config)]
            for tokens, mask in sweep
        ]
        for i in layers:
            block = on_device(source.block(i))
            if i not in stats:
                stats[i], bases[i] = empty_gradients(block, method, config)
            for (_, mask), xs in zip(sweep, states, strict=True):
                window = config.window(i)
                xs.append(observe(block, xs[-1], mask, {}, config=config, window=window)[0])
        cotangents = [
            loss_gradient(rest, xs.pop(), objective.targets(config, *batch), config=config)
            for batch, xs in zip(sweep, states, strict=True)
        ]
        for i in reversed(layers):
            block = on_device(source.block(i))
            for j, (_, mask) in enumerate(sweep):
                cotangents[j], stats[i] = observe_gradients(
                    block,
                    states[j].pop(),
                    mask,
                    cotangents[j],
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


def _gradient_keys(method: Method, site: Site) -> dict[str, str]:
    """Name of a statistic of the backward pass that a site reads -> its key; see `collect`."""
    needs = method.needs if site.kind == "linear" else method.modules[site.kind].needs
    path = LAST_LAYER.get(site.kind, site.path)
    names = ("gradients", "row_fisher", "fisher", "weighted_inputs", "weighted_squares")
    keys = {**dict.fromkeys(names, path), "gates": QUERIES}
    return {name: key for name, key in keys.items() if name in needs}


def needs_gradients(method: Method, config: ModelConfig) -> bool:
    """Whether a method reads anything of a backward pass."""
    return any(_gradient_keys(method, site) for site in sites_for(method.kinds, config))


def site_gradients(
    stats: Mapping[str, Mapping[str, Any]], method: Method, site: Site, kernel: Any
) -> dict[str, Any]:
    """What ``factor`` reads of one site's gradients, by name; empty if there are none.

    Args:
      stats: gradient statistics of the block.
      method: says what is read.
      site: of the block.
      kernel: of a linear site, the untouched kernel, whose coordinates the gradients are in.
    """
    keys = _gradient_keys(method, site)
    found = {name: stats[name][key] for name, key in keys.items() if name in stats}
    if site.kind == "linear" and "gradients" in found:
        found["basis"] = gradient_basis(kernel)
    return found


def empty_gradients(
    block: Mapping[str, Any], method: Method, config: ModelConfig
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Zero accumulators of one block, and the coordinates that the gradients are taken in.

    Gradients at a module's output are taken as they are.
    """
    flat = trees.flatten(block)
    stats: dict[str, dict[str, Any]] = {}
    bases: dict[str, Any] = {}
    for site in sites_for(method.kinds, config):
        keys = _gradient_keys(method, site)
        if "gradients" in keys:
            path = keys["gradients"]
            basis = gradient_basis(flat[path]) if site.kind == "linear" else None
            width = flat[path].shape[1] if basis is None else basis.shape[1]
            stats.setdefault("gradients", {})[path] = SecondMoment.zeros(width)
            bases[path] = basis
        if "row_fisher" in keys:
            stats.setdefault("row_fisher", {})[site.path] = jnp.zeros(flat[site.path].shape[0])
        if "fisher" in keys:
            stats.setdefault("fisher", {})[site.path] = jnp.zeros(flat[site.path].shape)
        if "weighted_inputs" in keys:
            zeros = SecondMoment.zeros(flat[site.path].shape[0])
            stats.setdefault("weighted_inputs", {})[site.path] = zeros
        if "weighted_squares" in keys:
            zeros = MeanSquare.zeros(flat[site.path].shape[1])
            stats.setdefault("weighted_squares", {})[site.path] = zeros
        if "gates" in keys:
            width = flat["attention/k/kernel"].shape[1] // config.num_kv_heads
            pairs = 1 if config.rope is None else width // 2
            stats["gates"] = {QUERIES: HeadMoments.zeros((config.num_kv_heads, pairs))}
    return stats, bases
