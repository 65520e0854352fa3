"""Converts the beginning of a text to token ids without tokenizing all of it."""

from __future__ import annotations

from typing import Protocol

# More characters than the average token of any usual text has. Only this many characters per
# wanted token are tokenized first.
_CHARS_PER_TOKEN = 16


class Tokenizer(Protocol):
    """The required interface of a tokenizer; every Hugging Face tokenizer has it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Returns the token ids of ``text``."""
        ...


def separator(tokenizer: Tokenizer) -> list[int]:
    """Returns what stands between documents: the end-of-text token, or else two line breaks."""
    end = getattr(tokenizer, "eos_token_id", None)
    return [end] if end is not None else list(tokenizer.encode("\n\n", add_special_tokens=False))


def first_ids(tokenizer: Tokenizer, text: str, wanted: int | None) -> list[int]:
    """Returns the first token ids of a text, without tokenizing much more.

    Args:
      tokenizer: converts text to token ids.
      text: the text.
      wanted: largest number of ids; None: all.
    """
    if wanted is not None:
        head = text[: _CHARS_PER_TOKEN * wanted + 1024]
        ids = tokenizer.encode(head, add_special_tokens=False)
        # Cutting the text may change the last ids, but not those well before the cut.
        if len(head) == len(text) or len(ids) >= wanted + 32:
            return list(ids[:wanted])
    return list(tokenizer.encode(text, add_special_tokens=False))[:wanted]
