"""Codes with error feedback: what the codes of one input miss, the inputs after it make up for.

Of the errors ``E = W - Q`` of a kernel ``[in, out]`` the measure ``tr(Eᵀ H E)`` counts, H being the
second moment of the inputs. With ``H = U D Uᵀ``, U unit upper triangular::

    z_k = W_k + Σ_{i<k} U_ik E_i      Q_k = nearest codes of z_k      k = 1 … in

which makes the measure ``Σ_k D_k |z_k - Q_k|²``: rounding errors that know nothing of each other,
each at the price D_k ≤ H_kk. The scales are known before the first code: of each block of W that
ratio of its largest magnitude which loses least at those error_weights. Without error_weights and feedback such
ratios are worse than none (theory/lq_lora §9): what is cut off are outliers, which matter most.

Inputs are taken by falling H_kk, the dearest while most others can still make up for them. As the
scales are fixed this costs nothing in storage, unlike GPTQ's, which follow the order.

Sources: GPTQ, arXiv 2210.17323; LDLQ, 2307.13304; theory/lq_lora §7.3b.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lordjax.kernels import normal_float
from lordjax.methods.linalg import mm

DAMPING = 1e-2  # ratio of the mean second moment added to all, as GPTQ's
BLOCK = 64  # inputs between two large products
CLIP_RATIOS = tuple(
    round(1 - 0.05 * k, 2) for k in range(13)
)  # of the largest magnitude of a block


class Feedback(NamedTuple):
    """How inputs make up for each other.

    Attributes:
      order: ``[in]`` the inputs as they are taken.
      upper: ``[in, in]`` U, in that order.
      error_weights: ``[in]`` D, of the inputs as they are numbered.
    """

    order: Any
    upper: Any
    error_weights: Any


def make_feedback(moment: Float[Array, "in in"]) -> Feedback:
    """`Feedback` for inputs of a second moment."""
    diagonal = jnp.diagonal(moment)
    order = jnp.argsort(diagonal, descending=True)
    damped = moment + DAMPING * jnp.mean(diagonal) * jnp.eye(len(moment), dtype=moment.dtype)
    # A Cholesky factor from the last input back is upper triangular.
    back = order[::-1]
    upper = jnp.linalg.cholesky(damped[back][:, back])[::-1, ::-1]
    roots = jnp.diagonal(upper)
    error_weights = jnp.zeros_like(roots).at[order].set(roots**2)
    return Feedback(order, upper / roots[None], error_weights)


def best_clip_ratios(
    rows: Float[Array, "out in"], form: normal_float.Format, feedback: Feedback
) -> Float[Array, "blocks"]:
    """Of each block the ratio of `CLIP_RATIOS` with which its codes lose least at their error_weights."""
    flat = rows.reshape(-1)
    error_weights = normal_float.runs(jnp.tile(feedback.error_weights, len(rows)), form.block)
    values, largest = (
        normal_float.runs(flat, form.block),
        normal_float.block_scales(flat, form.block),
    )
    largest = jnp.where(largest > 0, largest, 1)

    def step(best: tuple[Array, Array], ratio: Array) -> tuple[tuple[Array, Array], None]:
        scales = (largest * ratio)[:, None]
        error = (
            values
            - normal_float.lookup(normal_float.nearest(values / scales, form.bits), form.bits)
            * scales
        )
        loss = jnp.sum(error_weights * error**2, axis=1)
        better = loss < best[0]
        return (jnp.where(better, loss, best[0]), jnp.where(better, ratio, best[1])), None

    start = (jnp.full(largest.shape, jnp.inf), jnp.ones(largest.shape))
    return lax.scan(step, start, jnp.asarray(CLIP_RATIOS))[0][1]


def clipped_scales(
    flat: Float[Array, "n"], ratios: Float[Array, "blocks"], form: normal_float.Format
) -> normal_float.Codes:
    """Scales that are ratios of the blocks' largest magnitudes; no codes yet."""
    return normal_float.Codes(
        None,
        *normal_float.quantize_scales(normal_float.block_scales(flat, form.block) * ratios, form),
    )


def quantize(
    rows: Float[Array, "out in"], form: normal_float.Format, feedback: Feedback | None = None
) -> normal_float.Codes:
    """`nf.quantize` of a transposed kernel, flattened; with feedback if there is one."""
    flat = rows.astype(jnp.float32).reshape(-1)
    if feedback is None:
        return normal_float.quantize(flat, form)
    fan_out, fan_in = rows.shape
    scaled = clipped_scales(flat, best_clip_ratios(flat.reshape(rows.shape), form, feedback), form)
    decoded = normal_float.dequantize_scales(scaled.scales, scaled.supers, scaled.offset, form)
    scales = jnp.repeat(decoded, form.block)[: flat.size].reshape(rows.shape)
    # Inputs along rows, in their order, filled up to whole blocks.
    pad = -fan_in % BLOCK
    kernel, scales = (
        jnp.pad(a.T[feedback.order], ((0, pad), (0, 0))).reshape(-1, BLOCK, fan_out)
        for a in (flat.reshape(rows.shape), scales)
    )
    # Columns of U, a block at a time.
    upper = jnp.pad(feedback.upper, ((0, pad), (0, pad)))
    upper = upper.T.reshape(-1, BLOCK, fan_in + pad)

    def block(errors: Array, each: tuple[Array, ...]) -> tuple[Array, Array]:
        i, kernel, scales, columns = each
        shifted = kernel + mm(columns, errors)  # rows that are still to come are 0
        inner = lax.dynamic_slice(columns, (0, i * BLOCK), (BLOCK, BLOCK))
        safe = jnp.where(scales > 0, scales, 1)

        def one(own: Array, k: Array) -> tuple[Array, Array]:
            wanted = shifted[k] + mm(inner[k][None], own)[0]
            codes = normal_float.nearest(wanted / safe[k], form.bits)
            error = kernel[k] - normal_float.lookup(codes, form.bits) * scales[k]
            return own.at[k].set(error), codes

        own, codes = lax.scan(one, jnp.zeros_like(kernel), jnp.arange(BLOCK))
        return lax.dynamic_update_slice(errors, own, (i * BLOCK, 0)), codes

    nothing = jnp.zeros((fan_in + pad, fan_out))
    _, codes = lax.scan(block, nothing, (jnp.arange(len(kernel)), kernel, scales, upper))
    codes = codes.reshape(-1, fan_out)[jnp.argsort(feedback.order)]
    return scaled._replace(codes=codes.T.reshape(-1))
