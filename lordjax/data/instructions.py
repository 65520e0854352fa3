"""Instruction data for a causal language model: chats and questions, where answers are learned.

`conversations` describes the formats of the data. The tokenizer's chat template formats the
messages; without a template they get plain headings. The targets are the tokens of the answers,
including the token that ends an answer. All other tokens are input only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lordjax.data import token_windows
from lordjax.data.conversations import ANSWER, Conversation, Message, conversations
from lordjax.data.examples import VALIDATION, Data, Examples, hold_out, next_tokens, pad
from lordjax.runtime import chat_template

Piece = tuple[str, bool]  # a piece of text, and whether its tokens are targets

_HEADINGS = {
    "system": "### System:",
    "user": "### Instruction:",
    "tool": "### Tool:",
    ANSWER: "### Response:",
}


def instructions(
    path: str | Path,
    tokenizer: Any,
    *,
    seq_len: int,
    vocab_size: int,
    share: float = VALIDATION,
    seed: int = 0,
) -> Data:
    """Reads instruction examples.

    Examples are padded to the longest (see `examples.pad`). An example whose first answer begins
    after ``seq_len`` tokens is left out; a longer one is truncated.

    Args:
      path: the file; `conversations` describes its format.
      tokenizer: a tokenizer of transformers, with or without a chat template.
      seq_len: largest number of tokens of an example.
      vocab_size: size of the vocabulary; every token id must be below it.
      share: fraction of the first questions that is held out for validation; 0 holds out none.
      seed: seed of the split.

    Returns:
      Training and validation examples; ``facts`` counts the examples that were ``left_out`` or
      ``cut``.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a record has another format, the chat template refuses it, a token id is not in
        the vocabulary, or no example is left; says where.
    """
    if seq_len < 2:
        raise ValueError(f"examples of {seq_len} tokens; expected 2 or more (--seq-len)")
    chat = bool(getattr(tokenizer, "chat_template", None))
    write = _by_template if chat else _under_headings
    rows, wanted, texts = [], [], []
    left_out = cut = 0
    for conversation in conversations(Path(path)):
        for pieces in write(conversation, tokenizer):
            ids, answers = _tokens(pieces, tokenizer, [] if chat else _beginning(tokenizer))
            if not any(answers[1:seq_len]):
                left_out += 1
                continue
            cut += len(ids) > seq_len
            rows.append(ids[:seq_len])
            wanted.append(answers[:seq_len])
            texts.append(_question(conversation.messages))
    if not rows:
        raise ValueError(
            f"{path}: no example of at most {seq_len} tokens, {left_out} left out because their "
            "answers begin later; give other data, or a longer length (--seq-len)"
        )
    tokens, mask = pad(rows, seq_len)
    token_windows.check_ids(tokens, vocab_size, str(path))
    targets = next_tokens(tokens, pad(wanted, seq_len)[0].astype(bool))
    facts = {"source": str(path), "template": "chat" if chat else "headings"}
    facts |= {"left_out": left_out, "cut": cut, "targets": int((targets >= 0).sum())}
    return hold_out(Examples(tokens, targets, mask), texts, share, seed, facts)


def _question(messages: list[Message]) -> str:
    """Returns the text before the first answer."""
    first = [message["role"] for message in messages].index(ANSWER, 1)
    return "\n\n".join(message["content"] for message in messages[:first])


def _by_template(conversation: Conversation, tokenizer: Any) -> list[list[Piece]]:
    """Formats messages by the tokenizer's chat template; returns the pieces of every example.

    A template may format an earlier answer differently from the last one, for instance without its
    reasoning. Then the text before the next answer does not begin with the text so far, and the
    next answer starts a new example.
    """
    messages, tools = conversation.messages, conversation.tools
    how = {"tools": tools} if tools else {}

    def render(count: int, prompt: bool) -> str:
        where, problem = conversation.where, "the chat template refuses this"
        return chat_template.render(
            tokenizer, messages[:count], where, problem, add_generation_prompt=prompt, **how
        )

    found: list[list[Piece]] = []
    done = None
    for i, message in enumerate(messages):
        if message["role"] != ANSWER or not i:
            continue
        prompt, whole = render(i, True), render(i + 1, False)
        # White space after the end of a turn is no target.
        whole = whole.rstrip()
        # The prompt may end with text that the template omits before an answer.
        prompt = whole[: _common(prompt, whole)]
        if done is None or not prompt.startswith(done):
            found.append([])
            done = ""
        found[-1] += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
        done = whole
    return found


def _common(a: str, b: str) -> int:
    """Returns the length of the common prefix of two texts."""
    unlike = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(unlike, min(len(a), len(b)))


def _under_headings(conversation: Conversation, tokenizer: Any) -> list[list[Piece]]:
    """Formats messages under plain headings; every answer ends with the end-of-text token."""
    pieces: list[Piece] = []
    end = getattr(tokenizer, "eos_token", None) or ""
    messages = conversation.messages
    if conversation.tools or any("tool_calls" in message for message in messages):
        raise ValueError(
            f"{conversation.where}: calls of tools, but the tokenizer has no chat template that "
            "says how they are written; use a chat model, or leave the record out"
        )
    for i, message in enumerate(messages):
        gap = "\n\n" if i else ""
        heading, content = f"{gap}{_HEADINGS[message['role']]}\n", message["content"]
        if message["role"] == ANSWER and i:
            pieces += [(heading, False), (content + end, True)]
        else:
            pieces.append((heading + content, False))
    return [pieces]


def _beginning(tokenizer: Any) -> list[int]:
    """Returns the tokenizer's BOS token if it adds one; a chat template writes its own."""
    first = tokenizer.encode("", add_special_tokens=True)[:1]
    return first if first == [getattr(tokenizer, "bos_token_id", None)] else []


def _tokens(
    pieces: list[Piece], tokenizer: Any, beginning: list[int]
) -> tuple[list[int], list[bool]]:
    """Returns the token ids of a text, and whether each one is a target.

    A prompt keeps the ids that it has alone, as in generation. If the ids of prompt and answer
    together begin with these ids, they are used. Otherwise a token would span the end of the prompt
    and the start of the answer, and the answer is tokenized separately.
    """
    ids: list[int] = []
    answers: list[bool] = []
    bos = [False] * len(beginning)
    text = ""
    for piece, wanted in _merge_neighbors(pieces):
        text += piece
        whole = list(tokenizer.encode(text, add_special_tokens=False))
        if whole[: len(ids)] != ids:
            whole = ids + list(tokenizer.encode(piece, add_special_tokens=False))
        answers += [wanted] * (len(whole) - len(ids))
        ids = whole
    return beginning + ids, bos + answers


def _merge_neighbors(pieces: list[Piece]) -> list[Piece]:
    """Merges neighbouring pieces that are both targets or both not."""
    merged: list[Piece] = []
    for text, wanted in pieces:
        if merged and merged[-1][1] == wanted:
            text = merged.pop()[0] + text
        merged.append((text, wanted))
    return merged
