"""Loss gradients inside every block: what methods read of them, and the sweeps that take them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import QUERIES, on_device, state_shapes
from lordjax.calibration.hidden_states import States, open_states
from lordjax.calibration.observers import embed, observe, observe_gradients
from lordjax.calibration.statistics import HeadMoments, MeanSquare, SecondMoment
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

# Hidden states that a backward sweep may hold; a few batches already hide the reading of blocks.
STATE_BYTES = 2**28


def few_gradients(
    source: Source,
    calibration: Calibration,
    method: Method,
    windows: int | None,
    clock: Clock,
    store: Store | None = None,
) -> Mapping[int, dict[str, dict[str, Any]]]:
    """`gradient_statistics` of ``windows`` of the calibration; empty if the method reads none."""
    if not needs_gradients(method, source.config):
        return {}
    objective.objective_for(source.config)  # raises before the work begins
    few = calibration.spread(windows)
    # A backward pass holds every activation of a block: half the batch, about the same memory.
    few = dataclasses.replace(few, batch_size=half_batch(few))
    return gradient_statistics(source, few, method, clock, store)


def half_batch(calibration: Calibration) -> int:
    """Windows of a step that needs twice the memory; as many for every device."""
    share = 1 if calibration.mesh is None else calibration.mesh.shape.get(DATA_AXIS, 1)
    return max(share, calibration.batch_size // 2 // share * share)


def gradient_statistics(
    source: Source,
    calibration: Calibration,
    method: Method,
    clock: Clock,
    store: Store | None = None,
) -> Mapping[int, dict[str, dict[str, Any]]]:
    """Loss gradients inside every block, by forward and backward sweeps over the blocks.

    In memory a sweep takes as many batches as their hidden states fit `STATE_BYTES`: the more, the
    less often a block is read. On disk there is one sweep: it keeps the states before every block,
    and the statistics of a block are complete, and out of memory, before the next one's.

    Args:
      source: the model.
      calibration: tokens.
      method: says which statistics are taken, at which sites.
      clock: for progress.
      store: where statistics go, and where a killed process left them; None: in memory.

    Returns:
      layer -> statistics as in `collect.observe_gradients`.
    """
    store = MemoryStore() if store is None else store
    found = Entries(store, "gradients", int)
    if len(found) < source.config.num_layers:
        sweeps = [calibration] if store.durable else _sweeps(calibration, source.config)
        # Read again for every use where memory is short.
        rest = functools.partial(_rest, source)
        run = _Sweeps(
            source, method, clock, store, rest if store.durable else functools.cache(rest)
        )
        for number, sweep in enumerate(sweeps):
            run.sweep(sweep, number, len(sweeps))
    return found


def _rest(source: Source) -> Any:
    return on_device(source.non_block_params())


def _sweeps(calibration: Calibration, config: ModelConfig) -> list[Calibration]:
    """Calibrations of as many batches as their hidden states fit `STATE_BYTES`."""
    tokens, mask = calibration.tokens, calibration.mask
    row = tokens.shape[1] * config.hidden_size * config.num_layers * 4  # bytes of a window
    batch = calibration.batch_size
    rows = batch * max(1, STATE_BYTES // (row * min(batch, len(tokens))))
    cuts = [slice(start, start + rows) for start in range(0, len(tokens), rows)]
    return [
        dataclasses.replace(calibration, tokens=tokens[c], mask=None if mask is None else mask[c])
        for c in cuts
    ]


@dataclasses.dataclass
class _Sweeps:
    """Forward and backward over the blocks, windows by windows.

    Attributes:
      source: the model.
      method: says which statistics are taken.
      clock: for progress.
      store: where they go.
      rest: reads the parameters outside the blocks.
      bases: layer -> coordinates of its gradients, kept where there are several sweeps.
    """

    source: Source
    method: Method
    clock: Clock
    store: Store
    rest: Callable[[], Any]
    bases: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def sweep(self, windows: Calibration, number: int, count: int) -> None:
        """One sweep of ``count``; statistics of earlier ones are added to."""
        config, layers = self.source.config, self.source.config.num_layers
        shapes = state_shapes(self.source, windows)
        back = open_states(self.store, "backward", shapes, windows.mesh)
        states = open_states(self.store, "forward", shapes, windows.mesh)
        before, after = 2 * layers * number, 2 * layers * (count - number - 1)
        if back.at is None:
            self._forward(windows, states, before, after + layers)
            rest, step = self.non_block_params(), loss_gradient
            if windows.mesh is not None:
                step = functools.partial(_shared_gradient, mesh=windows.mesh)
            for j, batch in enumerate(windows.batches()):
                goals = objective.targets(config, *batch)
                gradient = step(rest, states[j], goals, config=config)
                back[j] = shard_batch(gradient, windows.mesh)
            del rest
            back.commit(layers)
        start = layers if back.at is None else back.at
        done = before + 2 * layers - start
        for i in self.clock.run("gradients", range(start - 1, -1, -1), done, after):
            states.back(i)
            self._backward(i, windows, states, back, more=number > 0)
            back.commit(i)
        states.close()
        back.close()

    def _forward(self, windows: Calibration, states: States, done: int, left: int) -> None:
        """The states before every block, and after the last one."""
        config, layers = self.source.config, self.source.config.num_layers
        if states.at is None:
            rest = self.non_block_params()
            for j, (tokens, mask) in enumerate(windows.batches()):
                x = windows.read(config, tokens, mask)
                states[j] = shard_batch(embed(rest, x, mask, config=config), windows.mesh)
            del rest
            states.commit(0, keep=True)
        start = states.at or 0
        for i in self.clock.run("gradients", range(start, layers), done + start, left):
            self._ahead(i, windows, states)
            states.commit(i + 1, keep=True)

    def _ahead(self, i: int, windows: Calibration, states: States) -> None:
        """Block ``i`` on all windows; its parameters go before the next one's come."""
        block = on_device(self.source.block(i), windows.mesh)
        config, window = self.source.config, self.source.config.window(i)
        for j, mask in enumerate(windows.masks()):
            y, _ = observe(block, states[j], mask, {}, config=config, window=window)
            states[j] = shard_batch(y, windows.mesh)

    def _backward(
        self, i: int, windows: Calibration, states: States, back: States, *, more: bool
    ) -> None:
        """Statistics of a block, and the gradients before it in place of those after it."""
        config, key = self.source.config, f"gradients/{i}"
        block = on_device(self.source.block(i), windows.mesh)
        if more:
            stats, bases = self.store[key], self.bases[i]
        else:
            stats, bases = empty_gradients(block, self.method, config)
        if not self.store.durable:
            self.bases[i] = bases
        for j, mask in enumerate(windows.masks()):
            gradient, stats = observe_gradients(
                block,
                states[j],
                mask,
                back[j],
                bases,
                stats,
                config=config,
                window=config.window(i),
                shares=num_shards(len(states[j]), windows.mesh),
            )
            back[j] = shard_batch(gradient, windows.mesh)
        self.store[key] = to_host(stats, windows.mesh)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _shared_gradient(rest: Any, x: Any, goals: Any, *, config: ModelConfig, mesh: Mesh) -> Any:
    """`loss_gradient` of a batch of `share_rows`."""
    run = functools.partial(loss_gradient, config=config)
    return shard_map_batch(run, len(x), mesh)(rest, x, goals)


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
