"""Decides which keys of a ``config.json`` a model may depend on.

``config.json`` is read directly, not through ``AutoConfig``, which accepts every key. Every key is

* *read* (`Family.defaults`, `Family.rope_keys`),
* understood at *fixed values* only (`Family.fixed`, `FIXED`), or
* *skipped*, by a rule that also holds for keys that nobody has seen: values that say nothing (null,
  false, empty), names of training, tokenisation, generation and bookkeeping (`HARMLESS`), and
  repetitions of a key that is read (`SYNONYMS`).

Every other key is an error, because it might change the model. A user who knows better names the
key in `IGNORED_KEYS`, which stays in the config of every result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lordjax.conversions.families.config.key_names import (
    HARMLESS,
    IGNORED_KEYS,
    ruled_out_keys,
    says_nothing,
    unknown_key,
)
from lordjax.conversions.families.family import Family, Values
from lordjax.conversions.families.rope import ROPE_KEYS
from lordjax.names import did_you_mean

# Keys that are understood at some values only, in families that do not read them.
FIXED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "scale_attn_weights": (True,),
    "layer_norm_elementwise_affine": (True,),
    "pooler_act": ("tanh",),
}

# Names that programs give to one and the same thing. A key that is not read says nothing if it
# repeats the one that is.
SYNONYMS = (
    {"hidden_size", "n_embd", "d_model"},
    {"num_hidden_layers", "n_layer", "n_layers", "num_layers"},
    {"num_attention_heads", "n_head", "n_heads", "num_heads"},
    {"num_key_value_heads", "num_kv_heads", "n_kv_heads"},
    {"intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"},
    {"rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"},
    {"hidden_act", "hidden_activation", "activation_function", "activation"},
    {"rotary_pct", "partial_rotary_factor"},
    {"rotary_emb_base", "rope_theta"},
    {"attention_bias", "qkv_bias", "use_qkv_bias", "enable_bias"},
    {"tie_word_embeddings", "tie_embeddings"},
)
# Other names of the longest sequence. No model computes with it, so they need not be equal.
_LENGTHS = frozenset(("n_ctx", "n_positions", "max_seq_len", "max_seq_length", "seq_length"))
_LENGTHS |= {"model_max_length", "max_position_embeddings"}
_FACTOR = re.compile(r"\w+_(multiplier|scaling|scale)")  # a factor of 1 changes nothing
_QUANTISED = ("quantization_config", "quantization", "compression_config")
_WINDOW_KEYS = frozenset(("sliding_window", "max_window_layers", "sliding_window_pattern"))
_WINDOW_KEYS |= {"_sliding_window_pattern", "sliding_window_size", "use_sliding_window"}


def key_problems(family: Family, hf_config: Values, values: Values) -> list[str]:
    """Lists the keys of a config that might change the model.

    Args:
      family: the model's family.
      hf_config: content of ``config.json``.
      values: values of the keys that the family reads.
    """
    problems, ruled_out = [], set(ruled_out_keys(hf_config))
    read = set(family.defaults) | family.rope_keys
    for key, value in hf_config.items():
        if key in read or key in family.ignored:
            continue
        accepted = family.fixed.get(key, _common(family).get(key))
        if accepted is not None:
            if not (_among(value, accepted) or _repeats(key, value, values)):
                problems.append(f"{key} = {value!r}: only {accepted[0]!r} is supported")
        elif key in _QUANTISED and value:
            problems.append(f"{key}: the checkpoint is quantised; open the original model instead")
        elif not (key in ruled_out or _is_harmless(key, value, hf_config, values)):
            problems.append(unknown_key(key, value))
    return problems


def _common(family: Family) -> Mapping[str, tuple[Any, ...]]:
    return {**FIXED, "is_causal": (bool(family.constants.get("causal", True)),)}


def _among(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Returns whether a value is accepted; null is the default, which every row accepts."""
    return value is None or value in accepted or (not value and not all(accepted))


def _is_harmless(key: str, value: Any, hf_config: Values, values: Values) -> bool:
    return (
        says_nothing(value)
        or HARMLESS.fullmatch(key) is not None
        or (_FACTOR.fullmatch(key) is not None and value == 1)
        or (key in _LENGTHS and bool(_LENGTHS & values.keys()))
        or (key in _WINDOW_KEYS and _no_window(hf_config))
        or (key == "layer_types" and _is_full(value, values))
        or _repeats(key, value, values)
    )


def _repeats(key: str, value: Any, values: Values) -> bool:
    """Returns whether a key that is not read has the value of a synonym that is read."""
    group: Iterable[str] = next((names for names in SYNONYMS if key in names), ())
    read = [values[name] for name in group if name in values]
    return any(own == value and isinstance(own, bool) == isinstance(value, bool) for own in read)


def _no_window(hf_config: Values) -> bool:
    """Returns whether the keys of a sliding window switch it off."""
    window, longest = hf_config.get("sliding_window"), hf_config.get("max_position_embeddings")
    if hf_config.get("use_sliding_window") is False or not window:
        return True
    return type(window) is int and type(longest) is int and window >= longest


def _is_full(kinds: Any, values: Values) -> bool:
    """Returns whether ``layer_types`` says that all layers have full attention."""
    count = values.get("num_hidden_layers")
    return isinstance(kinds, list) and kinds == ["full_attention"] * len(kinds) == kinds[:count]


def rule_out(
    hf_config: Values, names: Iterable[str], where: str, others: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns the config with a note that the model does not depend on some of its keys.

    Args:
      hf_config: content of ``config.json``.
      names: names of keys, at the top level or of the rotary embedding.
      where: name of the file in error messages.
      others: keys of other metadata of the model, which are noted only.

    Raises:
      ValueError: if the config has no such key.
    """
    present = dict.fromkeys(hf_config)
    for part in (hf_config.get(key) for key in (*ROPE_KEYS, "text_config")):
        present |= dict.fromkeys(part) if isinstance(part, Mapping) else {}
    for name in names:
        if name not in present:
            hint = did_you_mean(name, present)
            raise ValueError(f"--ignore-key {name}: {where} has no such key; {hint}")
    kept = sorted({*ruled_out_keys(hf_config), *names, *others})
    return {**hf_config, IGNORED_KEYS: kept} if kept else dict(hf_config)
