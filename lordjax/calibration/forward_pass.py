"""The forward pass of calibration: runs block after block and collects activation statistics.

`block_statistics` runs one block on all batches, by `observers.observe`. `backward_pass` collects
statistics of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    sequences_per_step,
)
from lordjax.kernels import trees
from lordjax.methods import Method
from lordjax.models import objective
from lordjax.models.config import ModelConfig
from lordjax.models.sites import LINEAR_SITES, Site
from lordjax.models.source import Source
from lordjax.names import layer, listed
from lordjax.runtime import mesh as devices
from lordjax.storage.store import Store

QUERIES = "attention/queries"
INFLUENCE = f"{BLOCK}:influence"


def on_device(tree: Any, mesh: devices.Mesh | None = None) -> Any:
    """Puts parameters on the device in float32, whatever dtype the model is stored in.

    With a mesh that shards the model, a block's arrays are laid out as `mesh.RULES` say.
    """
    # Arrays that are sharded need not fit on one device, so they stay on the host until then.
    asarray: Any = np.asarray if devices.is_model_sharded(mesh) else jnp.asarray

    def put(a: Any) -> Any:
        return asarray(a, jnp.float32 if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype)

    tree = jax.tree.map(put, tree)
    if devices.is_model_sharded(mesh):
        return trees.unflatten(devices.shard_params(trees.flatten(tree), mesh))
    return tree


def embedded(source: Source, calibration: Calibration) -> Iterator[Any]:
    """Yields the residual stream before the first block, batch by batch."""
    outer, config = source.non_block_params(), source.config
    tables = on_device({key: outer[key] for key in EMBEDDINGS if key in outer})
    del outer
    for tokens, mask in calibration.batches():
        x = embed(tables, calibration.read(config, tokens, mask), mask, config=config)
        yield devices.shard_batch(x, calibration.mesh)


def hidden_states(source: Source, calibration: Calibration) -> list[Any]:
    """Returns the residual stream before the first block, for all batches."""
    return list(embedded(source, calibration))


def start_pass(
    store: Store, name: str, source: Source, calibration: Calibration, streams: int = 1
) -> States:
    """Returns the hidden states of a pass over the blocks: where it stopped, or before block 0.

    Args:
      store: finished results of this and earlier processes.
      name: name of the pass in the store.
      source: the model.
      calibration: calibration tokens.
      streams: number of residual streams; the batches of one follow those of the other.
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
    """Resumes a pass over the blocks.

    Args:
      store: finished results of this and earlier processes.
      name: name of the pass in the store.
      source: the model.
      calibration: calibration tokens; None for a pass that runs no block and has no states.
      done: function that returns whether a block is finished.

    Returns:
      Hidden states before the first block that is left, or None; the blocks that are left.
    """
    layers = source.config.num_layers
    start = next((i for i in range(layers) if not done(i)), layers)
    if calibration is None:
        return None, range(start, layers)
    if start == layers:
        open_states(store, name, []).close()  # those of a process that was killed before it could
        return None, range(layers, layers)
    states = start_pass(store, name, source, calibration)
    # States may be older than the first unfinished block, if a process was killed before it could
    # write them. They are newer if it was killed in the middle of a batch of blocks.
    if (states.at or 0) > start:
        states.back(start)
    return states, range(states.at or 0, layers)


def state_shapes(source: Source, calibration: Calibration) -> list[tuple[int, ...]]:
    """Returns the shape of the residual stream for every batch."""
    return [(*tokens.shape, source.config.hidden_size) for tokens, _ in calibration.batches()]


# A module's ``needs`` -> accumulator key. ``moments`` are those of its last layer's input.
MODULE_KEYS = {
    "queries": f"{QUERIES}:heads",
    "keys": "attention/keys:heads",
    "values": "attention/v/out:heads",
}


def needs_activations(method: Method) -> bool:
    """Returns whether a method reads statistics of activations."""
    needs = {*method.needs, *(name for m in method.modules.values() for name in m.needs)}
    return bool(needs & {"moments", "inputs", "abs_mean", *MODULE_KEYS})


