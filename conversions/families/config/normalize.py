"""Brings a ``config.json`` into the form that the families read.

* The text part of a model of several modalities stands for the whole.
* Old names of classes and of model types become the present ones.
* A missing ``model_type`` follows from the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lordjax.conversions.families.config.key_names import IGNORED_KEYS
from lordjax.conversions.families.family import Family, Values

# Model type of several modalities -> model type of its text part, if the part does not name one.
TEXT_PARTS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
# Patterns of the other parts' tensors.
OTHER_PARTS = r"(model\.)?(vision_tower|multi_modal_projector)\..*"
# Keys of the whole that the text part takes over if it lacks them.
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
_SHARED += ("tie_word_embeddings", "transformers_version", IGNORED_KEYS)

_OLD_TYPES = {"stablelm_epoch": "stablelm"}
# Old names of classes that differ from the present ones by more than upper and lower case.
_OLD_CLASSES = {
    "stablelmepochforcausallm": "StableLmForCausalLM",
    "gptbigcodelmheadmodel": "GPTBigCodeForCausalLM",
    "gemma3textforcausallm": "Gemma3ForCausalLM",
}


def is_multimodal(hf_config: Values) -> bool:
    """Returns whether a config describes several modalities, of which the text part is opened."""
    kind = hf_config.get("model_type")
    return isinstance(kind, str) and kind in TEXT_PARTS and _text_part(hf_config) is not None


def _text_part(hf_config: Values) -> Mapping[str, Any] | None:
    part = hf_config.get("text_config")
    return part if isinstance(part, Mapping) else None


def normal_form(hf_config: Values, families: Mapping[str, Family]) -> dict[str, Any]:
    """Returns the config in the form that the families read.

    Args:
      hf_config: content of ``config.json``.
      families: all families by their model type.
    """
    new = dict(hf_config)
    if is_multimodal(new):
        new = _of_text(new, families)
    if isinstance(kind := new.get("model_type"), str) and kind in _OLD_TYPES:
        new["model_type"] = _OLD_TYPES[kind]
    names = new.get("architectures")
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        known = {name.lower(): name for f in families.values() for name in f.architectures}
        known |= _OLD_CLASSES
        new["architectures"] = [known.get(name.lower(), name) for name in names]
        if new.get("model_type") is None:
            named = set(new["architectures"])
            owners = [f.model_type for f in families.values() if named & set(f.architectures)]
            new |= {"model_type": owners[0]} if len(owners) == 1 else {}
    return new


def _of_text(hf_config: Values, families: Mapping[str, Family]) -> dict[str, Any]:
    """Returns the config of the text part as that of a model of its own."""
    part = dict(_text_part(hf_config) or {})
    shared = {key: hf_config[key] for key in _SHARED if key in hf_config}
    kind = part.get("model_type") or TEXT_PARTS[hf_config["model_type"]]
    family = families.get(kind) if isinstance(kind, str) else None
    classes = [] if family is None else list(family.architectures[:1])
    return {**shared, **part, "model_type": kind, "architectures": classes}
