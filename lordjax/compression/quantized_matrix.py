"""Stores one matrix as quantized weights, a low-rank term or both, by jitted programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.allocation.candidates import (
    QUANTIZERS,
    Candidate,
    Table,
    candidate_bytes,
    ranks_tried,
)
from lordjax.allocation.plan import Plan
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import materialize, nbytes
from lordjax.kernels.convert import cast, quantize_pair
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized
from lordjax.methods.quantized.best_product import FIRST_POWERS, best_product, start_basis
from lordjax.methods.quantized.coordinate_descent import quantize as codes_of
from lordjax.methods.quantized.error_feedback import make_feedback
from lordjax.methods.quantized.lq import decompose_all, runs_stacked
from lordjax.methods.quantized.predicted_loss import predict
from lordjax.methods.quantized.weightings import Weights, make_weights
from lordjax.models.sites import Site

# A site -> its kernel and the weights of its errors.
Matrices = Callable[[Site], tuple[Any, Weights]]


best_pair = jax.jit(best_product, static_argnames=("width", "powers"))


pack = jax.jit(normal_float.pack_codes, static_argnames="form")


jitted_feedback = jax.jit(make_feedback)


@functools.partial(jax.jit, static_argnames="form")
def encode_kernel(
    kernel: Any, weights: Weights, *, form: normal_float.Format
) -> normal_float.Packed:
    """Returns a kernel's quantized weights as they are stored."""
    return normal_float.pack_codes(codes_of(kernel.T, form, weights), form)


# Compiled also for arrays on the host, where NumPy would round differently.
jitted_cost = jax.jit(make_weights)


def matrix_weights(
    kernel: Any, stats: Mapping[str, Any], *, feedback: bool, searches: bool = True
) -> Weights:
    """Returns the weights of a kernel's errors.

    Args:
      kernel: the kernel ``[in, out]``.
      stats: statistics of the calibration sequences.
      feedback: whether later weights compensate for the errors of earlier ones.
      searches: whether clip ratios are searched where they do.
    """
    weights = jitted_cost(kernel, stats)
    if not feedback:
        return weights
    return weights._replace(feedback=jitted_feedback(weights.inputs, searches))


@jax.jit
def measures(kernel: Any, new: Any, weights: Weights) -> tuple[Any, Any]:
    """Returns the relative squared error of a replacement, unweighted and weighted."""
    error = kernel - new.astype(kernel.dtype)
    lost, whole = (jnp.stack([jnp.sum(a**2), weights.weighted_error(a)]) for a in (error, kernel))
    fractions = lost / jnp.where(whole > 0, whole, 1)
    return fractions[0], fractions[1]


def dense_dtype(dtype: Any | None) -> Any:
    """Returns the dtype of block matrices and factors that are not quantized."""
    return jnp.dtype(dtype or "float16")


def planned_candidates(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Candidate]:
    """Returns the candidates of a plan.

    Args:
      plan: rank and format of every matrix.
      shapes: site path -> shape of the matrix.

    Raises:
      ValueError: if the plan does not fit the model; names the matrices.
    """
    wrong = [f"{p} is no matrix of a block" for p in {*plan.ranks, *plan.formats} - shapes.keys()]
    wrong += [f"{path} is missing" for path in shapes.keys() - plan.ranks]
    for path, rank in plan.ranks.items():
        if path in shapes and rank is not None and not 1 <= rank < min(shapes[path]):
            wrong.append(
                f"{path}: rank {rank} is not in [1, {min(shapes[path])}); null means no low-rank "
                "term"
            )
    if wrong:
        raise ValueError("the plan does not fit the model: " + "; ".join(sorted(wrong)))
    forms = {path: normal_float.Format.parse(text) for path, text in plan.formats.items()}
    return {path: Candidate(forms.get(path), rank) for path, rank in plan.ranks.items()}


def candidate_table(*given: Any) -> Table:
    """Returns the candidates of a matrix that no other one beats; see `candidate_rows`."""
    return Table.pareto(candidate_rows(*given))


