"""Parts of a chat template: the text before a question, before its answer, and behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lordjax.runtime.chat_template import render

# Stand for a question and an answer in a rendered template; no tokenizer's text holds them.
_QUESTION, _ANSWER = "\ue0f1", "\ue0f2"


class Turns(NamedTuple):
    """The parts of a chat template around a question and an answer, as token ids.

    Attributes:
      opening: what stands before the question.
      change: what stands between question and answer.
      closing: what stands after the answer.
    """

    opening: tuple[int, ...]
    change: tuple[int, ...]
    closing: tuple[int, ...]


def turns_of(tokenizer: Any) -> Turns | None:
    """Returns the parts of a tokenizer's chat template.

    Args:
      tokenizer: a tokenizer of transformers.

    Returns:
      The parts; None if there is no template, or it does not show question and answer once.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    question = {"role": "user", "content": _QUESTION}
    answer = {"role": "assistant", "content": _ANSWER}
    asked = _parts(tokenizer, [question], _QUESTION, prompt=True)
    answered = _parts(tokenizer, [question, answer], _ANSWER, prompt=False)
    if asked is None or answered is None:
        return None
    opening, change = asked
    return Turns(
        *(
            tuple(tokenizer.encode(text, add_special_tokens=False))
            for text in (opening, change, answered[1])
        )
    )


def _parts(
    tokenizer: Any, messages: list[dict[str, str]], mark: str, *, prompt: bool
) -> tuple[str, str] | None:
    """Returns the rendered text before and behind a mark; None if it is not there once."""
    where = getattr(tokenizer, "name_or_path", "tokenizer")
    problem = "the chat template cannot be used"
    text = render(tokenizer, messages, where, problem, add_generation_prompt=prompt)
    before, *behind = text.split(mark)
    return (before, behind[0]) if len(behind) == 1 and before else None


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    """Returns the token ids of messages and of the start of an answer, by the chat template.

    Args:
      tokenizer: a tokenizer of transformers.
      messages: messages with role and content.
      name: name of the model in error messages.

    Raises:
      ValueError: if the tokenizer has no chat template, or it cannot be used.
    """
    check_template(tokenizer, name)
    problem = "the chat template cannot be used for these messages"
    text = render(tokenizer, messages, name, problem, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def check_template(tokenizer: Any, name: str) -> None:
    """Raises ValueError if the tokenizer of a model has no chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"{name}: the tokenizer has no chat template; leave --chat out")


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Returns the ids that are no text: special tokens, and tokens added to the vocabulary."""
    return frozenset((*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder))


def turn_ends(tokenizer: Any) -> list[int]:
    """Returns the special token that the chat template writes after an answer; else []."""
    turns = turns_of(tokenizer)
    closing = () if turns is None else turns.closing
    return [token for token in closing[:1] if token in special_ids(tokenizer)]