def activation_keys(
    block: Mapping[str, Any], sites: tuple[Site, ...], method: Method
) -> dict[str, dict[str, str]]:
    """Returns which accumulators a method reads.

    Args:
      block: parameters of the block, nested.
      sites: sites of the block.
      method: the method.

    Returns:
      site path -> ``{name in the method's needs: accumulator key}``.
    """
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
    """Returns the width of an accumulator: the argument of its statistic's ``zeros``.

    Args:
      key: accumulator key, ``"<tap>:<kind>"``.
      flat: parameters of the block by path.
      config: the architecture, for the numbers of heads.
    """
    tap, kind = key.rsplit(":", 1)
    inputs = {site.input_tap: site.path for site in LINEAR_SITES if site.path in flat}
    if tap in inputs:
        return flat[inputs[tap]].shape[0]
    linear = {QUERIES: "attention/q", "attention/keys": "attention/k"}.get(tap)
    width = flat[f"{linear or tap.removesuffix('/out')}/kernel"].shape[1]
    heads = config.num_heads if linear == "attention/q" else config.num_kv_heads
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
) -> list[dict[str, Any]]:
    """Runs a block on all batches and collects statistics of its activations.

    Args:
      block: parameters of the block, on the device.
      i: number of the block.
      states: residual stream before the block, per batch: a list or `States`.
      calibration: calibration tokens.
      sites: sites whose statistics are collected.
      keys: site path -> ``{name: accumulator key}``; see `activation_keys`.
      config: the architecture.
      forward: whether to replace the entries of ``states`` by the block's outputs.
      influence: whether to collect the block influence, too, at `INFLUENCE`.

    Returns:
      For every fold of the calibration set: accumulator key -> statistic. `statistics.merged`
      joins them.

    Raises:
      ValueError: if an activation is not finite; the error names the tap.
    """
    flat = trees.flatten(block)
    wanted = {key for site in sites for key in keys[site.path].values()}
    widths = {key: statistic_width(key, flat, config) for key in sorted(wanted)}
    widths |= {INFLUENCE: None} if influence else {}
    folds = [empty(widths) for _ in range(calibration.num_folds)]
    batches = zip(calibration.masks(), calibration.batch_folds(), strict=True)
    for j, (mask, fold) in enumerate(batches):
        y, folds[fold] = observe(
            block,
            states[j],
            mask,
            folds[fold],
            config=config,
            sliding_window=config.window(i),
            forward=forward,
        )
        if forward:
            states[j] = devices.shard_batch(y, calibration.mesh)
    folds = devices.to_host(folds, calibration.mesh)
    _check_finite(i, folds)
    return folds


def _check_finite(i: int, folds: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if a statistic of block ``i`` is not finite."""
    bad = [
        key
        for fold in folds
        for key, stat in fold.items()
        if not all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(stat))
    ]
    if bad:
        raise ValueError(
            f"{layer(i)}: non-finite activations at {listed(dict.fromkeys(bad))}, although "
            "computed in float32; check the weights of this and earlier blocks for NaN and infinity"
        )


def checked(
    config: ModelConfig,
    tokens: Any,
    mask: Any | None,
    batch_size: int | None,
    mask_token: int | None = None,
    mesh: devices.Mesh | None = None,
) -> Calibration:
    """Checks calibration tokens and chooses their batch size.

    Args:
      config: the model.
      tokens: token ids ``[n, len]``.
      mask: ``[n, len]``, False at padding; None: there is no padding.
      batch_size: sequences of a batch; None: `observers.sequences_per_step`, for each device of
        the mesh's data axis.
      mask_token: id of the mask token, for a model that predicts masked tokens.
      mesh: devices that split every batch; None: the first device.

    Raises:
      ValueError: if tokens do not fit the model, the mask does not fit the tokens, the mask token
        is missing, or there are fewer sequences than devices that split them.
    """
    tokens = check_tokens(config, tokens)
    if mask is not None and np.shape(mask) != tokens.shape:
        raise ValueError(f"mask {np.shape(mask)}: expected the shape of the tokens {tokens.shape}")
    objective.inputs(config, tokens[:1], None, mask_token)  # raises if the mask token is missing
    share = 1 if mesh is None else mesh.shape.get(devices.DATA_AXIS, 1)
    if share > len(tokens):
        raise ValueError(
            f"{len(tokens)} calibration sequences for {share} devices: expected at least one for "
            "each device; give more sequences or use fewer devices"
        )
    step = sequences_per_step(len(tokens) // share, tokens.shape[1]) * share
    return Calibration(tokens, mask, batch_size or step, mask_token, mesh)
