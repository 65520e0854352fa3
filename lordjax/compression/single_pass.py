"""One pass over the original model: statistics of blocks, and the factors of their sites.

Without a mesh a block is factored before the next one runs. With a mesh of N devices most of them
would be idle then, because nearly all work of a block is one site: its MLP. So the statistics of N
blocks, a batch of layers, are collected first. Then their sites are factored together, each on one
device (`mesh.assign_tasks`). Every process keeps the statistics of the sites that its own devices
factor, on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lordjax.calibration.backward_pass import site_gradients
from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import (
    INFLUENCE,
    activation_keys,
    block_statistics,
    needs_activations,
    on_device,
    resume_pass,
)
from lordjax.calibration.hidden_states import States
from lordjax.calibration.statistics import merged
from lordjax.compression.site_factors import (
    AnyFactors,
    collect_factors,
    input_shapes,
    launch_factorization,
    site_kernels,
    site_work,
)
from lordjax.methods import METHODS
from lordjax.models.sites import Site, site_path, sites_for
from lordjax.models.source import Source
from lordjax.runtime import flops
from lordjax.runtime.mesh import assign_tasks, local_tasks, run_tasks
from lordjax.runtime.progress import Clock
from lordjax.storage.store import Entries, Store

SiteTask = tuple[int, Site]  # block number, site
Gradients = Mapping[int, Sequence[Mapping[str, Mapping[str, Any]]]]  # layer -> folds


def factor_all(
    source: Source,
    calibration: Calibration,
    method: str,
    gradients: Gradients,
    clock: Clock,
    store: Store,
    *,
    keep_gradients: bool,
    influence: bool,
) -> tuple[Mapping[str, AnyFactors], dict[int, float]]:
    """Collects the statistics of all blocks and factors their sites, a batch of layers at a time.

    Args:
      source: the original model.
      calibration: tokens, and the devices.
      method: a key of `METHODS`.
      gradients: layer -> gradient statistics.
      clock: reports progress.
      store: where factors go, and where a run that was killed left them.
      keep_gradients: whether gradient statistics are needed after this pass.
      influence: whether block influence is collected, too.

    Returns:
      Site path -> factors, which are in ``store``; layer -> block influence, if asked for.
    """
    mesh = calibration.mesh
    sites = sites_for(METHODS[method].kinds, source.config)
    factors = Entries(store, "factors")
    influences = Entries(store, "influence", int)

    def done(i: int) -> bool:
        factored = all(site_path(i, site) in factors for site in sites)
        return factored and (i in influences or not influence)

    reads = calibration if influence or needs_activations(METHODS[method]) else None
    states, left = resume_pass(store, "statistics", source, reads, done)
    run = _Pass(source, calibration, method, gradients, store)
    size, shares = 1 if mesh is None else mesh.size, []
    inputs: dict[SiteTask, Any] = {}
    for i in clock.run("statistics and factors", left, left.start):
        number = (i - left.start) % size  # position in its batch of layers
        if number == 0:
            shares = run.shares(range(i, min(i + size, left.stop)))
        inputs |= run.collect(i, states, shares, influence=influence)
        if number + 1 < size and i + 1 < left.stop:
            if states is not None:  # older states stay on disk: a killed run goes back to them
                states.commit(i + 1, keep=store.durable)
            continue
        run.factor(shares, inputs, clock)
        if not keep_gradients:
            for j in range(i - number, i + 1):
                store.release(f"gradients/{j}")
        if states is not None:
            states.commit(i + 1)
    if states is not None:
        states.close()
    return factors, dict(influences)


@dataclasses.dataclass
class _Pass:
    """What stays the same during a pass.

    Attributes:
      source: the original model.
      calibration: tokens, and the devices.
      method: a key of `METHODS`.
      gradients: layer -> gradient statistics.
      store: where factors and block influences go; factors that are there are not made again.
    """

    source: Source
    calibration: Calibration
    method: str
    gradients: Gradients
    store: Store

    def shares(self, layers: range) -> list[list[SiteTask]]:
        """Returns the tasks of each device for a batch of layers, from shapes alone.

        Sites that a run factored before it was killed are left out.
        """
        config, mesh = self.source.config, self.calibration.mesh
        sites = sites_for(METHODS[self.method].kinds, config)
        tasks = [
            (i, site)
            for i in layers
            for site in sites
            if f"factors/{site_path(i, site)}" not in self.store
        ]
        if mesh is None:
            return [tasks]
        blocks = {i: _shapes(self.source.block(i)) for i in layers}
        costs, method = {}, METHODS[self.method]
        for i, site in tasks:
            gradients = self.gradients.get(i, [{}])[0]
            shapes = input_shapes(method, site, blocks[i], gradients, config)
            costs[i, site] = flops.total(site_work(self.method, site, *shapes, meshed=True))
        return assign_tasks(costs, mesh.size)

    def collect(
        self, i: int, states: States | None, shares: list[list[SiteTask]], *, influence: bool
    ) -> dict[SiteTask, tuple[Any, list[dict[str, Any]]]]:
        """Returns kernels and the folds' activation statistics of the tasks of a block.

        Tasks of other processes get arrays of zeros that take no memory: only shapes matter.
        """
        config, mesh, method = self.source.config, self.calibration.mesh, METHODS[self.method]
        block, sites = on_device(self.source.block(i), mesh), sites_for(method.kinds, config)
        keys = activation_keys(block, sites, method)
        folds: list[dict[str, Any]] = [{} for _ in range(self.calibration.num_folds)]
        if states is not None:
            folds = block_statistics(
                block, i, states, self.calibration, sites, keys, config, influence=influence
            )
        if influence:
            influences = merged([stats.pop(INFLUENCE) for stats in folds])
            self.store[f"influence/{i}"] = float(influences.mean())
        # In its stored dtype: each program moves its own arguments to the device.
        block = self.source.block(i)
        found = {}
        own = None if mesh is None else local_tasks(shares, mesh)
        for task in (task for share in shares for task in share if task[0] == i):
            names = keys[task[1].path].items()
            own_stats = [{name: stats[key] for name, key in names} for stats in folds]
            both = site_kernels(task[1], block, config), own_stats
            found[task] = both if own is None or task in own else jax.tree.map(_placeholder, both)
        return found

    def factor(
        self, shares: list[list[SiteTask]], inputs: dict[SiteTask, Any], clock: Clock
    ) -> None:
        """Puts the factors of every task into the store, and empties ``inputs``."""
        mesh, method, begun = self.calibration.mesh, METHODS[self.method], {}

        def begin(task: SiteTask) -> AnyFactors:
            i, site = task
            begun[task], folds = inputs.pop(task)  # frees a site's sums once it is factored
            gradients = self.gradients.get(i) or [{}] * len(folds)
            gradients = site_gradients(gradients, method, site, begun[task])
            folds = [stats | own for stats, own in zip(folds, gradients, strict=True)]
            return launch_factorization(
                self.method, site, begun[task], folds, meshed=mesh is not None
            )

        with clock.part("factors"):
            for task, running in run_tasks(begin, shares, mesh):
                path = site_path(*task)
                found = collect_factors(self.method, path, begun.pop(task), running)
                self.store[f"factors/{path}"] = found
                del running, found  # frees them before the next task begins


def _shapes(tree: Any) -> Any:
    """Returns the shapes and dtypes of arrays without reading them."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def _placeholder(a: Any) -> np.ndarray:
    """Returns zeros of an array's shape that take no memory, for arguments that are only traced."""
    return np.broadcast_to(np.zeros((), a.dtype), a.shape)
