"""The check of predicted errors on held-out sequences; see `allocation.measured_errors`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lordjax.allocation import measured_errors
from lordjax.allocation.measured_errors import Place, mean_loss
from lordjax.compression.measured.variants import compare
from lordjax.compression.site_factors import AnyFactors, replace_kernels
from lordjax.kernels import trees
from lordjax.names import layer_index, layer_type
from lordjax.runtime import multihost
from lordjax.runtime.progress import Clock
from lordjax.storage.store import get_or_compute

if TYPE_CHECKING:
    from lordjax.compression.prepared import Prepared


def group_of(path: str) -> str:
    """Returns the group of a site: ``mlp``, ``attention``, or a module of the attention."""
    inside = path.split("/")[1:]
    return "/".join(inside) if inside[-1] != "kernel" else inside[0]


def places_of(paths: Iterable[str]) -> dict[str, Place]:
    """Returns where sites are in a model, by their paths."""
    return {path: Place(layer_index(path), group_of(path), layer_type(path)) for path in paths}


def check(prepared: Prepared, *, removes_blocks: bool = False) -> None:
    """Measures the losses of some sites, and of a whole plan, on the held-out sequences.

    Args:
      prepared: the model, its factors and the held-out sequences.
      removes_blocks: whether the removal of whole blocks is measured, too.
    """
    clock = Clock(prepared.progress)
    names = iter(("held-out losses", "held-out loss of a plan"))
    measured_errors.check(
        prepared,
        lambda ranks: _measured(prepared, ranks, next(names), clock),
        removes_blocks=removes_blocks,
    )
    prepared.report["seconds"] |= clock.seconds


def _silent(block: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a block of the same shapes that adds nothing to its input."""
    flat = trees.flatten(block)
    last = (
        f"{layer}/{name}" for layer in ("attention/o", "mlp/down") for name in ("kernel", "bias")
    )
    zeros = {path: np.zeros_like(np.asarray(flat[path])) for path in last if path in flat}
    return trees.unflatten(flat | zeros)


def _measured(
    prepared: Prepared, variants: Sequence[Mapping[str, int]], name: str, clock: Clock
) -> list[float]:
    """Returns the measured loss of variants in nats.

    Args:
      prepared: the model, its factors and the held-out sequences.
      variants: for each, site path -> rank of the sites that are compressed; 0 at all sites of a
        block: it is removed.
      name: name of the result in the store.
      clock: reports progress.
    """
    layers = [{layer_index(path) for path in ranks} for ranks in variants]

    def change(block: dict[str, Any], i: int, j: int) -> dict[str, Any]:
        if i not in layers[j]:
            return block
        if all(rank == 0 for path, rank in variants[j].items() if layer_index(path) == i):
            return _silent(block)
        factors, method, config = prepared.factors, prepared.method, prepared.source.config
        return replace_kernels(block, i, factors, variants[j], method, config, padded=True)

    def measured() -> list[float]:
        dense, *others = compare(
            prepared.source,
            prepared.held_out,
            change,
            [min(own) for own in layers],
            clock,
            stage="held-out check",
            mask_token=prepared.calibration.mask_token,
        )
        found = [mean_loss(nll - dense) for nll in others]
        return multihost.all_gather_json(found)[0]  # all processes must arrive at the same plan

    return get_or_compute(prepared.store, name, measured)


def predicted_errors(factors: AnyFactors) -> tuple[np.ndarray, np.ndarray]:
    """Returns a site's errors at every rank: on tokens that it is fitted to, and on others.

    Let the error on any tokens be b. Fitted to n tokens, it is b - c/n on these and b + c/n on
    others, to first order. Cross-fitting with two folds gives b + 2c/n. So a third of the first and
    two thirds of the last are the error of the factors, which all tokens are fitted to.
    """
    # Added from small to large.
    fitted = np.append(np.cumsum(np.asarray(factors.spectrum, float)[::-1])[::-1], 0.0)
    if factors.held_out is None:
        return fitted, fitted
    errors = (fitted + 2 * np.asarray(factors.held_out, float)) / 3
    return fitted, np.maximum.accumulate(errors[::-1])[::-1]
