"""Factors of a function's sites for all ranks, and the leaves that a rank gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.allocation.plan import SiteSize
from lordjax.calibration.backward_pass import gradient_basis
from lordjax.compression.measured.held_out import predicted_errors
from lordjax.compression.site_factors import AnyFactors, collect_factors, launch_factorization
from lordjax.functions.placing import placed_like
from lordjax.functions.sites import FunctionSite
from lordjax.functions.statistics import Fold, of_matrix, site_matrices
from lordjax.kernels.base import Kernel
from lordjax.kernels.layout import Rearranged
from lordjax.kernels.low_rank import LowRank
from lordjax.methods import METHODS, Factors, truncate
from lordjax.models.sites import Site

WITHOUT_BIAS = "lord-linear"  # where a method corrects a bias and the site has none


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A site with its factors for all ranks: one item of a plan.

    Attributes:
      size: number of weights at a rank, of the whole stack.
      factors: factors of every matrix of the stack.
      errors: predicted errors at every rank, in sample and on unseen data.
      extra: weights that a compressed site adds (a corrected bias).
    """

    size: SiteSize
    factors: list[Any]  # `Factors` or `ModuleFactors`
    errors: tuple[np.ndarray, np.ndarray]
    extra: int = 0


def summed_errors(factors: Sequence[AnyFactors]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the summed errors of a stack at every rank, in sample and on unseen data."""
    spectrum = np.sum([np.asarray(each.spectrum, float) for each in factors], axis=0)
    unseen = [each.held_out for each in factors if each.held_out is not None]
    held_out = np.sum([np.asarray(each, float) for each in unseen], axis=0) if unseen else None
    return predicted_errors(Factors(None, None, spectrum, held_out=held_out))


def method_of(method: str, row: FunctionSite) -> str:
    """Returns the method of a site: where there is no bias, one that corrects none."""
    return WITHOUT_BIAS if METHODS[method].bias and row.bias is None else method


def read(own: Mapping[str, Any], names: Sequence[str], path: str, method: str) -> dict[str, Any]:
    """Returns some statistics of a site by the names that methods use.

    Raises:
      ValueError: if one was not collected; says how to collect it.
    """
    found = {}
    for name in names:
        keys = {"moments": ("input", "output"), "inputs": ("input",)}.get(name, (name,))
        key = next((key for key in keys if key in own), None)
        if key is None:
            raise ValueError(
                f"{path}: method {method!r} needs {name}, which the statistics lack; call collect "
                f"with method={method!r}, and with a loss if it needs gradients"
            )
        found[key if name == "moments" else name] = own[key]
    return found


def fit_linear(method: str, row: FunctionSite, leaf: Any, folds: Sequence[Fold]) -> Fitted:
    """Factors every matrix of a site.

    Args:
      method: a key of `METHODS`.
      row: the site.
      leaf: its parameter.
      folds: statistics; none for methods without data.
    """
    name, count = method_of(method, row), int(np.prod(row.stack))
    needs = METHODS[name].needs
    site, factors = Site(row.path, 0, "linear", (row.path,), ""), []
    for i, kernel in enumerate(site_matrices(row, leaf)):
        own = [
            of_matrix(read(fold.get(row.path, {}), needs, row.path, name), row, i) if needs else {}
            for fold in folds or ({},)
        ]
        if "gradients" in needs:
            basis = gradient_basis(kernel)
            own = [stats | {"basis": basis} for stats in own]
        running = launch_factorization(name, site, kernel, own, meshed=False)
        factors.append(collect_factors(name, row.path, kernel, running))
    one = SiteSize.matrix(row.fan_in, row.fan_out)
    size = SiteSize(count * one.dense, count * one.unit, count * one.bias)
    extra = size.bias if METHODS[name].bias else 0
    return Fitted(size, factors, summed_errors(factors), extra)


def linear_leaves(
    fitted: Fitted, row: FunctionSite, rank: int, leaves: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the leaves of a site at a rank: its kernel, and its bias where that changes.

    Args:
      fitted: the factors.
      row: the site.
      rank: the rank.
      leaves: path -> parameter.
    """
    leaf, made = leaves[row.path], [truncate(each, rank) for each in fitted.factors]
    dtype = leaf.dtype
    parts = [
        np.stack([np.asarray(getattr(kernel, side), dtype) for kernel, _ in made])
        for side in ("left", "right")
    ]
    left, right = (part.reshape((*row.stack, *part.shape[1:])) for part in parts)
    new: dict[str, Any] = {row.path: as_leaf(row, LowRank(left, right), leaf)}
    shifts = [shift for _, shift in made if shift is not None]
    if shifts and row.bias is not None:
        old = leaves[row.bias]
        shift = np.stack([np.asarray(each, np.float32) for each in shifts]).reshape(old.shape)
        new[row.bias] = placed_like(np.asarray(np.asarray(old, np.float32) + shift, old.dtype), old)
    return new


def as_leaf(row: FunctionSite, kernel: Any, leaf: Any) -> Any:
    """Returns matrices ``[*stack, in, out]`` as they stand for a parameter, on its devices.

    Args:
      row: the site.
      kernel: an array or a kernel.
      leaf: the parameter that it replaces.
    """
    layout, dtype = row.layout, jnp.dtype(leaf.dtype)
    kernel = placed_like(kernel, leaf, row.matrix)
    if not isinstance(kernel, Kernel) and kernel.dtype == dtype:
        return layout.to_leaf(kernel)
    if layout.plain and kernel.dtype == dtype:
        return kernel
    return Rearranged(kernel, layout, None if kernel.dtype == dtype else dtype.name)


def stacked(kernels: Sequence[Any], row: FunctionSite) -> Any:
    """Returns the kernels of all matrices of a site as one of shape ``[*stack, in, out]``."""

    def stack(*arrays: Any) -> Any:
        found = np.stack([np.asarray(a) for a in arrays])
        return found.reshape((*row.stack, *found.shape[1:]))

    return jax.tree.map(stack, *kernels)
