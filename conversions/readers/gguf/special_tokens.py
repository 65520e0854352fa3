"""Special tokens of a GGUF file: their ids, and which tokens end a text or a turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # values of tokenizer.ggml.token_type
NO_ID = 2**32 - 1  # -1 as an unsigned number, which some files have for "none"
# Ids that a file of SentencePiece's kind need not say, as in llama.cpp.
_DEFAULTS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}
_ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message to a tool
# Tokens that end a text or a turn wherever they exist: files may name one of them only.
_END_NAMES = frozenset(
    """<|endoftext|> <|end_of_text|> <|eot_id|> <|eom_id|> <|im_end|> <|end|> <|eot|>
    <end_of_turn> <|end_of_turn|> <|END_OF_TURN_TOKEN|> <EOT>""".split()  # noqa: SIM905
)
# Metadata -> keys of generation_config.json.
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """Returns the id of a special token, or None if there is none.

    Args:
      metadata: metadata of the file.
      name: name in the file's keys: ``bos``, ``eos``, ``eot``, ``eom``, ``unknown``, ``padding``.

    Raises:
      ValueError: if the id is not one of the vocabulary.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    count = len(metadata.get("tokenizer.ggml.tokens") or ())
    value = metadata.get(key)
    if value is None:
        value = _DEFAULTS.get(metadata.get("tokenizer.ggml.model", ""), {}).get(name)
        return value if value is not None and value < count else None
    if value in (NO_ID, -1):
        return None
    if type(value) is not int or not (0 <= value < count or count == 0):
        raise ValueError(f"metadata {key} = {value!r}: expected an id below {count}")
    return value


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Returns the ids that end a text or a turn, the file's EOS first.

    Raises:
      ValueError: if an id is not one of the vocabulary.
    """
    ids = dict.fromkeys(token_id(metadata, name) for name in _ENDS)
    tokens = metadata.get("tokenizer.ggml.tokens") or ()
    types = metadata.get("tokenizer.ggml.token_type") or ()
    ids |= dict.fromkeys(
        i
        for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token in _END_NAMES
    )
    return [i for i in ids if i is not None]


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what ``generation_config.json`` would say: special tokens and sampling defaults.

    Raises:
      ValueError: if an id is not one of the vocabulary.
    """
    first, ends = token_id(metadata, "bos"), end_ids(metadata)
    config = {"bos_token_id": first, "eos_token_id": ends or None}
    sampling = {key: metadata.get(f"general.sampling.{own}") for own, key in _SAMPLING.items()}
    if any(value is not None for value in sampling.values()):
        config |= {"do_sample": True, **sampling}
    return {key: value for key, value in config.items() if value is not None}


def special_ids_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the special token ids of ``config.json``; several end tokens are a list.

    Raises:
      ValueError: if an id is not one of the vocabulary.
    """
    ends = end_ids(metadata)
    return {
        "bos_token_id": token_id(metadata, "bos"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": token_id(metadata, "padding"),
    }
