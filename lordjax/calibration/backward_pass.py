"""The backward pass of calibration: collects statistics of loss gradients in every block.

`gradient_statistics` sweeps forward and then backward over all blocks, by
`observers.observe_gradients`. `site_gradients` hands the statistics of one site to a method.
`forward_pass` collects statistics of activations.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import QUERIES, on_device, state_shapes
from lordjax.calibration.hidden_states import States, open_states
from lordjax.calibration.observers import embed, observe, observe_gradients
from lordjax.calibration.statistics import HeadMoments, MeanSquare, SecondMoment, merged
from lordjax.calibration.table_statistics import Ends
from lordjax.kernels import trees
from lordjax.methods import Method, linalg
from lordjax.models import objective
from lordjax.models.config import ModelConfig
from lordjax.models.objective import loss_gradient
from lordjax.models.sites import LAST_LAYER, Site, sites_for
from lordjax.models.source import Source
from lordjax.runtime.mesh import DATA_AXIS, Mesh, num_shards, shard_batch, shard_map_batch, to_host
from lordjax.runtime.progress import Clock
from lordjax.storage.store import Entries, MemoryStore, Store

# Bytes of hidden states that a sweep in memory may hold. A few batches are enough to make the time
# for reading blocks small.
STATE_BYTES = 2**28


def few_gradients(
    source: Source,
    calibration: Calibration,
    method: Method,
    sequences: int | None,
    clock: Clock,
    store: Store | None = None,
) -> Mapping[int, list[dict[str, dict[str, Any]]]]:
    """Collects `gradient_statistics` of a subset of the calibration set.

    Args:
      source: the model.
      calibration: calibration tokens.
      method: the method that reads the statistics.
      sequences: largest number of sequences to use, evenly spread; None: all.
      clock: reports progress.
      store: finished results of this and earlier processes; None: results stay in memory.

    Returns:
      layer -> statistics of each fold, as `gradient_updates` describes; empty if the method reads
      none.

    Raises:
      ValueError: if the method reads gradients, but the model has no loss.
    """
    if not needs_gradients(method, source.config):
        return {}
    objective.objective_for(source.config)  # raises before any work is done
    few = calibration.spread(sequences)
    # A backward pass holds every activation of a block: half the batch takes about the same memory.
    few = dataclasses.replace(few, batch_size=half_batch(few))
    return gradient_statistics(source, few, method, clock, store)


def half_batch(calibration: Calibration) -> int:
    """Returns half the batch size, as a multiple of the number of devices that split a batch."""
    share = 1 if calibration.mesh is None else calibration.mesh.shape.get(DATA_AXIS, 1)
    return max(share, calibration.batch_size // 2 // share * share)


def gradient_statistics(
    source: Source,
    calibration: Calibration,
    method: Method,
    clock: Clock,
    store: Store | None = None,
    ends: Ends | None = None,
) -> Mapping[int, list[dict[str, dict[str, Any]]]]:
    """Collects statistics of loss gradients in every block, by sweeps over the blocks.

    In memory, a sweep takes as many batches as have hidden states of at most `STATE_BYTES`: the
    more batches, the less often a block is read. On disk there is one sweep. It keeps the states
    before every block, and the statistics of a block are finished and stored before those of the
    next one are started.

    Args:
      source: the model.
      calibration: calibration tokens.
      method: says which statistics are collected, and at which sites.
      clock: reports progress.
      store: finished results of this and earlier processes; None: results stay in memory.
      ends: sees what comes out of the last block and what goes back into the first one; a run that
        was killed does not show it again.

    Returns:
      layer -> statistics of each fold, as `gradient_updates` describes.
    """
    store = MemoryStore() if store is None else store
    found = Entries(store, "gradients", int)
    if len(found) < source.config.num_layers:
        sweeps = [calibration] if store.durable else _sweeps(calibration, source.config)
        read = functools.partial(_read_non_block_params, source)
        # With a store on disk memory is short, so these parameters are read again for every use.
        outer = read if store.durable else functools.cache(read)
        run = _Sweeps(source, method, clock, store, outer, ends)
        for number, sweep in enumerate(sweeps):
            run.sweep(sweep, number, len(sweeps))
    return found


def _read_non_block_params(source: Source) -> Any:
    return on_device(source.non_block_params())


def _sweeps(calibration: Calibration, config: ModelConfig) -> list[Calibration]:
    """Splits the calibration set into sweeps whose hidden states take at most `STATE_BYTES`."""
    tokens = calibration.tokens
    sequence_bytes = tokens.shape[1] * config.hidden_size * config.num_layers * 4
    batch = calibration.batch_size
    size = batch * max(1, STATE_BYTES // (sequence_bytes * min(batch, len(tokens))))
    return [calibration.rows(slice(start, start + size)) for start in range(0, len(tokens), size)]


@dataclasses.dataclass
class _Sweeps:
    """Sweeps over the blocks, each forward and then backward with some of the sequences.

    Attributes:
      source: the model.
      method: says which statistics are collected.
      clock: reports progress.
      store: where the statistics are stored.
      non_block_params: function that reads the parameters outside the blocks.
      ends: sees both ends of the model; None: nothing does.
      bases: layer -> bases in which its gradients are stored, for the next sweeps.
    """

    source: Source
    method: Method
    clock: Clock
    store: Store
    non_block_params: Callable[[], Any]
    ends: Ends | None = None
    bases: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def sweep(self, calibration: Calibration, number: int, count: int) -> None:
        """Runs sweep ``number`` of ``count`` and adds to the statistics of earlier sweeps."""
        config, layers = self.source.config, self.source.config.num_layers
        shapes = state_shapes(self.source, calibration)
        back = open_states(self.store, "backward", shapes, calibration.mesh)
        states = open_states(self.store, "forward", shapes, calibration.mesh)
        before, after = 2 * layers * number, 2 * layers * (count - number - 1)
        if back.at is None:
            self._forward(calibration, states, before, after + layers)
            outer, step = self.non_block_params(), loss_gradient
            if calibration.mesh is not None:
                step = functools.partial(_shared_gradient, mesh=calibration.mesh)
            for j, batch in enumerate(calibration.batches()):
                goals = objective.targets(config, *batch)
                gradient = step(outer, states[j], goals, batch[1], config=config)
                back[j] = shard_batch(gradient, calibration.mesh)
                if self.ends is not None:
                    self.ends.last(outer, states[j], goals)
            del outer
            back.commit(layers)
        start = layers if back.at is None else back.at
        done = before + 2 * layers - start
        for i in self.clock.run("gradients", range(start - 1, -1, -1), done, after):
            states.back(i)
            self._backward(i, calibration, states, back, more=number > 0)
            back.commit(i)
        if self.ends is not None:
            outer = self.non_block_params()
            for j, (tokens, mask) in enumerate(calibration.batches()):
                x = calibration.read(config, tokens, mask)
                self.ends.first(outer, x, mask, back[j])
        states.close()
        back.close()

    def _forward(self, calibration: Calibration, states: States, done: int, left: int) -> None:
        """Computes and keeps the states before every block, and those after the last one."""
        config, layers = self.source.config, self.source.config.num_layers
        if states.at is None:
            outer = self.non_block_params()
            for j, (tokens, mask) in enumerate(calibration.batches()):
                x = calibration.read(config, tokens, mask)
                states[j] = shard_batch(embed(outer, x, mask, config=config), calibration.mesh)
            del outer
            states.commit(0, keep=True)
        start = states.at or 0
        for i in self.clock.run("gradients", range(start, layers), done + start, left):
            self._ahead(i, calibration, states)
            states.commit(i + 1, keep=True)

    def _ahead(self, i: int, calibration: Calibration, states: States) -> None:
        """Runs block ``i`` on all sequences; its parameters are freed before the next block's."""
        block = on_device(self.source.block(i), calibration.mesh)
        config, window = self.source.config, self.source.config.window(i)
        for j, mask in enumerate(calibration.masks()):
            y, _ = observe(block, states[j], mask, {}, config=config, sliding_window=window)
            states[j] = shard_batch(y, calibration.mesh)

    def _backward(
        self, i: int, calibration: Calibration, states: States, back: States, *, more: bool
    ) -> None:
        """Collects a block's statistics and replaces the gradients after it by those before it."""
        config, key = self.source.config, f"gradients/{i}"
        block = on_device(self.source.block(i), calibration.mesh)
        if more:
            folds, bases = self.store[key], self.bases[i]
        else:
            empty, bases = empty_gradients(block, self.method, config)
            folds = [jax.tree.map(jnp.zeros_like, empty) for _ in range(calibration.num_folds)]
        if not self.store.durable:
            self.bases[i] = bases
        batches = zip(calibration.masks(), calibration.batch_folds(), strict=True)
        for j, (mask, fold) in enumerate(batches):
            gradient, folds[fold] = observe_gradients(
                block,
                states[j],
                mask,
                back[j],
                bases,
                folds[fold],
                config=config,
                sliding_window=config.window(i),
                shares=num_shards(len(states[j]), calibration.mesh),
            )
            back[j] = shard_batch(gradient, calibration.mesh)
        self.store[key] = to_host(folds, calibration.mesh)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _shared_gradient(
    non_block_params: Any, x: Any, goals: Any, mask: Any, *, config: ModelConfig, mesh: Mesh
) -> Any:
    """Computes `loss_gradient` of a batch that devices split."""
    run = functools.partial(loss_gradient, config=config)
    return shard_map_batch(run, len(x), mesh)(non_block_params, x, goals, mask)


