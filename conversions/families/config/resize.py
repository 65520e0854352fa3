"""The ``config.json`` of a model with other sizes: fewer blocks or heads, a narrower MLP."""

from __future__ import annotations

import dataclasses
from typing import Any

from lordjax.conversions.families.config.keys import SYNONYMS
from lordjax.conversions.families.family import Values
from lordjax.conversions.families.registry import family_of, model_config, normalized
from lordjax.models.config import ModelConfig

SIZES = ("mlp_size", "num_layers", "num_heads", "num_kv_heads", "head_size")
PER_LAYER = ("layer_types",)  # keys with an entry for each block


def resized(hf_config: Values, config: ModelConfig) -> dict[str, Any]:
    """Returns the ``config.json`` of a model of the same class with other sizes.

    Args:
      hf_config: ``config.json`` of the original model.
      config: the architecture with the new sizes.

    Raises:
      ValueError: if the family's config cannot describe the architecture.
    """
    if model_config(hf_config) == config:
        return dict(hf_config)
    new, family = normalized(hf_config), family_of(hf_config)
    for field in SIZES:
        if (key := family.fields.get(field)) is None:
            continue
        own: set[str] = next((names for names in SYNONYMS if key in names), set())
        new |= dict.fromkeys([key, *(name for name in own if name in new)], getattr(config, field))
    for key in PER_LAYER:
        if isinstance(new.get(key), list):
            new[key] = new[key][: config.num_layers]
    try:
        found = model_config(new)
    except ValueError as error:
        raise ValueError(f"{_cannot(family.model_type)} ({error})") from error
    if found != config:
        fields = dataclasses.fields(config)
        other = [f.name for f in fields if getattr(found, f.name) != getattr(config, f.name)]
        raise ValueError(f"{_cannot(family.model_type)} ({', '.join(other)})")
    return new


def _cannot(family: str) -> str:
    return (
        f"the config of {family} models cannot describe the model's new sizes; export it with "
        "--to factored, or compress it to free shapes"
    )


def can_describe(hf_config: Values, config: ModelConfig) -> bool:
    """Returns whether the ``config.json`` of a family can describe an architecture."""
    try:
        resized(hf_config, config)
    except ValueError:
        return False
    return True
