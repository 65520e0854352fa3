"""Quantized weights plus a low-rank term, ``W ≈ Q + L R`` (LQ-LoRA, LoftQ, QERA).

Alternates between the best low-rank term for the residual of the quantized weights, and quantizing
what the low-rank term leaves::

    L R <- best of rank r for W - Q,    Q <- quantized W - L R

starting from Q = 0 (LQ-LoRA). The iterate with the smallest weighted error is kept. The weighted
error is ``Σ_j c_j e_jᵀ H e_j`` over the columns e_j of the error; for it the low-rank step has a
closed form. `Weights` holds H and c. With the input x, the loss gradient g at the output, and F,
the sum over sequences of squared weight gradients:

==========  ==================  ================  =====================================
weighting   H (inputs)          c (outputs)       weighted error
==========  ==================  ================  =====================================
none        identity            1                 squared error of the weights
fisher      diag(mean_j F_ij)   mean_i F_ij       Σ F_ij E_ij² (LQ-LoRA)
input       E xxᵀ               1                 squared error of the output (QERA)
both        E ‖g‖² xxᵀ          E ‖x‖² g_j²       about the loss, to second order
==========  ==================  ================  =====================================

With `Weights.feedback` codes compensate for each other's errors (`error_feedback`), and those of
the result are refined (`coordinate_descent`); without it each weight is rounded to the nearest
code.

Differences from the papers:

* error compensation in the quantization step, and coordinate descent on the codes at the end;
* the best iterate is kept, not the one after it;
* the low-rank term is fitted last, so that it is optimal for its codes;
* LoftQ's start (quantize first) is a candidate too, so that the result is never worse than
  quantized weights alone;
* the full H costs no inverse;
* the subspace of one alternation starts the next, which saves most of an SVD;
* the rank is traced, so that all ranks share one compiled program.

Sources: LQ-LoRA, arXiv 2311.12023; LoftQ, 2310.08659; QERA, 2410.06040; theory/lq_lora §2, §7.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lordjax.kernels import normal_float
from lordjax.methods.quantized.best_product import (
    FIRST_POWERS,
    POWERS,
    Product,
    best_product,
    start_basis,
)
from lordjax.methods.quantized.coordinate_descent import refine
from lordjax.methods.quantized.error_feedback import quantize
from lordjax.methods.quantized.weightings import Weights
from lordjax.runtime import target

# Alternations. The first five gain most; at 2 bits more of them do harm (theory/lq_lora §2.5).
STEPS = 10


class Decomposition(NamedTuple):
    """A kernel as quantized weights plus a low-rank term.

    Attributes:
      codes: `normal_float.Codes` of the flattened transposed kernel.
      left: left factor ``[in, width]``; columns from the rank on are zero.
      right: right factor ``[width, out]``.
      error: ``[]`` weighted error of the sum.
      total: ``[]`` weighted error of a zero matrix, for comparison.
      history: ``[steps]`` weighted error after each alternation from Q = 0.
    """

    codes: Any
    left: Any
    right: Any
    error: Any
    total: Any
    history: Any


def decompose(
    kernel: Float[Array, "in out"],
    rank: Int[Array, ""],
    weights: Weights,
    *,
    form: normal_float.Format,
    width: int,
    steps: int = STEPS,
) -> Decomposition:
    """Decomposes a kernel into quantized weights and a low-rank term; see this module's docstring.

    Args:
      kernel: the matrix ``[in, out]``.
      rank: rank of the low-rank term, at most ``width``; traced.
      weights: weights of the errors.
      form: format of the quantized weights.
      width: number of columns of the left factor that is returned.
      steps: number of alternations.

    Returns:
      The decomposition with the smallest weighted error.
    """
    return _decompose(_as_rows(kernel), rank, weights, form=form, width=width, steps=steps)


@jax.jit
def _as_rows(kernel: Float[Array, "in out"]) -> Float[Array, "out in"]:
    """Transposes a kernel, as codes are stored.

    A program of its own, because otherwise every reader would transpose again.
    """
    return kernel.astype(jnp.float32).T


@functools.partial(jax.jit, static_argnames=("form", "width", "steps"))
def _decompose(
    rows: Float[Array, "out in"],
    rank: Int[Array, ""],
    weights: Weights,
    *,
    form: normal_float.Format,
    width: int,
    steps: int,
) -> Decomposition:
    """Decomposes a transposed kernel; see `decompose`."""

    def fit(left: Array, basis: Array, powers: int, sort: bool) -> tuple[Product, Array]:
        found = best_product(left.T, rank, weights, basis, width=width, powers=powers, sort=sort)
        if weights.elements is not None:
            return found, weights.weighted_error((left - found.transposed()).T)
        kept = jnp.arange(len(found.energies)) < rank
        return found, found.total - jnp.sum(jnp.where(kept, found.energies, 0))

    def quantize_target(target: Array) -> tuple[normal_float.Codes, Array]:
        codes = quantize(target, form, weights.feedback)
        return codes, residual(rows, codes, form)

    def step(state: tuple[Any, Any], _: Any) -> tuple[Any, Array]:
        product, best = state
        codes, left = quantize_target(rows - product.transposed())
        product, error = fit(left, product.basis, POWERS, sort=False)
        new = (codes, product, error)
        best = jax.tree.map(lambda a, b: jnp.where(error < best[2], a, b), new, best)
        return (product, best), error

    random = start_basis(rows.shape[::-1], width)
    first = best_product(rows.T, rank, weights, random, width=width, powers=FIRST_POWERS)
    quantized_alone, left = quantize_target(rows)
    (_, best), history = lax.scan(
        step, (first, (quantized_alone, first, jnp.inf)), None, length=steps
    )
    # If no iterate beats quantized weights alone, these get a low-rank term (LoftQ's start).
    codes, product, error = lax.cond(
        best[2] < weights.weighted_error(left.T),
        lambda: best,
        lambda: (quantized_alone, *fit(left, random, FIRST_POWERS, sort=True)),
    )
    if weights.feedback is not None:
        target = rows - product.transposed()
        codes = refine(target, codes, form, weights)
        error = weights.weighted_error(residual(target, codes, form).T)
    total = weights.weighted_error(rows.T)
    return Decomposition(codes, product.left, product.right, error, total, history)


_stacked = functools.partial(jax.jit, static_argnames=("form", "width", "steps"))(
    lambda kernels, ranks, weights, **fixed: jax.vmap(functools.partial(decompose, **fixed))(
        kernels, ranks, weights
    )
)


def runs_stacked() -> bool:
    """Returns whether kernels of one shape are decomposed together, as one batch.

    A batch fills an accelerator. One matrix already fills a CPU; batched factorizations are slow
    there, and every batch size would be compiled again.
    """
    return target.platform() != "cpu"


def decompose_all(
    kernels: Sequence[Float[Array, "in out"]],
    ranks: Sequence[int],
    weights: Sequence[Weights],
    *,
    form: normal_float.Format,
    width: int,
    steps: int = STEPS,
) -> list[Decomposition]:
    """Decomposes kernels of one shape, as one batch where `runs_stacked` says so.

    Args:
      kernels: matrices ``[in, out]`` of one shape.
      ranks: rank of each low-rank term.
      weights: error weights of each kernel.
      form: format of the quantized weights.
      width: number of columns of the left factors.
      steps: number of alternations.

    Returns:
      One decomposition per kernel.
    """
    fixed: dict[str, Any] = {"form": form, "width": width, "steps": steps}
    if not runs_stacked() or len(kernels) == 1:
        rows = zip(kernels, ranks, weights, strict=True)
        return [decompose(kernel, jnp.asarray(rank), own, **fixed) for kernel, rank, own in rows]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *weights)
    found = _stacked(jnp.stack(kernels), jnp.asarray(ranks), stack, **fixed)
    return [jax.tree.map(lambda a, k=k: a[k], found) for k in range(len(kernels))]


def residual(
    rows: Float[Array, "out in"], codes: normal_float.Codes, form: normal_float.Format
) -> Float[Array, "out in"]:
    """Returns the residual of a transposed kernel: the kernel minus its quantized weights."""
    return rows - normal_float.dequantize(codes, form).reshape(rows.shape)
