"""Reads and checks the values of a ``config.json``; `families.config.keys` says which keys count.

A missing key takes the default of the family's config class in transformers. Sizes are checked
against `LARGEST` before anything is built from them.
"""

from __future__ import annotations

import math
from typing import Any

from lordjax.conversions.families.config.keys import key_problems
from lordjax.conversions.families.family import Family, Values
from lordjax.models.config import LARGEST, size_problem
from lordjax.models.layers import ACTIVATIONS

# Keys that may be null, which means: derived from other sizes, no sliding window, no soft cap.
_NULLABLE = frozenset(
    (
        *("num_key_value_heads", "head_dim", "sliding_window", "layer_types", "n_inner"),
        *("attn_logit_softcapping", "final_logit_softcapping"),
    )
)
_NULL_IS_DEFAULT = frozenset(("partial_rotary_factor",))
# Sizes that follow from others where they are missing.
_OPTIONAL = frozenset(("num_kv_heads", "head_size", "mlp_size", "embed_size"))


def read_keys(family: Family, hf_config: Values, problems: list[str]) -> dict[str, Any]:
    """Reads the values of a family's keys.

    A value of the wrong type is a problem, and is replaced by the default to find more problems.

    Args:
      family: the model's family.
      hf_config: content of ``config.json``.
      problems: list that problems are appended to.
    """
    values = dict(family.defaults)
    for key, default in family.defaults.items():
        value = hf_config.get(key, default)
        if value is None and (default is False or key in _NULL_IS_DEFAULT):
            value = default
        if (problem := _type_problem(key, value, default)) is None:
            values[key] = value
        else:
            problems.append(f"{key} = {value!r}: {problem}")
    problems += key_problems(family, hf_config, values)
    key = family.fields["activation"]
    if values[key] not in ACTIVATIONS:
        problems.append(f"{key} = {values[key]!r}: supported: {', '.join(ACTIVATIONS)}")
    key = family.fields.get("norm_eps")
    if key is not None and values[key] < 0:
        problems.append(f"{key} = {values[key]!r}: expected a number that is not negative")
    return values


def _type_problem(key: str, value: Any, default: Any) -> str | None:
    """Returns what is wrong with the type of a value, or None."""
    if type(value) is float and not math.isfinite(value):
        return "expected a finite number"
    if default is None or (value is None and key in _NULLABLE):
        return None
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    return None if type(value) in kinds else f"expected a {type(default).__name__}"


def read_sizes(family: Family, values: Values, problems: list[str]) -> bool:
    """Checks every size that a family reads, before anything is built from it.

    Args:
      family: the model's family.
      values: values of `read_keys`.
      problems: list that problems are appended to.

    Returns:
      Whether all sizes are possible.
    """
    found = []
    for field, key in family.fields.items():
        value = values[key]
        if field not in LARGEST or (value is None and field in _OPTIONAL):
            continue
        if (problem := size_problem(field, value)) is not None:
            found.append(f"{key} = {value!r}: {problem}")
    problems += found
    return not found


def fill_sizes(fields: dict[str, Any], rotary: bool, problems: list[str]) -> None:
    """Fills in the optional sizes of ``fields`` and checks that all sizes fit together.

    Args:
      fields: fields of `ModelConfig`; changed in place.
      rotary: whether the model has rotary positions.
      problems: list that problems are appended to.
    """
    if fields.get("num_kv_heads") is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if fields["mlp_size"] is None:  # GPT-2's convention
        fields["mlp_size"] = 4 * fields["hidden_size"]
    if fields.get("head_size") is None:
        fields["head_size"] = fields["hidden_size"] // fields["num_heads"]
        if fields["hidden_size"] % fields["num_heads"]:
            problems.append("hidden_size is no multiple of the number of heads; set head_dim")
    if fields["num_heads"] % fields["num_kv_heads"]:
        problems.append(
            f"{fields['num_heads']} query heads are no multiple of "
            f"{fields['num_kv_heads']} key/value heads"
        )
    if rotary and fields["head_size"] % 2:
        problems.append(f"head size {fields['head_size']}: rotary positions need an even size")
