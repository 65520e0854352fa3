"""One matrix as quantized weights, a low-rank term or both, by jitted programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.allocation.candidates import Candidate
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import materialize, nbytes
from lordjax.methods.quantized.best_product import best_product
from lordjax.methods.quantized.error_feedback import make_feedback
from lordjax.methods.quantized.error_feedback import quantize as codes_of
from lordjax.methods.quantized.lq import runs_stacked
from lordjax.methods.quantized.weightings import Weights, make_weights
from lordjax.models.sites import Site

# A site -> its kernel, and what errors of it cost.
Matrices = Callable[[Site], tuple[Any, Weights]]


best_pair = jax.jit(best_product, static_argnames=("width", "powers"))


pack = jax.jit(normal_float.pack_codes, static_argnames="form")


quantize_with_feedback = jax.jit(make_feedback)


@functools.partial(jax.jit, static_argnames="form")
def encode_kernel(kernel: Any, feedback: Any, *, form: normal_float.Format) -> normal_float.Packed:
    """A kernel's codes, as they are stored."""
    return normal_float.pack_codes(codes_of(kernel.T, form, feedback), form)


# Compiled, so that the same bits come of arrays on the host: NumPy would round otherwise.
jitted_cost = jax.jit(make_weights)


@jax.jit
def measures(kernel: Any, new: Any, weights: Weights) -> tuple[Any, Any]:
    """Shares of the weights' energy, and of the measure, that a replacement loses."""
    error = kernel - new.astype(kernel.dtype)
    lost, whole = (jnp.stack([jnp.sum(a**2), weights.weighted_error(a)]) for a in (error, kernel))
    shares = lost / jnp.where(whole > 0, whole, 1)
    return shares[0], shares[1]


def stage_groups(chosen: Mapping[Site, Candidate], shapes: Mapping[Site, Any]) -> list[list[Site]]:
    """Sites whose matrices are found in one go: each alone, or like ones that are decomposed."""
    groups: dict[Any, list[Site]] = {}
    for site, option in chosen.items():
        alone = option.form is None or option.rank is None or not runs_stacked()
        groups.setdefault(site if alone else (shapes[site], option.form), []).append(site)
    return list(groups.values())


def check_finite(params: Any, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError if a number that was read or is stored is not finite; names all of them."""
    # Codes hide what is broken: minima and maxima may pass over NaN.
    errors = ("relative_error", "weighted_error")
    broken = [
        path for path, row in layers.items() if not np.isfinite([row[e] for e in errors]).all()
    ]
    wrong = [f"{path} is not finite (broken in the model?)" for path in broken]
    wrong += [
        f"{path} is not finite (broken in the model, or does it overflow in {leaf.dtype}?)"
        for path, leaf in trees.flatten(params).items()
        if path not in broken
        and not all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(leaf))
    ]
    if wrong:
        raise ValueError("the quantised model is broken: " + "; ".join(wrong))


def layer_summary(kernel: Any, weights: Weights, new: Any, option: Candidate) -> dict[str, Any]:
    """What became of a matrix, for the report."""
    plain, weighted = measures(kernel, materialize(new), weights)
    return {
        "format": None if option.form is None else str(option.form),
        "rank": option.rank,
        "bytes": nbytes(new),
        "relative_error": float(plain),
        "weighted_error": float(weighted),
    }