def candidate_rows(
    method: str,
    rank: int | None,
    formats: Sequence[normal_float.Format],
    kernel: Any,
    weights: Weights,
    dtype: Any | None,
    factors: normal_float.Format | None,
) -> list[tuple[int, float, Candidate]]:
    """Returns the bytes and the predicted error of every candidate of a matrix.

    Args:
      method: a key of `QUANTIZERS`.
      rank: rank of the low-rank term, where the solver does not choose it.
      formats: quantization formats that a budget may choose from.
      kernel: ``[in, out]`` matrix.
      weights: weights of its errors.
      dtype: dtype of numbers that are not quantized; None: float16.
      factors: format of the low-rank factors; None: they are not quantized.
    """
    shape, counts_low_rank = tuple(kernel.shape), QUANTIZERS[method].counts_low_rank
    ranks, low_rank_only = ranks_tried(method, rank, shape)
    errors = np.asarray(predict(kernel, weights, forms=tuple(formats), ranks=ranks), float)
    rows = [
        (Candidate(form, rank or None), errors[i, j])
        for i, form in enumerate(formats)
        for j, rank in enumerate(ranks)
        if form.bits < 8 or j == 0  # 8 bits leave no residual worth a low-rank term
    ]
    if low_rank_only:
        found = predict(kernel, weights, forms=(None,), ranks=low_rank_only)
        alone = np.asarray(found, float)[0]
        rows += [(Candidate(None, r), e) for r, e in zip(low_rank_only, alone, strict=True)]
    if counts_low_rank:
        rows.append((Candidate(None, None), 0.0))

    def size(candidate: Candidate) -> int:
        itemsize = dense_dtype(dtype).itemsize
        return candidate_bytes(candidate, shape, itemsize, factors, low_rank=counts_low_rank)

    return [(size(candidate), error, candidate) for candidate, error in rows]


def solved_together(
    chosen: Mapping[Site, Candidate], shapes: Mapping[Site, Any]
) -> list[list[Site]]:
    """Splits sites into lists that are solved in one go.

    Matrices of one shape and format that are decomposed can share a stack; others are alone.
    """
    together: dict[Any, list[Site]] = {}
    for site, candidate in chosen.items():
        alone = candidate.form is None or candidate.rank is None or not runs_stacked()
        together.setdefault(site if alone else (shapes[site], candidate.form), []).append(site)
    return list(together.values())


def stored_low_rank(
    left: Any, right: Any, dtype: Any | None, factors: normal_float.Format | None
) -> LowRank:
    """Returns a low-rank term as it is stored: quantized in format ``factors``, or in a dtype."""
    if factors is None:
        return LowRank(*(cast(a, dense_dtype(dtype)) for a in (left, right)))
    return quantize_pair(LowRank(left, right), factors)


def stored_directly(
    candidate: Candidate,
    kernel: Any,
    weights: Weights,
    dtype: Any | None,
    factors: normal_float.Format | None,
    *,
    width: int,
) -> Any:
    """Returns a matrix that needs no alternation: quantized, dense or low rank, as it is stored.

    Args:
      candidate: a format, a rank, or neither.
      kernel: ``[in, out]`` matrix.
      weights: weights of its errors.
      dtype: dtype of numbers that are not quantized; None: float16.
      factors: format of the low-rank factors; None: they are not quantized.
      width: largest rank of all matrices, so that all ranks share a program.
    """
    if candidate.form is not None:
        packed = jax.device_get(encode_kernel(kernel, weights, form=candidate.form))
        return NFQuantized.of(packed, kernel.shape, candidate.form)
    if candidate.rank is None:
        return cast(kernel, dense_dtype(dtype))
    basis, rank = start_basis(kernel.shape, width), jnp.asarray(candidate.rank)
    found = best_pair(kernel, rank, weights, basis, width=width, powers=FIRST_POWERS)
    left, right = np.asarray(found.left), np.asarray(found.right)
    return stored_low_rank(left[:, : candidate.rank], right[: candidate.rank], dtype, factors)


