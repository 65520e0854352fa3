"""Rotary position embedding: frequencies from the config, rotation of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lordjax.models.config import Rope
from lordjax.runtime import xla_scheduling

LENGTH_DEPENDENT = ("dynamic", "longrope")  # kinds whose frequencies depend on the length


def rope_frequencies(
    rope: Rope, head_size: int, max_positions: int, length: int
) -> tuple[np.ndarray, float]:
    """Computes the frequency of each rotary pair, and the factor on cos and sin.

    Pairs beyond ``rope.size`` are not rotated: their frequency is 0.

    Args:
      rope: base and scaling of the frequencies.
      head_size: width of a head; even.
      max_positions: longest sequence of the model, in tokens.
      length: sequence length in use, in tokens; only ``longrope`` reads it. Frequencies of
        ``dynamic`` are those up to the trained length; `row_frequencies` knows the others.

    Returns:
      Frequencies ``[head_size / 2]`` in radians per position (float32); factor on cos and sin.

    Raises:
      ValueError: if the scaling kind is unknown.

    Source: the definitions of ``transformers.modeling_rope_utils``; llama3: Llama 3.1's reference
    code; yarn: arXiv 2309.00071; longrope: arXiv 2402.13753; dynamic: NTK-aware scaling.
    """
    theta, trained = rope.theta, rope.original_max_positions or max_positions
    size = rope.size or head_size
    freq = 1.0 / theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
    match rope.kind:
        case "default" | "dynamic":
            scale = 1.0
        case "none":  # layers without positions
            freq, scale = np.zeros_like(freq), 1.0
        case "linear":
            freq, scale = freq / rope.factor, 1.0
        case "llama3":
            turns = trained * freq / (2 * math.pi)
            ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            keep = np.clip(ramp, 0.0, 1.0)
            freq, scale = freq * keep + freq / rope.factor * (1 - keep), 1.0
        case "yarn":
            keep = _yarn_keep(rope, size, trained)
            freq, scale = freq * keep + freq / rope.factor * (1 - keep), _yarn_scale(rope)
        case "longrope":
            stretch = rope.long_factor if length > trained else rope.short_factor
            freq, scale = freq / np.asarray(stretch), _longrope_scale(rope, trained)
        case _:
            raise ValueError(
                f"unknown rope scaling {rope.kind!r}; known: default, linear, dynamic, llama3, "
                "yarn, longrope, none"
            )
    return np.pad(freq, (0, (head_size - size) // 2)).astype(np.float32), scale


def row_frequencies(
    rope: Rope, head_size: int, max_positions: int, positions: Int[Array, "#b s"]
) -> tuple[Float[Array, "#b half"], float]:
    """Computes the frequencies of every row of a batch, by the row's own length.

    The length of a row is one more than its last position. So a row's frequencies depend neither
    on the other rows nor on padding that repeats the last position.

    Args:
      rope: base and scaling of the frequencies.
      head_size: width of a head; even.
      max_positions: longest sequence of the model, in tokens.
      positions: position of every token.

    Returns:
      Frequencies in radians per position, with one row for all where the kind of scaling does not
      depend on the length; factor on cos and sin.

    Raises:
      ValueError: as `rope_frequencies`.
    """
    trained = rope.original_max_positions or max_positions
    base, scale = rope_frequencies(rope, head_size, max_positions, trained)
    if rope.kind not in LENGTH_DEPENDENT:
        return jnp.asarray(base)[None], scale
    lengths = jnp.max(positions, axis=1, keepdims=True) + 1  # [b, 1]
    if rope.kind == "longrope":
        long, _ = rope_frequencies(rope, head_size, max_positions, trained + 1)
        return jnp.where(lengths > trained, long[None], base[None]), scale
    # NTK: the base of the powers grows with the length, by this factor to size / (size - 2).
    beyond = jnp.maximum(lengths, trained).astype(jnp.float32) / trained
    stretch = rope.factor * beyond - (rope.factor - 1)
    size = rope.size or head_size
    powers = np.pad(np.arange(0, size, 2) / (size - 2), (0, (head_size - size) // 2))
    exponents = -jnp.asarray(powers, jnp.float32)[None]
    return jnp.asarray(base)[None] * stretch**exponents, scale


def trained_length(ropes: Iterable[Rope | None], max_positions: int) -> int | None:
    """Returns the length above which a row's frequencies change; None: they never do."""
    lengths = [
        rope.original_max_positions or max_positions
        for rope in ropes
        if rope is not None and rope.kind in LENGTH_DEPENDENT
    ]
    return min(lengths, default=None)


def _yarn_keep(rope: Rope, head_size: int, trained: int) -> np.ndarray:
    """Weight of each trained frequency: 1 keeps it, 0 divides it by the full factor."""

    def dimension(turns: float) -> float:
        return head_size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    ramp = (np.arange(head_size // 2) - low) / max(high - low, 1e-3)
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def _yarn_scale(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _longrope_scale(rope: Rope, trained: int) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(max(rope.factor, 1.0)) / math.log(trained))


def rotate(
    x: Float[Array, "b s h d"],
    positions: Int[Array, "#b s"],
    frequencies: Float[Array, "*#b #h half"],
    scale: float,
) -> Float[Array, "b s h d"]:
    """Applies the rotary embedding in the half-split layout: pair i is columns (i, i + d/2).

    Heads may have frequencies of their own: a head with pruned pairs keeps the frequencies of the
    others. Angles are computed as an exact float32 product, not as a matmul: with reduced precision
    in this one product the perplexity of SmolLM2-135M goes from 29 to 52.

    Args:
      x: queries or keys.
      positions: position of every token.
      frequencies: radians per position, for all heads or head by head; with a leading axis also
        row by row.
      scale: factor on cos and sin of rotated pairs.
    """
    steps = positions[..., None, None].astype(jnp.float32)
    frequencies = frequencies[..., None, :, :] if frequencies.ndim == 3 else frequencies[None, None]
    angles = steps * frequencies  # [b, s, h, half]
    factor = jnp.where(frequencies == 0, 1.0, scale)  # pairs that are not rotated stay as they are
    cos, sin = (
        xla_scheduling.compute_once(factor * jnp.cos(angles)),
        xla_scheduling.compute_once(factor * jnp.sin(angles)),
    )
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
