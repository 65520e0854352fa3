"""Predicted loss of every candidate encoding of a matrix, without the alternation of `lq`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lordjax.kernels import normal_float
from lordjax.methods.linalg import mm
from lordjax.methods.quantized.best_product import FIRST_POWERS, Product, best_product, start_basis
from lordjax.methods.quantized.error_feedback import best_clip_ratios, clipped_scales
from lordjax.methods.quantized.lq import _as_rows, residual
from lordjax.methods.quantized.weightings import Weights


def predict(
    kernel: Float[Array, "in out"],
    weights: Weights,
    *,
    forms: tuple[normal_float.Format | None, ...],
    ranks: tuple[int, ...],
) -> Float[Array, "forms ranks"]:
    """Predicts the weighted error of a kernel for every format and rank.

    The prediction is about the error that `decompose` reaches, or above it.

    Without error feedback: quantize, then fit the best low-rank term to the residual. With error
    feedback: use the closed-form loss Σ D_k e_k² (`error_feedback`), which needs no GPTQ run. The
    relative gain of a low-rank term is computed once, for the middle format, and used for all.
    Each format is a separate program, so that only one format's arrays are live.

    Args:
      kernel: the matrix ``[in, out]``.
      weights: weights of the errors.
      forms: formats of the quantized weights; None stands for a low-rank term alone.
      ranks: ranks of the low-rank term. Ranks above the kernel's largest one count as that.

    Returns:
      Weighted errors ``[forms, ranks]``.
    """
    rows = _as_rows(kernel)
    formats = tuple(form for form in forms if form is not None)
    if weights.feedback is None or not formats:
        return jnp.stack(
            [_losses_after_low_rank(rows, weights, form=form, ranks=ranks) for form in forms]
        )
    ratios = {form: _best_clip_ratios(rows, weights.feedback, form=form) for form in formats}
    left = {form: _loss_of_quantized(rows, ratios[form], weights, form=form) for form in formats}
    middle = formats[len(formats) // 2]
    remaining = _remaining_fractions(
        rows, ratios[middle], left[middle], weights, form=middle, ranks=ranks
    )
    return jnp.stack(
        [
            _losses_after_low_rank(rows, weights, form=None, ranks=ranks)
            if form is None
            else left[form] * remaining
            for form in forms
        ]
    )


_best_clip_ratios = jax.jit(
    lambda rows, feedback, form: best_clip_ratios(rows, form, feedback), static_argnames="form"
)


@functools.partial(jax.jit, static_argnames="form")
def _loss_of_quantized(
    target: Float[Array, "out in"],
    ratios: Float[Array, "blocks"],
    weights: Weights,
    *,
    form: normal_float.Format,
) -> Float[Array, ""]:
    """Returns the closed-form loss of codes with given clip ratios under error feedback."""
    flat = target.reshape(-1)
    codes = normal_float.round_to(flat, clipped_scales(flat, ratios, form), form)
    independent = Weights(weights.feedback.error_weights, weights.outputs)
    return independent.weighted_error(residual(target, codes, form).T)


@functools.partial(jax.jit, static_argnames=("form", "ranks"))
def _remaining_fractions(
    rows: Float[Array, "out in"],
    ratios: Float[Array, "blocks"],
    without: Float[Array, ""],
    weights: Weights,
    *,
    form: normal_float.Format,
    ranks: tuple[int, ...],
) -> Float[Array, "ranks"]:
    """Returns the fraction of the loss that remains with low-rank terms of some ranks.

    Args:
      rows: the transposed kernel.
      ratios: clip ratio of each block.
      without: loss of the quantized weights without a low-rank term.
      weights: weights of the errors, with feedback.
      form: format of the quantized weights.
      ranks: the ranks.
    """
    width = max(ranks)
    if width == 0:
        return jnp.ones(len(ranks))
    found = _low_rank_term(rows, weights, width)

    def loss_at(rank: Array) -> Array:
        kept = jnp.where(jnp.arange(width, dtype=jnp.float32)[:, None] < rank, found.right, 0)
        # A term that is fitted to a white residual also removes its share of degrees of freedom.
        unexplained = jnp.prod(1 - rank / jnp.asarray(rows.shape, jnp.float32))
        return unexplained * _loss_of_quantized(
            rows - mm(kept.T, found.left.T), ratios, weights, form=form
        )

    safe = jnp.where(without > 0, without, 1)
    return lax.map(loss_at, jnp.asarray(ranks, jnp.float32)) / safe


def _low_rank_term(rows: Float[Array, "out in"], weights: Weights, width: int) -> Product:
    """Returns the best low-rank term of rank ``width``, from a random start."""
    basis, rank = start_basis(rows.shape[::-1], width), jnp.asarray(width)
    return best_product(rows.T, rank, weights, basis, width=width, powers=FIRST_POWERS)


def _losses_after_low_rank(
    rows: Float[Array, "out in"],
    weights: Weights,
    *,
    form: normal_float.Format | None,
    ranks: tuple[int, ...],
) -> Float[Array, "ranks"]:
    """Returns the losses with the best low-rank terms for a kernel, or for its residual."""
    error = rows if form is None else _quantization_residual(rows, form=form)
    return _losses_by_rank(error, weights, ranks=ranks)


@functools.partial(jax.jit, static_argnames="form")
def _quantization_residual(
    rows: Float[Array, "out in"], *, form: normal_float.Format
) -> Float[Array, "out in"]:
    """Returns the residual of a transposed kernel after round-to-nearest."""
    return residual(rows, normal_float.quantize(rows.reshape(-1), form), form)


@functools.partial(jax.jit, static_argnames="ranks")
def _losses_by_rank(
    error: Float[Array, "out in"], weights: Weights, *, ranks: tuple[int, ...]
) -> Float[Array, "ranks"]:
    """Returns the losses that the best low-rank terms of some ranks leave of an error matrix.

    This program takes longest to compile. It does not depend on the format, so all formats share
    it.
    """
    width = max(ranks)
    if width == 0:
        return jnp.full(len(ranks), weights.weighted_error(error.T))
    found = _low_rank_term(error, weights, width)
    left = found.total - jnp.cumsum(found.energies)[:width]
    left = jnp.concatenate([found.total[None], left])
    left = jnp.pad(left, (0, width + 1 - len(left)), mode="edge")
    # With element weights, the relative losses of the two-sided approximation are used.
    scale = weights.weighted_error(error.T) / jnp.where(found.total > 0, found.total, 1)
    return (jnp.maximum(left, 0) * scale)[jnp.asarray(ranks)]
