"""Predicted loss of every candidate of a matrix, without quantizing it in full."""

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
    """What will be left of a kernel, without alternation: about what `decompose` reaches, or above.

    Without feedback: the codes, then the best product for what they miss. With: rounding errors at
    their own error_weights, which takes no codes with feedback; and what a product saves of them, from
    the middle format for all. A program per format: one's arrays go before the next one's come.

    Args:
      kernel: the matrix.
      weights: the measure.
      forms: of the codes; None: there are none.
      ranks: of products; those that the kernel does not have count as the largest one it has.
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
    """What codes of such scales lose at their own error_weights."""
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
    """Shares of the loss of codes without that are left with products of some ranks."""
    width = max(ranks)
    if width == 0:
        return jnp.ones(len(ranks))
    found = _low_rank_term(rows, weights, width)

    def left_at(rank: Array) -> Array:
        kept = jnp.where(jnp.arange(width, dtype=jnp.float32)[:, None] < rank, found.right, 0)
        # A product that is fitted to what codes miss takes its own share of a white error.
        free = jnp.prod(1 - rank / jnp.asarray(rows.shape, jnp.float32))
        return free * _loss_of_quantized(
            rows - mm(kept.T, found.left.T), ratios, weights, form=form
        )

    most = jnp.where(without > 0, without, 1)
    return lax.map(left_at, jnp.asarray(ranks, jnp.float32)) / most


def _low_rank_term(rows: Float[Array, "out in"], weights: Weights, width: int) -> Product:
    """The best product of a rank, from a random start."""
    basis, most = start_basis(rows.shape[::-1], width), jnp.asarray(width)
    return best_product(rows.T, most, weights, basis, width=width, powers=FIRST_POWERS)


def _losses_after_low_rank(
    rows: Float[Array, "out in"],
    weights: Weights,
    *,
    form: normal_float.Format | None,
    ranks: tuple[int, ...],
) -> Float[Array, "ranks"]:
    """What the best product leaves of a kernel, or of what codes miss of it."""
    error = rows if form is None else _quantization_residual(rows, form=form)
    return _losses_by_rank(error, weights, ranks=ranks)


@functools.partial(jax.jit, static_argnames="form")
def _quantization_residual(
    rows: Float[Array, "out in"], *, form: normal_float.Format
) -> Float[Array, "out in"]:
    """What codes miss that know nothing of each other."""
    return residual(rows, normal_float.quantize(rows.reshape(-1), form), form)


@functools.partial(jax.jit, static_argnames="ranks")
def _losses_by_rank(
    error: Float[Array, "out in"], weights: Weights, *, ranks: tuple[int, ...]
) -> Float[Array, "ranks"]:
    """What the best products of some ranks leave of a matrix.

    Knows no format: it takes longest to compile, and one program serves all of them.
    """
    width = max(ranks)
    if width == 0:
        return jnp.full(len(ranks), weights.weighted_error(error.T))
    found = _low_rank_term(error, weights, width)
    left = found.total - jnp.cumsum(found.energies)[:width]
    left = jnp.concatenate([found.total[None], left])
    left = jnp.pad(left, (0, width + 1 - len(left)), mode="edge")
    # Measured on elements, the ratios are those of the two-sided approximation.
    share = weights.weighted_error(error.T) / jnp.where(found.total > 0, found.total, 1)
    return (jnp.maximum(left, 0) * share)[jnp.asarray(ranks)]