def stored_matrices(
    candidates: Sequence[Candidate],
    kernels: Sequence[Any],
    weights: Sequence[Weights],
    dtype: Any | None,
    factors: normal_float.Format | None,
    *,
    width: int,
    steps: int,
) -> list[Any]:
    """Returns matrices that are solved together (`solved_together`), as they are stored.

    Args:
      candidates: how each matrix is stored; formats are the same.
      kernels: ``[in, out]`` matrices of one shape.
      weights: weights of the errors of each matrix.
      dtype: see `stored_directly`.
      factors: see `stored_directly`.
      width: see `stored_directly`.
      steps: number of alternations between quantized weights and low-rank term.
    """
    form = candidates[0].form
    if form is None or candidates[0].rank is None:
        given = candidates[0], kernels[0], weights[0]
        return [stored_directly(*given, dtype, factors, width=width)]
    ranks = [candidate.rank or 0 for candidate in candidates]
    made = decompose_all(kernels, ranks, weights, form=form, width=width, steps=steps)
    new = []
    for kernel, rank, each in zip(kernels, ranks, made, strict=True):
        packed = jax.device_get(pack(each.codes, form=form))
        left, right = np.asarray(each.left)[:, :rank], np.asarray(each.right)[:rank]
        low_rank = stored_low_rank(left, right, dtype, factors)
        new.append(LowRankPlusQuantized(NFQuantized.of(packed, kernel.shape, form), low_rank))
    return new


def check_finite(params: Any, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError if a number that was read or is stored is not finite; names all sites."""
    # Quantized weights can hide a broken matrix: minima and maxima may ignore NaN.
    errors = ("relative_error", "weighted_error")
    broken = [
        path
        for path, row in layers.items()
        if not np.isfinite([row[e] for e in errors if e in row]).all()
    ]
    wrong = [f"{path} is not finite (broken in the model?)" for path in broken]
    wrong += [
        f"{path} is not finite (broken in the model, or does it overflow in {leaf.dtype}?)"
        for path, leaf in trees.flatten(params).items()
        if path not in broken
        and not all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(leaf))
    ]
    if wrong:
        raise ValueError("the quantized model is broken: " + "; ".join(wrong))


def layer_summary(candidate: Candidate, kernel: Any, weights: Weights, new: Any) -> dict[str, Any]:
    """Returns the report of a matrix: format, rank, bytes and relative errors.

    Args:
      candidate: how the matrix is stored.
      kernel: original matrix.
      weights: weights of its errors.
      new: the stored matrix.
    """
    plain, weighted = measures(kernel, materialize(new), weights)
    return {
        "format": None if candidate.form is None else str(candidate.form),
        "rank": candidate.rank,
        "bytes": nbytes(new),
        "relative_error": float(plain),
        "weighted_error": float(weighted),
    }


def replaced_matrices(
    candidates: Mapping[Site, Candidate],
    matrix: Matrices,
    dtype: Any | None,
    factors: normal_float.Format | None,
    *,
    width: int,
    steps: int,
) -> dict[Site, tuple[Any, dict[str, Any]]]:
    """Returns the stored matrix and the report of sites that are solved together, on the host.

    Args:
      candidates: how the matrix of each site is stored.
      matrix: reads the kernel of a site and the weights of its errors.
      dtype: see `stored_directly`.
      factors: see `stored_directly`.
      width: see `stored_directly`.
      steps: see `stored_matrices`.
    """
    found = [matrix(site) for site in candidates]
    kernels, weights = zip(*found, strict=True)
    chosen = list(candidates.values())
    made = stored_matrices(chosen, kernels, weights, dtype, factors, width=width, steps=steps)
    return {
        site: (new, layer_summary(candidates[site], *before, new))
        for site, before, new in zip(candidates, found, made, strict=True)
    }
