"""How a model generates unless told otherwise: its end tokens, and how its tokens are sampled.

A model says both in ``generation_config.json``. End tokens may also be in ``config.json`` and in
the tokenizer, so all three are read. The rules are those of transformers: sampling happens only
where ``do_sample`` is true, with 50 candidates unless ``top_k`` says otherwise; end tokens of
``generation_config.json`` replace those of ``config.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lordjax.generation.chat_turns import turn_ends
from lordjax.generation.sampling import Sampling

_TOP_K = 50  # of transformers, where tokens are sampled and nothing says how many
# Settings that would change answers and that are not followed -> the value that does nothing.
# None, 0, False and empty values do nothing either.
_NOT_FOLLOWED = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "typical_p", "guidance_scale", "top_h"), 1),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"), 0),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids"), None),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "sequence_bias"), None),
    **dict.fromkeys(("force_words_ids", "constraints", "dola_layers"), None),
    "exponential_decay_length_penalty": None,
}


class Defaults(NamedTuple):
    """What a model's own files say about generation.

    Attributes:
      sampling: how tokens are chosen.
      ends: ids of the tokens that end a text; the tokenizer may have more.
      stop_strings: texts that end an answer.
      not_followed: settings that would change answers and that lordjax does not have.
    """

    sampling: Sampling
    ends: tuple[int, ...]
    stop_strings: tuple[str, ...]
    not_followed: dict[str, Any]


def defaults_of(
    hf_config: Mapping[str, Any], generation_config: Mapping[str, Any], where: str = "model"
) -> Defaults:
    """Reads the generation defaults of a model.

    Args:
      hf_config: content of its ``config.json``.
      generation_config: content of its ``generation_config.json``; empty if it has none.
      where: name of the model in error messages.

    Returns:
      The defaults; greedy decoding where nothing is said.

    Raises:
      ValueError: if a value has a wrong type or is out of range; names its key.
    """
    where = f"{where}, generation_config.json"
    penalty = _number(generation_config, "repetition_penalty", 1.0, where)
    settings: dict[str, Any] = {"repetition_penalty": penalty}
    if generation_config.get("do_sample"):
        top_k = _number(generation_config, "top_k", _TOP_K, where)
        settings["temperature"] = _number(generation_config, "temperature", 1.0, where)
        settings["top_k"] = int(top_k) or None
        settings["top_p"] = _number(generation_config, "top_p", None, where)
    try:
        sampling = Sampling(**settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; correct the file or remove the key") from error
    strings = generation_config.get("stop_strings") or []
    strings = [strings] if isinstance(strings, str) else strings
    text = hf_config.get("text_config")
    configs = [generation_config, hf_config, text if isinstance(text, Mapping) else {}]
    own = next((c["eos_token_id"] for c in configs if c.get("eos_token_id") is not None), None)
    not_followed = {
        key: generation_config[key]
        for key, neutral in _NOT_FOLLOWED.items()
        if generation_config.get(key) and generation_config[key] != neutral
    }
    return Defaults(sampling, _ids(own, where), tuple(map(str, strings)), not_followed)


def stop_tokens(defaults: Defaults, tokenizer: Any, *, chat: bool = False) -> list[int]:
    """Returns the tokens that end an answer: those of the model, the tokenizer and the template.

    Args:
      defaults: what the model's files say.
      tokenizer: its tokenizer, with the interface of transformers.
      chat: whether the prompt is written by the chat template. Then the special token that the
        template writes after an answer ends it, too.
    """
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    turn = turn_ends(tokenizer) if chat else []
    return sorted({*defaults.ends, *own, *turn})


def _number(config: Mapping[str, Any], key: str, default: Any, where: str) -> Any:
    """Returns a finite number of a config; the default if the key is missing or null."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f'{where}: "{key}" is {value!r}; expected a number (correct the file or remove the key)'
        )
    return value


def _ids(value: Any, where: str) -> tuple[int, ...]:
    """Returns the ids of an ``eos_token_id``: null, a number or a list; negative ones are none."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in values):
        raise ValueError(
            f'{where} or config.json: "eos_token_id" is {value!r}; expected a token id or a list '
            "of token ids"
        )
    return tuple(number for number in values if number >= 0)
