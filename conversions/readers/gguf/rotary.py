"""Turns the rotary embedding of a GGUF file into keys of ``config.json``.

GGUF stores tables of divisors, one per rotary pair, for two kinds of scaling: Llama 3's
(``rope_freqs``), whose parameters are recovered here, and longrope (``rope_factors_long`` and
``rope_factors_short``), whose tables are the parameters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from lordjax.conversions.readers.gguf.architectures.row import Architecture
from lordjax.conversions.readers.gguf.decode import read_values
from lordjax.conversions.readers.gguf.facts import Facts
from lordjax.models.config import Rope
from lordjax.models.rope import rope_frequencies

LLAMA3, LONG, SHORT = (
    f"{name}.weight" for name in ("rope_freqs", "rope_factors_long", "rope_factors_short")
)
_LENGTH = "original_max_position_embeddings"
_TYPES = ("none", "linear", "yarn", "longrope")
# Metadata keys that `rope_config` reads.
ROPE_KEYS = frozenset(
    """rope.freq_base rope.global.freq_base rope.dimension_count rope.scale_linear
    rope.scaling.type rope.scaling.factor rope.scaling.original_context_length
    rope.scaling.attn_factor rope.scaling.yarn_attn_factor rope.scaling.yarn_ext_factor
    rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow""".split()  # noqa: SIM905
)


def rope_config(
    facts: Facts, row: Architecture, config: dict[str, Any], head_size: int
) -> dict[str, Any]:
    """Returns the config keys of the rotary embedding, which transformers 4 and 5 both read.

    Args:
      facts: metadata and tensors of the file.
      row: its architecture, with rotary positions.
      config: the config so far.
      head_size: number of columns of a head.
    """
    assert row.rope is not None
    theta = facts.get("rope.global.freq_base", float, 10_000.0)  # Ollama's name in Gemma 3
    theta = facts.get("rope.freq_base", float, theta)
    found: dict[str, Any] = {row.rope.theta: theta}
    size = facts.get("rope.dimension_count", int, head_size)
    if row.rope.share is not None and 0 < size <= head_size:
        found[row.rope.share] = _share(size, head_size)
    elif size != head_size:
        key = f"{facts.architecture}.rope.dimension_count"
        facts.problem(key, size, f"the head size, {head_size}")
    longest = config[row.max_positions]
    kind = _kind(facts)
    if LLAMA3 in facts.tensors:
        found["rope_scaling"] = _llama3(facts, theta, head_size)
    elif kind == "linear":
        found["rope_scaling"] = {"rope_type": "linear", "factor": _factor(facts)}
    elif kind == "yarn":
        found["rope_scaling"] = _yarn(facts, longest)
    elif kind == "longrope":
        found["rope_scaling"] = _longrope(facts)
        found[_LENGTH] = facts.get("rope.scaling.original_context_length", int, longest)
    else:
        found["rope_scaling"] = None
    return found


def _kind(facts: Facts) -> str:
    """Returns the kind of scaling; kinds that contradict each other are a problem."""
    linear = facts.get("rope.scale_linear", float)
    kind = facts.get("rope.scaling.type", str, "linear" if linear else "none")
    if kind not in _TYPES:
        key = f"{facts.architecture}.rope.scaling.type"
        facts.problem(key, kind, f"one of {', '.join(_TYPES)}")
    tables = [name for name in (LLAMA3, LONG, SHORT) if name in facts.tensors]
    if tables == [LONG, SHORT] and kind in ("none", "longrope"):
        return "longrope"
    if kind == "longrope" or (tables and (tables != [LLAMA3] or kind != "none")):
        facts.problems.append(
            f"{kind} scaling of rotary positions and the tables {tables or 'none'}: expected "
            f"{LLAMA3} alone, {LONG} and {SHORT} with longrope, or no tables with the others"
        )
        return "none"
    return kind


def _share(size: int, head_size: int) -> float:
    """Returns the rotated fraction; its product with the head size is not below ``size``."""
    share = size / head_size
    return share if int(head_size * share) == size else math.nextafter(share, 2.0)


def _factor(facts: Facts) -> float:
    return facts.get("rope.scaling.factor", float, facts.get("rope.scale_linear", float, 1.0))


def _llama3(facts: Facts, theta: float, head_size: int) -> dict[str, Any] | None:
    divisors = np.ravel(read_values(facts.tensors[LLAMA3]))
    length = facts.get("rope.scaling.original_context_length", int, 8192)
    scaling = None
    if len(divisors) == head_size // 2 and np.isfinite(divisors).all() and (divisors > 0).all():
        scaling = llama3_scaling(divisors, theta, head_size, length)
    if scaling is None:
        facts.problems.append(f"{LLAMA3}: expected a table of Llama 3's rotary scaling")
    return scaling or None


def _longrope(facts: Facts) -> dict[str, Any]:
    """Returns the tables; shortest decimals of single precision, as in ``config.json``."""
    tables = {
        f"{name}_factor": [float(str(x)) for x in np.ravel(read_values(facts.tensors[table]))]
        for name, table in (("long", LONG), ("short", SHORT))
    }
    attention = facts.get("rope.scaling.attn_factor", float)
    extra = {} if attention is None else {"attention_factor": attention}
    return {"rope_type": "longrope", **tables, **extra}


def _yarn(facts: Facts, longest: int) -> dict[str, Any]:
    ext = facts.get("rope.scaling.yarn_ext_factor", float, 1.0)
    if ext not in (1.0, -1.0):  # -1 means the default, 1
        key = f"{facts.architecture}.rope.scaling.yarn_ext_factor"
        facts.problem(key, ext, "1 or -1")
    # llama.cpp multiplies this scale by 1 + log(factor) / 10.
    scale = facts.get("rope.scaling.attn_factor", float, 1.0)
    scale = facts.get("rope.scaling.yarn_attn_factor", float, scale)
    factor = _factor(facts)
    if factor <= 0:
        facts.problem(f"{facts.architecture}.rope.scaling.factor", factor, "a number above 0")
        return {}
    return {
        "rope_type": "yarn",
        "factor": factor,
        _LENGTH: facts.get("rope.scaling.original_context_length", int, longest),
        "attention_factor": scale * (1.0 + 0.1 * math.log(factor)),
        "beta_fast": facts.get("rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": facts.get("rope.scaling.yarn_beta_slow", float, 1.0),
    }


def llama3_scaling(
    divisors: Float[np.ndarray, " half"], theta: float, head_size: int, length: int
) -> dict[str, Any] | None:
    """Recovers the parameters of Llama 3's rotary scaling from its table of divisors.

    The published parameters are tried first, then the parameters of the ramp are fitted: the kept
    fraction of a frequency is ``(turns - low) / (high - low)``, with its number of turns over the
    original length. A common factor of length, low and high cancels, so low is set to 1.

    Args:
      divisors: divisor of every rotary frequency, ``[head_size / 2]``.
      theta: base of the rotary frequencies.
      head_size: number of columns of a head.
      length: original context length to try first, in tokens.

    Returns:
      The dict for ``rope_scaling``; an empty dict if all divisors are 1, None if no parameters fit.
    """
    factor = float(divisors.max())
    if np.allclose(divisors, 1.0):
        return {}
    freq, _ = rope_frequencies(Rope(theta), head_size, length, length)
    keep = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    tries = [(1.0, 4.0, length)]
    ramp = (keep > 1e-3) & (keep < 1 - 1e-3)
    if ramp.sum() >= 2:
        slope, offset = np.polyfit(freq[ramp] / (2 * math.pi), keep[ramp], 1)
        if offset < 0:
            tries.append((1.0, 1 - 1 / offset, round(-slope / offset)))
    for low, high, original in tries:
        rope = Rope(theta, "llama3", factor, original, low, high)
        got, _ = rope_frequencies(rope, head_size, original, original)
        if np.allclose(got * divisors, freq, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": float(high),
                "original_max_position_embeddings": original,
            }
    return None
