"""Calibration of one block after the other: hidden states and statistics of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.calibration.calibration_set import Calibration, check_tokens
from lordjax.calibration.hidden_states import States, open_states
from lordjax.calibration.observers import (
    BLOCK,
    EMBEDDINGS,
    embed,
    empty,
    moment_taps,
    observe,
    windows_per_step,
)
from lordjax.kernels import trees
from lordjax.methods import Method
from lordjax.models import objective
from lordjax.models.config import ModelConfig
from lordjax.models.sites import LINEAR_SITES, Site
from lordjax.models.source import Source
from lordjax.runtime import mesh as devices
from lordjax.storage.store import Store

QUERIES = "attention/queries"
INFLUENCE = f"{BLOCK}:influence"


def on_device(tree: Any, mesh: devices.Mesh | None = None) -> Any:
    """Weights in float32: statistics do not depend on the dtype a model is stored in.

    With a mesh, a block's are laid out as `mesh.RULES` say.
    """
    # What is cut into parts need not fit on one device.
    asarray: Any = np.asarray if devices.is_model_sharded(mesh) else jnp.asarray

    def put(a: Any) -> Any:
        return asarray(a, jnp.float32 if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype)

    tree = jax.tree.map(put, tree)
    if devices.is_model_sharded(mesh):
        return trees.unflatten(devices.shard_params(trees.flatten(tree), mesh))
    return tree


def embedded(source: Source, calibration: Calibration) -> Iterator[Any]:
    """The residual stream before the first block, batch by batch."""
    rest, config = source.non_block_params(), source.config
    tables = on_device({key: rest[key] for key in EMBEDDINGS if key in rest})
    del rest
    for tokens, mask in calibration.batches():
        x = embed(tables, calibration.read(config, tokens, mask), mask, config=config)
        yield devices.shard_batch(x, calibration.mesh)


def hidden_states(source: Source, calibration: Calibration) -> list[Any]:
    """`embedded`, all at once."""
    return list(embedded(source, calibration))


def start_pass(
    store: Store, name: str, source: Source, calibration: Calibration, streams: int = 1
) -> States:
    """The hidden states of a pass over the blocks where it was left, or before the first block.

    Args:
      store: what is kept so far.
      name: of the pass.
      source: the model.
      calibration: tokens.
      streams: how many residual streams there are, one after the other.
    """
    shapes = state_shapes(source, calibration) * streams
    states = open_states(store, name, shapes, calibration.mesh)
    if states.at is None:
        count = len(calibration.masks())
        for k in range(streams):
            for j, x in enumerate(embedded(source, calibration), k * count):
                states[j] = x
        states.commit(0)
    return states


def resume_pass(
    store: Store,
    name: str,
    source: Source,
    calibration: Calibration | None,
    done: Callable[[int], bool],
) -> tuple[States | None, range]:
    """Where a pass over the blocks goes on: its hidden states, and the blocks that are left.

    Args:
      store: what is kept so far.
      name: of the pass.
      source: the model.
      calibration: tokens; None for a pass that runs no block, and has no states.
      done: whether nothing is left to do for a block.
    """
    layers = source.config.num_layers
    start = next((i for i in range(layers) if not done(i)), layers)
    if calibration is None:
        return None, range(start, layers)
    if start == layers:
        open_states(store, name, []).close()  # of a process that was killed before it could
        return None, range(layers, layers)
    states = start_pass(store, name, source, calibration)
    # States may be behind what is done: a process was killed before it could write them. They are
    # ahead of it in the middle of a group of blocks.
    if (states.at or 0) > start:
        states.back(start)
    return states, range(states.at or 0, layers)


def state_shapes(source: Source, calibration: Calibration) -> list[tuple[int, ...]]:
    """Of the residual stream of every batch."""
    return [(*tokens.shape, source.config.hidden_size) for tokens, _ in calibration.batches()]


# What a module's ``needs`` mean; ``moments`` are those of its last layer's input.
MODULE_KEYS = {
    "queries": f"{QUERIES}:heads",
    "keys": "attention/keys:heads",
    "values": "attention/v/out:heads",
}


def needs_activations(method: Method) -> bool:
    """Whether a method reads anything of a forward pass."""
    needs = {*method.needs, *(name for m in method.modules.values() for name in m.needs)}
    return bool(needs & {"moments", "inputs", "abs_mean", *MODULE_KEYS})


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
    states: Any,
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
    of ``states`` - a list, or `states.States` - are replaced by the block's outputs.

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
            states[j] = devices.shard_batch(y, calibration.mesh)
    stats = devices.to_host(stats, calibration.mesh)
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
    mesh: devices.Mesh | None = None,
) -> Calibration:
    """Calibration tokens ready to run; ``batch_size=None``: as many as this backend does best.

    With a mesh, as many for each of the devices that share out rows.

    Raises:
      ValueError: if tokens do not fit the model, or the mask does not fit the tokens, or the mask
        token is missing, or there are fewer windows than devices that share them.
    """
    tokens = check_tokens(config, tokens)
    if mask is not None and np.shape(mask) != tokens.shape:
        raise ValueError(f"mask {np.shape(mask)}: expected the shape of the tokens {tokens.shape}")
    objective.inputs(config, tokens[:1], None, mask_token)  # raises
    share = 1 if mesh is None else mesh.shape.get(devices.DATA_AXIS, 1)
    if share > len(tokens):
        raise ValueError(
            f"{len(tokens)} calibration windows for {share} devices; give as many windows at least"
        )
    step = windows_per_step(len(tokens) // share, tokens.shape[1]) * share
    return Calibration(tokens, mask, batch_size or step, mask_token, mesh)
