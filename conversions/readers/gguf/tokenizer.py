"""Rebuilds the tokenizer of a GGUF file with the package tokenizers."""

from __future__ import annotations

from typing import Any

from lordjax.conversions.readers.gguf.bpe import byte_level, sentence_piece
from lordjax.conversions.readers.gguf.special_tokens import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    token_id,
)
from lordjax.conversions.readers.gguf.vocabulary import Vocabulary

# Value of tokenizer.ggml.model -> function that builds the tokenizer.
_KINDS = {"gpt2": byte_level, "llama": sentence_piece}
_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_PHI3 = ("phi-3", "phi3")  # parts of the name of a model with Phi-3's tokenizer
# Tokens of Phi-3 that leave the spaces behind them to the text; its other added tokens take them.
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


def rebuild(vocabulary: Vocabulary, max_length: int) -> tuple[Any, dict[str, Any]]:
    """Rebuilds the tokenizer of a GGUF file.

    Args:
      vocabulary: the tokens of the file.
      max_length: longest sequence of the model, in tokens.

    Returns:
      The tokenizer, and the content of its ``tokenizer_config.json``.

    Raises:
      ValueError: if the kind or the pre-tokenizer is not supported, or the vocabulary is damaged.
    """
    if vocabulary.kind not in _KINDS:
        raise ValueError(
            f"{vocabulary.file}: tokenizer of kind {vocabulary.kind!r}; supported: "
            f"{', '.join(_KINDS)}; open the model's Hugging Face directory instead"
        )
    tokenizer, bos_default = _KINDS[vocabulary.kind](vocabulary)
    _add_tokens(tokenizer, vocabulary)
    tokens, metadata = vocabulary.tokens, vocabulary.metadata
    try:
        ids = {name: token_id(metadata, name) for name in _NAMES}
    except ValueError as error:
        raise ValueError(f"{vocabulary.file}: {error}") from error
    found = {name: i for name, i in ids.items() if i is not None}
    ends = {
        name: found[name]
        for name, default in (("bos", bos_default), ("eos", False))
        if metadata.get(f"tokenizer.ggml.add_{name}_token", default) and name in found
    }
    _add_ends(tokenizer, tokens, ends)
    config: dict[str, Any] = {_NAMES[name]: tokens[i] for name, i in found.items()}
    config["model_max_length"] = max_length
    config["clean_up_tokenization_spaces"] = False
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return tokenizer, config


def _add_tokens(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Registers the tokens that are cut out of a text before it is tokenised."""
    from tokenizers import AddedToken

    phi3 = any(name in str(vocabulary.metadata.get("general.name")).lower() for name in _PHI3)
    special, plain = [], []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        takes_spaces = phi3 and vocabulary.kind == "llama" and token not in _PHI3_PLAIN
        if kind in (UNKNOWN, CONTROL):
            special.append(AddedToken(token, normalized=False, special=True, rstrip=takes_spaces))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, rstrip=takes_spaces))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_ends(tokenizer: Any, tokens: list[str], ends: dict[str, int]) -> None:
    """Makes BOS and EOS part of an encoded text, if there are any."""
    from tokenizers import processors

    if not ends:
        return
    names = {name: tokens[i] for name, i in ends.items()}
    template = [names.get("bos"), "$A", names.get("eos")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[part for part in template if part],
        special_tokens=[(tokens[i], i) for i in sorted(set(ends.values()))],
    )
