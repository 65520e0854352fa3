"""Coordinate descent on codes and scales, after error compensation.

Error compensation (`error_feedback`) chooses every code once, when the codes after it are not known
yet. Coordinate descent goes over all of them again. With the errors ``E = W - Q`` and the second
moment H of the inputs the loss is ``tr(Eᵀ H E)``, a parabola in each entry of Q while all others
are fixed. Its lowest point is::

    Q_k = W_k + Σ_{i≠k} H_ki E_i / H_kk

and the best code is the one nearest to it. The scale of a block of codes is a parabola, too; the
nearest quantized scale is its best value. So no step raises the loss, and nothing more is stored.

The scales of scales and the offset stay, because other blocks share them. Scales stay where the
model's predictions do not gain by a search for them (`compression.measured.scale_search`).

Source: QuantEase, arXiv 2309.01885, and CDQuant, 2406.17542, for codes; theory/lq_lora §7.3b.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from lordjax.kernels import normal_float
from lordjax.methods.linalg import mm
from lordjax.methods.quantized import error_feedback
from lordjax.methods.quantized.error_feedback import BLOCK, DAMPING
from lordjax.methods.quantized.weightings import Weights

PASSES = 3  # over all codes and scales; eight gain little more (docs/pages/tried.md)
REFITTED = (16, 32, 64)  # sizes of blocks of codes whose scales change


def quantize(
    rows: Float[Array, "out in"], form: normal_float.Format, weights: Weights
) -> normal_float.Codes:
    """Quantizes a transposed kernel, with error compensation and descent where weights allow it.

    Args:
      rows: the transposed kernel.
      form: the format.
      weights: weights of the errors.

    Returns:
      Codes of the flattened transposed kernel.
    """
    codes = error_feedback.quantize(rows, form, weights.feedback)
    return codes if weights.feedback is None else refine(rows, codes, form, weights)


class _Block(NamedTuple):
    """What a descent reads of `BLOCK` inputs; scales are ``[groups of inputs, out]``.

    Attributes:
      start: number of the first input.
      kernel: their rows of the kernel ``[BLOCK, out]``.
      moment: their rows of the second moment ``[BLOCK, in]``.
      numbers: their codes ``[BLOCK, out]``.
      steps: codes u of their scales, as float32.
      high: with ``low`` the unit of the scales; see `normal_float.scale_steps`.
      low: see ``high``.
    """

    start: Array
    kernel: Array
    moment: Array
    numbers: Array
    steps: Array
    high: Array
    low: Array


def refine(
    rows: Float[Array, "out in"],
    codes: normal_float.Codes,
    form: normal_float.Format,
    weights: Weights,
) -> normal_float.Codes:
    """Returns codes and scales with a smaller loss, or the same ones.

    Args:
      rows: the transposed kernel.
      codes: its codes, flattened.
      form: their format. Scales stay if blocks of codes cross rows, or are not of `REFITTED` sizes.
      weights: weights of the errors, with feedback. Scales stay if those are not searched either.
        The second moment of the inputs gets the damping of `error_feedback`.
    """
    fan_out, fan_in = rows.shape
    pad = -fan_in % BLOCK
    refits = form.block in REFITTED and fan_in % form.block == 0
    refit = weights.feedback.searches if refits else None
    damping = DAMPING * jnp.mean(jnp.diagonal(weights.inputs))
    inert = jnp.where(jnp.arange(fan_in + pad) < fan_in, damping, 1)
    moment = jnp.pad(weights.inputs, ((0, pad), (0, pad))) + jnp.diag(inert)

    def in_blocks(a: Array, per: int = 1) -> Array:
        """Returns numbers of ``[out, in / per]`` as ``[blocks, BLOCK / per, out]``."""
        padded = jnp.pad(a.reshape(fan_out, -1).T, ((0, pad // per), (0, 0)))
        return padded.reshape(-1, BLOCK // per, fan_out)

    def of_weights(a: Array) -> Array:
        """Returns numbers of the blocks of codes as those of single weights or of whole groups."""
        if refits:
            return in_blocks(a, form.block)
        return in_blocks(jnp.repeat(a, form.block)[: rows.size])

    units = (jnp.repeat(a, form.scale_block) for a in normal_float.scale_steps(codes.supers, form))
    high, low = (of_weights(a[: len(codes.scales)]) for a in units)
    blocks = _Block(
        BLOCK * jnp.arange(len(moment) // BLOCK),
        in_blocks(rows.astype(jnp.float32)),
        moment.reshape(-1, BLOCK, len(moment)),
        in_blocks(codes.codes),
        of_weights(codes.scales.astype(jnp.float32)),
        high,
        low,
    )

    def descend(chosen: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        now = blocks._replace(numbers=chosen[0], steps=chosen[1])
        decoded = normal_float.lookup(now.numbers, form.bits) * _scales(now, codes.offset)
        errors = now.kernel - decoded
        step = functools.partial(_descend_block, offset=codes.offset, refit=refit, form=form)
        return lax.scan(step, errors.reshape(-1, fan_out), now)[1], None

    (numbers, steps), _ = lax.scan(descend, (blocks.numbers, blocks.steps), None, length=PASSES)
    numbers = numbers.reshape(-1, fan_out)[:fan_in].T.reshape(-1)
    if not refits:
        return codes._replace(codes=numbers)
    steps = steps.reshape(-1, fan_out)[: fan_in // form.block].T.reshape(-1)
    return codes._replace(codes=numbers, scales=steps.astype(codes.scales.dtype))


def _scales(block: _Block, offset: Array) -> Array:
    """Returns the scale of every weight, of one or more blocks."""
    scales = offset + block.steps * block.high + block.steps * block.low
    return jnp.repeat(scales, BLOCK // scales.shape[-2], axis=-2)


def _descend_block(
    errors: Float[Array, "in out"],
    block: _Block,
    *,
    offset: Float[Array, ""],
    refit: Bool[Array, ""] | None,
    form: normal_float.Format,
) -> tuple[Float[Array, "in out"], tuple[Array, Array]]:
    """Replaces every code of some inputs once, and then their scales if ``refit`` is True.

    Returns:
      The errors of all weights; the codes of the block and of its scales.
    """
    inner = lax.dynamic_slice(block.moment, (0, block.start), (BLOCK, BLOCK))
    own = lax.dynamic_slice(errors, (block.start, 0), block.kernel.shape)
    scales = _scales(block, offset)
    safe = jnp.where(scales > 0, scales, 1)

    def one(state: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], Array]:
        pulls, own = state  # H E of these inputs, and E
        target = block.kernel[k] + pulls[k] / inner[k, k] - own[k]
        code = normal_float.nearest(target / safe[k], form.bits)
        error = block.kernel[k] - normal_float.lookup(code, form.bits) * scales[k]
        pulls = pulls + inner[:, k][:, None] * (error - own[k])[None]
        return (pulls, own.at[k].set(error)), code

    pulls = mm(block.moment, errors)
    (pulls, own), numbers = lax.scan(one, (pulls, own), jnp.arange(BLOCK))
    steps = block.steps
    if refit is not None:
        values = normal_float.lookup(numbers, form.bits)
        for group in range(len(steps)):
            here = slice(group * form.block, (group + 1) * form.block)
            unit = block.high[group] + block.low[group]
            curvature = unit * jnp.sum(values[here] * mm(inner[here, here], values[here]), axis=0)
            slope = jnp.sum(values[here] * pulls[here], axis=0)
            change = jnp.where(curvature > 0, slope / jnp.where(curvature > 0, curvature, 1), 0)
            new = jnp.clip(jnp.round(steps[group] + change), 0, 2**form.scale_bits - 1)
            new = jnp.where(refit, new, steps[group])
            moved = values[here] * (unit * (new - steps[group]))[None]
            pulls, own = pulls - mm(inner[:, here], moved), own.at[here].add(-moved)
            steps = steps.at[group].set(new)
    return lax.dynamic_update_slice(errors, own, (block.start, 0)), (numbers, steps)
