"""Error compensation between codes (GPTQ, LDLQ).

Inputs of a kernel W ``[in, out]`` are quantized in turn. Later inputs compensate for the errors of
earlier ones. The loss is ``tr(Eᵀ H E)`` with the errors ``E = W - Q`` and the second moment H of
the inputs. With ``H = U D Uᵀ`` and U unit upper triangular::

    z_k = W_k + Σ_{i<k} U_ik E_i      Q_k = nearest codes of z_k      k = 1 … in

which makes the loss ``Σ_k D_k |z_k - Q_k|²``: independent rounding errors with weights D_k ≤ H_kk.

Scales are fixed before quantization. For each block of W a search finds the clip ratio
(scale / max|w|) that minimizes this weighted loss. Clipping hurts plain round-to-nearest, because
it cuts the outliers, which matter most (theory/lq_lora §9). With compensation it helps some models
and hurts others, so `compression.measured.scale_search` chooses by measured predictions.

Inputs are quantized by decreasing H_kk, so that most other inputs can still compensate for the
errors with the largest weights. Because the scales are fixed, this order costs no storage. In GPTQ
the scales follow the order.

Sources: GPTQ, arXiv 2210.17323; LDLQ, 2307.13304; theory/lq_lora §7.3b.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lordjax.kernels import normal_float
from lordjax.methods.linalg import jittered, mm

# Fraction of the mean second moment added to the diagonal, as in GPTQ; more where float32 needs it.
DAMPING = 1e-2
BLOCK = 64  # inputs between two large matrix products
CLIP_RATIOS = tuple(round(1 - 0.05 * k, 2) for k in range(13))  # scale / largest magnitude


class Feedback(NamedTuple):
    """How later inputs compensate for the errors of earlier ones.

    Attributes:
      order: ``[in]`` indices of the inputs, in the order of quantization.
      upper: ``[in, in]`` the factor U, in that order.
      error_weights: ``[in]`` the diagonal of D, in the original order of the inputs.
      searches: ``[]`` whether the clip ratios of the blocks are searched; else they are 1.
    """

    order: Any
    upper: Any
    error_weights: Any
    searches: Any


def make_feedback(moment: Float[Array, "in in"], searches: Any = True) -> Feedback:
    """Returns the `Feedback` for inputs with a second moment.

    Args:
      moment: the second moment ``[in, in]``.
      searches: whether the clip ratios of the blocks are searched.
    """
    diagonal = jnp.diagonal(moment)
    order = jnp.argsort(diagonal, descending=True)
    # In reverse order of the inputs, the lower Cholesky factor becomes an upper one.
    back = order[::-1]
    upper = jittered(moment[back][:, back], DAMPING, jnp.mean(diagonal))[::-1, ::-1]
    roots = jnp.diagonal(upper)
    error_weights = jnp.zeros_like(roots).at[order].set(roots**2)
    return Feedback(order, upper / roots[None], error_weights, jnp.asarray(searches, bool))


def best_clip_ratios(
    rows: Float[Array, "out in"], form: normal_float.Format, feedback: Feedback
) -> Float[Array, "blocks"]:
    """Returns for each block the ratio of `CLIP_RATIOS` with the smallest weighted loss.

    All ratios are 1 if the feedback says that they are not searched.
    """
    ones = jnp.ones(form.blocks(rows.size)[0])
    return lax.cond(feedback.searches, lambda: _searched(rows, form, feedback), lambda: ones)


def _searched(
    rows: Float[Array, "out in"], form: normal_float.Format, feedback: Feedback
) -> Float[Array, "blocks"]:
    """Searches the clip ratio of each block."""
    flat = rows.reshape(-1)
    error_weights = normal_float.runs(jnp.tile(feedback.error_weights, len(rows)), form.block)
    values = normal_float.runs(flat, form.block)
    largest = normal_float.block_scales(flat, form.block)
    largest = jnp.where(largest > 0, largest, 1)

    def step(best: tuple[Array, Array], ratio: Array) -> tuple[tuple[Array, Array], None]:
        scales = (largest * ratio)[:, None]
        codes = normal_float.nearest(values / scales, form.bits)
        error = values - normal_float.lookup(codes, form.bits) * scales
        loss = jnp.sum(error_weights * error**2, axis=1)
        better = loss < best[0]
        return (jnp.where(better, loss, best[0]), jnp.where(better, ratio, best[1])), None

    start = (jnp.full(largest.shape, jnp.inf), jnp.ones(largest.shape))
    return lax.scan(step, start, jnp.asarray(CLIP_RATIOS))[0][1]


def clipped_scales(
    flat: Float[Array, "n"], ratios: Float[Array, "blocks"], form: normal_float.Format
) -> normal_float.Codes:
    """Returns quantized scales, clip ratio times largest magnitude of each block, without codes."""
    return normal_float.Codes(
        None,
        *normal_float.quantize_scales(normal_float.block_scales(flat, form.block) * ratios, form),
    )


def quantize(
    rows: Float[Array, "out in"], form: normal_float.Format, feedback: Feedback | None = None
) -> normal_float.Codes:
    """Quantizes a transposed kernel.

    Args:
      rows: the transposed kernel ``[out, in]``.
      form: the format.
      feedback: how inputs compensate for each other; None rounds every weight to nearest.

    Returns:
      Codes of the flattened transposed kernel.
    """
    flat = rows.astype(jnp.float32).reshape(-1)
    if feedback is None:
        return normal_float.quantize(flat, form)
    fan_out, fan_in = rows.shape
    scaled = clipped_scales(flat, best_clip_ratios(flat.reshape(rows.shape), form, feedback), form)
    decoded = normal_float.dequantize_scales(scaled.scales, scaled.supers, scaled.offset, form)
    scales = jnp.repeat(decoded, form.block)[: flat.size].reshape(rows.shape)
    # Inputs along rows, in the order of quantization, padded to whole blocks.
    pad = -fan_in % BLOCK
    kernel, scales = (
        jnp.pad(a.T[feedback.order], ((0, pad), (0, 0))).reshape(-1, BLOCK, fan_out)
        for a in (flat.reshape(rows.shape), scales)
    )
    # Columns of U, block by block.
    upper = jnp.pad(feedback.upper, ((0, pad), (0, pad)))
    upper = upper.T.reshape(-1, BLOCK, fan_in + pad)

    def quantize_block(errors: Array, each: tuple[Array, ...]) -> tuple[Array, Array]:
        i, kernel, scales, columns = each
        shifted = kernel + mm(columns, errors)  # errors of later rows are still 0
        inner = lax.dynamic_slice(columns, (0, i * BLOCK), (BLOCK, BLOCK))
        safe = jnp.where(scales > 0, scales, 1)

        def quantize_input(own: Array, k: Array) -> tuple[Array, Array]:
            target = shifted[k] + mm(inner[k][None], own)[0]
            codes = normal_float.nearest(target / safe[k], form.bits)
            error = kernel[k] - normal_float.lookup(codes, form.bits) * scales[k]
            return own.at[k].set(error), codes

        own, codes = lax.scan(quantize_input, jnp.zeros_like(kernel), jnp.arange(BLOCK))
        return lax.dynamic_update_slice(errors, own, (i * BLOCK, 0)), codes

    no_errors = jnp.zeros((fan_in + pad, fan_out))
    _, codes = lax.scan(quantize_block, no_errors, (jnp.arange(len(kernel)), kernel, scales, upper))
    codes = codes.reshape(-1, fan_out)[jnp.argsort(feedback.order)]
    return scaled._replace(codes=codes.T.reshape(-1))
