"""MLPs of a function: neurons by importance, the refitted last matrix, the leaves of a width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lordjax.allocation.plan import SiteSize
from lordjax.compression.site_factors import collect_factors, launch_factorization
from lordjax.functions.fitting.linear import Fitted, as_leaf, read, summed_errors
from lordjax.functions.placing import placed_like
from lordjax.functions.sites import FunctionModule, Sites
from lordjax.functions.statistics import Fold, of_matrix, site_matrices
from lordjax.kernels.layout import Layout, Rearranged
from lordjax.kernels.pruned import Pruned
from lordjax.methods import METHODS
from lordjax.models.sites import Site

# Widths go up by several tiles at a time, as for MLPs of our own models.
TILES = 4


def fit_mlp(
    method: str,
    module: FunctionModule,
    table: Sites,
    leaves: Mapping[str, Any],
    folds: Sequence[Fold],
) -> Fitted:
    """Orders the neurons of every MLP of a stack, and refits its last matrix for every width.

    Args:
      method: a key of `METHODS` that has an ``mlp`` module.
      module: the MLP.
      table: the sites.
      leaves: path -> parameter.
      folds: statistics.
    """
    row, needs = table[module.down], METHODS[method].modules["mlp"].needs
    paths = (*module.ups, module.down)
    site, factors = Site(module.name, 0, "mlp", paths, ""), []
    for i, down in enumerate(site_matrices(row, leaves[row.path])):
        own = [
            of_matrix(read(fold.get(row.path, {}), needs, row.path, method), row, i)
            for fold in folds or ({},)
        ]
        own = [
            {"moments" if n == "input" else n: s for n, s in jax.device_get(each).items()}
            for each in own
        ]
        kernels = {"down": down}
        running = launch_factorization(method, site, kernels, own, meshed=False)
        factors.append(collect_factors(method, module.name, kernels, running))
    count = int(np.prod(row.stack))
    unit = count * (row.fan_out + sum(table[path].fan_in for path in module.ups))
    size = SiteSize(unit * module.width, unit, count * row.fan_out, tiles=TILES)
    return Fitted(size, factors, summed_errors(factors))


def mlp_leaves(
    method: str,
    fitted: Fitted,
    module: FunctionModule,
    table: Sites,
    width: int,
    leaves: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the leaves of an MLP with fewer neurons.

    Args:
      method: the method of the factors.
      fitted: the factors.
      module: the MLP.
      table: the sites.
      width: number of neurons that stay.
      leaves: path -> parameter.
    """
    row, prune = table[module.down], METHODS[method].modules["mlp"].prune
    downs = site_matrices(row, leaves[row.path])
    pairs = zip(downs, fitted.factors, strict=True)
    made = [prune({"down": down}, each, width)["down"] for down, each in pairs]
    order = [np.asarray(each.parts["order"])[:width] for each in fitted.factors]
    stacks = {row.path: (np.stack(made), True)}
    for path in module.ups:
        ups = np.asarray(site_matrices(table[path], leaves[path]))
        kept = [up[:, own] for up, own in zip(ups, order, strict=True)]
        stacks[path] = np.stack(kept), False
    new = {}
    for path, (arrays, rows) in stacks.items():
        site, leaf = table[path], leaves[path]
        arrays = arrays.astype(leaf.dtype).reshape(*site.stack, *arrays.shape[1:])
        new[path] = as_leaf(site, Pruned(arrays, rows, module.width), leaf)
    for path in module.biases:
        new[path] = _bias(leaves[path], order, module.width)
    return new


def _bias(leaf: Any, order: Sequence[np.ndarray], width: int) -> Rearranged:
    """Returns a vector ``[*stack, neurons]`` without the neurons that go."""
    rows = np.asarray(leaf).reshape(len(order), width)
    kept = np.stack([row[own] for row, own in zip(rows, order, strict=True)])
    kept = kept.reshape(*leaf.shape[:-1], 1, kept.shape[-1])
    layout = Layout((width,), (), (), ((width, 1),))
    return Rearranged(placed_like(Pruned(kept, False, width), leaf), layout)