@jax.jit
def gradient_basis(kernel: Float[Array, "in out"]) -> Float[Array, "out m"] | None:
    """Returns the basis in which gradients at a kernel's output are stored; None: no basis.

    It is cheap, so it is computed again instead of stored for every kernel of the model.
    """
    return linalg.row_space(kernel.astype(jnp.float32))


def _gradient_keys(method: Method, site: Site) -> dict[str, str]:
    """Which gradient statistics a method reads for a site: name -> key in the accumulators."""
    needs = method.needs if site.kind == "linear" else method.modules[site.kind].needs
    path = LAST_LAYER.get(site.kind, site.path)
    names = ("gradients", "row_fisher", "fisher", "weighted_inputs", "weighted_squares")
    keys = {**dict.fromkeys(names, path), "gates": QUERIES}
    return {name: key for name, key in keys.items() if name in needs}


def needs_gradients(method: Method, config: ModelConfig) -> bool:
    """Returns whether a method reads statistics of gradients."""
    return any(_gradient_keys(method, site) for site in sites_for(method.kinds, config))


def site_gradients(
    folds: Sequence[Mapping[str, Mapping[str, Any]]], method: Method, site: Site, kernel: Any
) -> list[dict[str, Any]]:
    """Returns the gradient statistics that a method's ``factor`` reads for one site, by name.

    Args:
      folds: gradient statistics of the block, of each fold.
      method: says which statistics are read.
      site: a site of the block.
      kernel: the dense kernel of a linear site; its row space is the basis of the gradients.

    Returns:
      The statistics of each fold. The basis is the same array in all of them.
    """
    keys = _gradient_keys(method, site)
    found = [
        {name: stats[name][key] for name, key in keys.items() if name in stats} for stats in folds
    ]
    if site.kind == "linear" and "gradients" in found[0]:
        basis = gradient_basis(kernel)
        found = [stats | {"basis": basis} for stats in found]
    return found


def site_total(folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the statistics of one site, of all folds together.

    Args:
      folds: statistics of the site, of each fold. The basis of the gradients is no sum.
    """
    shared = {name: folds[0][name] for name in ("basis",) if name in folds[0]}
    sums = [{name: stat for name, stat in own.items() if name not in shared} for own in folds]
    return merged(sums) | shared


def empty_gradients(
    block: Mapping[str, Any], method: Method, config: ModelConfig
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Returns zero accumulators of one block, and the bases of its gradients.

    Gradients at a module's output have no basis.

    Args:
      block: parameters of the block, nested.
      method: says which statistics are collected.
      config: the architecture.
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
