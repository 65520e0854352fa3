"""SmolLM3: Llama with some layers that have no positions, and may have a sliding window."""

from __future__ import annotations

import dataclasses
from typing import Any

from lordjax.conversions.families.family import Values, is_positive_int
from lordjax.conversions.families.llama import LLAMA
from lordjax.conversions.families.sliding_windows import one_window
from lordjax.models.config import UNLIMITED, Rope

_KINDS = ("full_attention", "sliding_attention")


def _rotary_layers(values: Values, problems: list[str]) -> list[bool]:
    """Reads which layers have rotary positions; by default every n-th one has none."""
    every, count = values["no_rope_layer_interval"], values["num_hidden_layers"]
    flags = values["no_rope_layers"]
    if flags is None:
        if not is_positive_int(every):
            problems.append(f"no_rope_layer_interval = {every!r}: expected a positive integer")
            return [True] * count
        return [(i + 1) % every != 0 for i in range(count)]
    if not isinstance(flags, list) or len(flags) < count or not all(f in (0, 1) for f in flags):
        problems.append(f"no_rope_layers = {flags!r}: expected {count} times 0 or 1")
        return [True] * count
    return [bool(flag) for flag in flags[:count]]


def _windows(values: Values, problems: list[str]) -> tuple[int | None, ...] | None:
    """Returns a window for each layer without positions; without a limit where it has none."""
    rotary = _rotary_layers(values, problems)
    window = None
    if values["use_sliding_window"] and one_window(values, problems) is not None:
        window = values["sliding_window"]
    kinds = values["layer_types"]
    if kinds is None:
        kinds = [_KINDS[window is not None and not rotates] for rotates in rotary]
    if not isinstance(kinds, list) or len(kinds) != len(rotary) or set(kinds) - set(_KINDS):
        expected = " or ".join(_KINDS)
        problems.append(f"layer_types = {kinds!r}: expected {len(rotary)} times {expected}")
        return None
    slides = [kind == _KINDS[1] for kind in kinds]
    if any(slides) and window is None:
        problems.append("layer_types: a layer slides, but no sliding window is in use")
    if any(s and rotates for s, rotates in zip(slides, rotary, strict=True)):
        problems.append("layer_types: only layers without rotary positions may slide")
    if all(rotary):
        return None
    return tuple(
        None if rotates else window if s else UNLIMITED
        for s, rotates in zip(slides, rotary, strict=True)
    )


def _local_rope(hf_config: Values, values: Values, problems: list[str]) -> dict[str, Any]:
    """Returns that layers with a window have no positions."""
    del hf_config, problems
    return {"local_rope": None if all(_rotary_layers(values, [])) else Rope(kind="none")}


SMOLLM3 = dataclasses.replace(
    LLAMA,
    model_type="smollm3",
    architectures=(
        "SmolLM3ForCausalLM",
        "SmolLM3ForSequenceClassification",
        "SmolLM3ForTokenClassification",
        "SmolLM3Model",
    ),
    defaults={
        **LLAMA.defaults,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    windows=_windows,
    derive=_local_rope,
)
