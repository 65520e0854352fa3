"""Statistics of a function's products, as `lordjax.collect` returns them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lordjax.functions.held_out import HeldOut
from lordjax.functions.placing import on_host
from lordjax.functions.sites import FunctionSite, Sites

Fold = dict[str, dict[str, Any]]  # path -> name -> statistic, with leading axes of the stack


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of the products of a function.

    Attributes:
      sites: the function's parameters.
      folds: statistics of one or two groups of batches; with two, errors are judged on the other.
      checksums: path -> checksum of the parameter that the statistics were taken with.
      unweighted: paths whose vectors fit no weight per token, so that all of them count.
      loss: whether gradients of a loss were taken.
      held_out: batches that no statistic has seen, with which predicted losses are checked; None if
        there were too few, or no loss.
    """

    sites: Sites
    folds: tuple[Fold, ...]
    checksums: Mapping[str, int]
    unweighted: tuple[str, ...] = ()
    loss: bool = False
    held_out: HeldOut | None = None

    def __or__(self, other: Statistics) -> Statistics:
        """Returns the statistics of the sites of both, which were taken in several passes.

        Raises:
          ValueError: if the other ones are those of another function, tree or number of folds, or
            if a site is in both.
        """
        if self.sites.function != other.sites.function or len(self.folds) != len(other.folds):
            raise ValueError(
                "the statistics are those of another function or of other batches (fingerprints "
                f"{self.sites.function} and {other.sites.function}, {len(self.folds)} and "
                f"{len(other.folds)} folds); collect all groups with the same function and batches"
            )
        both = set(self.folds[0]) & set(other.folds[0])
        if both:
            raise ValueError(f"{min(both)}: is in both statistics; collect every site once")
        return Statistics(
            self.sites,
            tuple({**a, **b} for a, b in zip(self.folds, other.folds, strict=True)),
            {**self.checksums, **other.checksums},
            (*self.unweighted, *other.unweighted),
            self.loss and other.loss,
            self.held_out,
        )

    def check(self, leaves: Mapping[str, Any]) -> None:
        """Raises ValueError unless the statistics were taken with these parameters.

        Args:
          leaves: path -> parameter, of all sites.
        """
        for path, row in ((path, self.sites[path]) for path in self.folds[0]):
            leaf = leaves.get(path)
            if leaf is None or tuple(leaf.shape) != row.shape:
                got = "nothing" if leaf is None else f"{list(leaf.shape)}"
                raise ValueError(
                    f"{path}: the statistics are those of another tree; expected "
                    f"{list(row.shape)}, got {got}; collect them with this tree"
                )
        now = checksums({path: leaves[path] for path in self.checksums})
        other = [path for path, value in self.checksums.items() if now[path] != value]
        if other:
            raise ValueError(
                f"{other[0]}: its values are not those that the statistics were taken with; "
                "collect them with these parameters"
            )


def checksums(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Returns a checksum of each array, the same for every sharding."""
    return {path: int(value) for path, value in jax.device_get(_checksums(dict(leaves))).items()}


@jax.jit
def _checksums(leaves: dict[str, Any]) -> dict[str, Any]:
    def one(leaf: Any) -> Any:
        values = jnp.asarray(leaf).astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
        place = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape)
        # Mixed as in MurmurHash3: a plain sum would miss powers of two and permutations.
        mixed = bits + place * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return {path: one(leaf) for path, leaf in leaves.items()}


def inner_sites(sites: Sites) -> frozenset[str]:
    """Returns the paths of the last matrices of MLPs, whose inputs are neurons."""
    return frozenset(module.down for module in sites.modules)


def site_matrices(row: FunctionSite, leaf: Any) -> Any:
    """Returns the matrices of a parameter as ``[matrices, in, out]``."""
    matrices = row.layout.to_matrix(jnp.asarray(on_host(leaf)))
    return matrices.reshape(math.prod(row.stack), row.fan_in, row.fan_out)


def of_matrix(statistics: Mapping[str, Any], row: FunctionSite, index: int) -> dict[str, Any]:
    """Returns the statistics of one matrix of a stack."""
    depth = len(row.stack)
    return jax.tree.map(
        lambda a: a.reshape(-1, *a.shape[depth:])[index] if depth else a, on_host(dict(statistics))
    )
