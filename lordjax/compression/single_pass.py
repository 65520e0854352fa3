"""One pass over the untouched model: statistics of blocks, and the factors of their sites.

Without a mesh a block is factored before the next one is run. A mesh of N devices would be idle
then: nearly all work of a block is its MLP's, which is one site. So the statistics of N blocks are
collected, a group, and their sites are factored together, each on one device (`mesh.share_jobs`).
Every process keeps the statistics of sites that its own devices factor, on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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

SiteTask = tuple[int, Site]  # a site of a block
Gradients = Mapping[int, Mapping[str, Mapping[str, Any]]]


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
    """One pass over the untouched model: statistics of a group of blocks, factors, the next group.

    Returns:
      site path -> factors, which are in ``store``; layer -> block influence, if asked for.
    """
    row, mesh = METHODS[method], calibration.mesh
    sites = sites_for(row.kinds, source.config)
    factors = Entries(store, "factors")
    influences = Entries(store, "influence", int)

    def done(i: int) -> bool:
        lacks = any(site_path(i, site) not in factors for site in sites)
        return not lacks and (i in influences or not influence)

    reads = calibration if influence or needs_activations(row) else None
    states, left = resume_pass(store, "statistics", source, reads, done)
    run = _Pass(source, calibration, method, gradients, store)
    size, shares = 1 if mesh is None else mesh.size, []
    inputs: dict[SiteTask, Any] = {}
    for i in clock.run("statistics and factors", left, left.start):
        number = (i - left.start) % size  # in its group
        if number == 0:
            shares = run.shares(range(i, min(i + size, left.stop)))
        inputs |= run.collect(i, states, shares, influence=influence)
        if number + 1 < size and i + 1 < left.stop:
            if states is not None:  # older ones stay on disk: a killed process goes back to them
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
    """What is the same for all blocks.

    Attributes:
      source: the model.
      calibration: tokens, and the devices.
      method: a key of `METHODS`.
      gradients: layer -> statistics of the backward pass.
      store: where factors are that are not made again, and influences go.
    """

    source: Source
    calibration: Calibration
    method: str
    gradients: Gradients
    store: Store

    def shares(self, layers: range) -> list[list[SiteTask]]:
        """What each device has to factor in a group of blocks, from shapes alone.

        A process that was killed before a block's last site has made the others.
        """
        config, mesh = self.source.config, self.calibration.mesh
        sites = sites_for(METHODS[self.method].kinds, config)
        jobs = [
            (i, site)
            for i in layers
            for site in sites
            if f"factors/{site_path(i, site)}" not in self.store
        ]
        if mesh is None:
            return [jobs]
        blocks = {i: _shapes(self.source.block(i)) for i in layers}
        costs, row = {}, METHODS[self.method]
        for i, site in jobs:
            gradients = self.gradients.get(i, {})
            shapes = input_shapes(row, site, blocks[i], gradients, config)
            costs[i, site] = flops.total(site_work(self.method, site, *shapes, meshed=True))
        return assign_tasks(costs, mesh.size)

    def collect(
        self, i: int, states: States | None, shares: list[list[SiteTask]], *, influence: bool
    ) -> dict[SiteTask, tuple[Any, dict[str, Any]]]:
        """Kernels of the jobs of a block, and what its forward pass says of them.

        Of jobs of other processes only shapes.
        """
        config, mesh, row = self.source.config, self.calibration.mesh, METHODS[self.method]
        block, sites = on_device(self.source.block(i), mesh), sites_for(row.kinds, config)
        keys = activation_keys(block, sites, row)
        stats = {}
        if states is not None:
            stats = block_statistics(
                block, i, states, self.calibration, sites, keys, config, influence=influence
            )
        if influence:
            self.store[f"influence/{i}"] = float(stats.pop(INFLUENCE).mean())
        # As it is stored: on the device a program's own arguments are enough.
        block = self.source.block(i)
        found = {}
        own = None if mesh is None else local_tasks(shares, mesh)
        for job in (job for share in shares for job in share if job[0] == i):
            names = {name: stats[key] for name, key in keys[job[1].path].items()}
            both = site_kernels(job[1], block, config), names
            found[job] = both if own is None or job in own else jax.tree.map(_outline, both)
        return found

    def factor(
        self, shares: list[list[SiteTask]], inputs: dict[SiteTask, Any], clock: Clock
    ) -> None:
        """Puts the factors of every task into ``store``, and empties ``inputs``."""
        mesh, row, begun = self.calibration.mesh, METHODS[self.method], {}

        def begin(job: SiteTask) -> AnyFactors:
            i, site = job
            begun[job], stats = inputs.pop(job)  # a site's sums go when it is factored
            stats |= site_gradients(self.gradients.get(i, {}), row, site, begun[job])
            return launch_factorization(
                self.method, site, begun[job], stats, meshed=mesh is not None
            )

        with clock.part("factors"):
            for job, running in run_tasks(begin, shares, mesh):
                path = site_path(*job)
                found = collect_factors(self.method, path, begun.pop(job), running)
                self.store[f"factors/{path}"] = found
                del running, found  # before the next one begins


def _shapes(tree: Any) -> Any:
    """Shapes and dtypes of arrays, which are not read."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def _outline(a: Any) -> np.ndarray:
    """An array of a shape that takes no memory, for what is only traced."""
    return np.broadcast_to(np.zeros((), a.dtype), a.shape)
