"""W ≈ Q + L R: NormalFloat codes and a low-rank product that makes up for what they miss.

Alternates between the best product for the codes' error and the codes of what the product leaves::

    L R <- best of rank r for W - Q,    Q <- codes of W - L R

starting from Q = 0 (LQ-LoRA), and keeps the best iterate. "Best" is in the
measure ``Σ_j c_j e_jᵀ H e_j`` over the columns e_j of the error, for which the low-rank step has a
closed form; H and c are what `Weights` holds (x input, g loss gradient at the output, F sum over
windows of squared weight gradients):

==========  ==================  ================  =====================================
weighting   H (inputs)          c (outputs)       measure
==========  ==================  ================  =====================================
none        identity            1                 squared error of the weights
fisher      diag(mean_j F_ij)   mean_i F_ij       Σ F_ij E_ij² (LQ-LoRA)
input       E xxᵀ               1                 squared error of the output (QERA)
both        E ‖g‖² xxᵀ          E ‖x‖² g_j²       about the loss, to second order
==========  ==================  ================  =====================================

With `Weights.feedback` codes make up for each other (`feedback`); without, each is the nearest.

Beyond the paper: that; the best iterate instead of the one after it; the product is fitted last,
so that it is optimal for its codes; the quantised start is a candidate, so that no result is worse
than the codes alone; full H at no inverse; subspaces carried from one alternation to the next,
which saves most of an SVD; the rank is traced.

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
from lordjax.methods.quantized.error_feedback import quantize
from lordjax.methods.quantized.weightings import Weights

STEPS = 10  # alternations; the first five gain most, at 2 bits more lose (theory/lq_lora §2.5)


class Decomposition(NamedTuple):
    """A kernel as codes and a product.

    Attributes:
      codes: `nf.Codes` of the transposed kernel, flattened.
      left: ``[in, width]``; columns from the rank on are zero.
      right: ``[width, out]``.
      error: ``[]`` the measure of what is left.
      total: ``[]`` the measure of the kernel itself.
      history: ``[steps]`` error after each alternation from Q = 0.
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
    """Codes and a product for a kernel; see the module's docstring.

    Args:
      kernel: the matrix.
      rank: of the product, at most ``width``; traced, so that all ranks share one compilation.
      weights: the measure.
      form: of the codes.
      width: columns of the product that is returned.
      steps: alternations.
    """
    return _decompose(_as_rows(kernel), rank, weights, form=form, width=width, steps=steps)


@jax.jit
def _as_rows(kernel: Float[Array, "in out"]) -> Float[Array, "out in"]:
    """Outputs along rows, as codes are stored; a call of its own, lest all readers transpose."""
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
    """`decompose` of a transposed kernel."""

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
    alone, left = quantize_target(rows)
    (_, best), history = lax.scan(step, (first, (alone, first, jnp.inf)), None, length=steps)
    # Never worse than the codes alone: else their own product, which is LoftQ's start.
    codes, product, error = lax.cond(
        best[2] < weights.weighted_error(left.T),
        lambda: best,
        lambda: (alone, *fit(left, random, FIRST_POWERS, sort=True)),
    )
    total = weights.weighted_error(rows.T)
    return Decomposition(codes, product.left, product.right, error, total, history)


_stacked = functools.partial(jax.jit, static_argnames=("form", "width", "steps"))(
    lambda kernels, ranks, weights, **fixed: jax.vmap(functools.partial(decompose, **fixed))(
        kernels, ranks, weights
    )
)


def runs_stacked() -> bool:
    """Whether like kernels are best decomposed together: an accelerator wants to be filled.

    A CPU is full, batched factorisations are slow there, and every length would compile again.
    """
    return jax.default_backend() != "cpu"


def decompose_all(
    kernels: Sequence[Float[Array, "in out"]],
    ranks: Sequence[int],
    weights: Sequence[Weights],
    *,
    form: normal_float.Format,
    width: int,
    steps: int = STEPS,
) -> list[Decomposition]:
    """`decompose` of kernels of one shape; of several as a stack where it is `runs_stacked`."""
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
    """What codes of a transposed kernel miss."""
    return rows - normal_float.dequantize(codes, form).reshape(rows.shape)
