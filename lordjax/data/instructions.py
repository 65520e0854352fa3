"""Instructions with answers, for a causal language model that is to learn the answers only.

A ``.jsonl`` file or a ``.json`` list of records of one of these kinds (`_RECORDS`)::

    {"instruction": "…", "input": "…", "output": "…"}                 Alpaca; input may be missing
    {"messages": [{"role": "user", "content": "…"}, …]}               chats
    {"conversations": [{"from": "human", "value": "…"}, …]}           ShareGPT

They are written out by the tokenizer's chat template, or without one under plain headings. The
targets are the tokens of every answer, with what ends it; a model reads the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lordjax.data import documents, token_windows
from lordjax.data.examples import VALIDATION, Data, Examples, hold_out, next_tokens, pad

Message = dict[str, str]  # role and content
Piece = tuple[str, bool]  # a part of a text, and whether it is to be learned

ANSWER = "assistant"
# Names of the three roles in the wild.
_ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys((ANSWER, "gpt", "bot", "chatgpt"), ANSWER),
}
_HEADINGS = {"system": "### System:", "user": "### Instruction:", ANSWER: "### Response:"}


def instructions(
    path: str | Path,
    tokenizer: Any,
    *,
    seq_len: int,
    vocab_size: int,
    share: float = VALIDATION,
    seed: int = 0,
) -> Data:
    """Reads instructions.

    Examples are filled up to the longest (see `examples.pad`). One whose first answer begins behind
    ``seq_len`` is left out; others are cut there. ``facts`` counts both: ``left_out``, ``cut``.

    Args:
      path: see the module's docstring.
      tokenizer: a tokenizer of transformers, with or without a chat template.
      seq_len: most tokens of an example.
      vocab_size: every id must be below it.
      share: of the first questions that are held out; 0: none.
      seed: of the split.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a record is none of these, the template refuses it, an id is not in the
        vocabulary, or no example is left; says where.
    """
    if seq_len < 2:
        raise ValueError(f"examples of {seq_len} tokens; expected 2 or more")
    chat = bool(getattr(tokenizer, "chat_template", None))
    write = _by_template if chat else _under_headings
    rows, wanted, texts = [], [], []
    left_out = cut = 0
    for where, record in _records(Path(path)):
        messages = _messages(record, where)
        for pieces in write(messages, tokenizer, where):
            ids, answers = _tokens(pieces, tokenizer, [] if chat else _beginning(tokenizer))
            if not any(answers[1:seq_len]):
                left_out += 1
                continue
            cut += len(ids) > seq_len
            rows.append(ids[:seq_len])
            wanted.append(answers[:seq_len])
            texts.append(_question(messages))
    if not rows:
        raise ValueError(
            f"{path}: no example of at most {seq_len} tokens, {left_out} left out whose answers "
            "begin behind them; give instructions, or a longer length (--seq-len)"
        )
    tokens, mask = pad(rows, seq_len)
    token_windows.check_ids(tokens, vocab_size, str(path))
    targets = next_tokens(tokens, pad(wanted, seq_len)[0].astype(bool))
    facts = {"source": str(path), "template": "chat" if chat else "headings"}
    facts |= {"left_out": left_out, "cut": cut, "targets": int((targets >= 0).sum())}
    return hold_out(Examples(tokens, targets, mask), texts, share, seed, facts)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Every record with the place where it stands, counted from 1."""
    documents.located(path)
    if path.suffix == ".jsonl":
        for number, line in documents.json_lines(path):
            where = f"{path}, line {number}"
            yield where, documents.parse_json(line, where)
        return
    records = documents.parse_json(documents.read_text(path), str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path}: {type(records).__name__}; expected a list, or a .jsonl file")
    for number, record in enumerate(records, 1):
        yield f"{path}, record {number}", record


def _messages(record: Any, where: str) -> list[Message]:
    """The messages of a record up to its last answer."""
    key = next((key for key in _RECORDS if isinstance(record, dict) and key in record), None)
    if key is None:
        known = " or ".join(f'"{key}"' for key in _RECORDS)
        raise ValueError(f"{where}: expected a record with {known}")
    messages = _RECORDS[key](record, where)
    roles = [message["role"] for message in messages]
    if ANSWER not in roles[1:]:
        raise ValueError(f"{where}: no answer; expected one ({ANSWER}) behind a question")
    return messages[: len(roles) - roles[::-1].index(ANSWER)]


def _alpaca(record: dict[str, Any], where: str) -> list[Message]:
    question, answer = (_text(record, key, where) for key in ("instruction", "output"))
    context = _text(record, "input", where) if record.get("input") else ""
    question = f"{question}\n\n{context}" if context else question
    return [{"role": "user", "content": question}, {"role": ANSWER, "content": answer}]


def _chat(key: str, role: str, content: str) -> Callable[[dict[str, Any], str], list[Message]]:
    """Reads the list under a key, whose messages have other names for their parts."""

    def read(record: dict[str, Any], where: str) -> list[Message]:
        if not isinstance(record[key], list):
            raise ValueError(f'{where}: "{key}" is no list')
        found = []
        for number, message in enumerate(record[key], 1):
            place = f"{where}, message {number}"
            if not isinstance(message, dict) or message.get(role) not in _ROLES:
                raise ValueError(f'{place}: expected "{role}", one of {", ".join(_ROLES)}')
            own = _ROLES[message[role]]
            found.append({"role": own, "content": _text(message, content, place)})
        return found

    return read


# The key by which a record is recognised, the first that it has -> its messages.
_RECORDS: dict[str, Callable[[dict[str, Any], str], list[Message]]] = {
    "messages": _chat("messages", "role", "content"),
    "conversations": _chat("conversations", "from", "value"),
    "instruction": _alpaca,
}


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(text := record.get(key), str):
        raise ValueError(f'{where}: "{key}" is {text!r}; expected text')
    return text


def _question(messages: list[Message]) -> str:
    """What comes before the first answer."""
    first = [message["role"] for message in messages].index(ANSWER, 1)
    return "\n\n".join(message["content"] for message in messages[:first])


def _by_template(messages: list[Message], tokenizer: Any, where: str) -> list[list[Piece]]:
    """The text of every example in pieces.

    A template may write a past answer in another way than the present one (without its reasoning,
    for instance). Then what a model reads before the next answer is not what it has answered, and
    that answer is an example of its own.
    """

    def render(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # whatever the template's code does
            raise ValueError(f"{where}: the chat template refuses this: {error}") from error

    found: list[list[Piece]] = []
    done = None
    for i, message in enumerate(messages):
        if message["role"] != ANSWER or not i:
            continue
        prompt, whole = render(i, True), render(i + 1, False)
        # What follows the end of a turn is not for the model to say.
        whole = whole.rstrip()
        # The prompt may hold what the template leaves out beside an answer.
        prompt = whole[: _common(prompt, whole)]
        if done is None or not prompt.startswith(done):
            found.append([])
            done = ""
        found[-1] += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
        done = whole
    return found


def _common(a: str, b: str) -> int:
    """How many letters two texts have in common at their beginning."""
    unlike = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(unlike, min(len(a), len(b)))


def _under_headings(messages: list[Message], tokenizer: Any, where: str) -> list[list[Piece]]:
    """The text of an example in pieces; every answer ends with the tokenizer's end of text."""
    del where
    pieces: list[Piece] = []
    end = getattr(tokenizer, "eos_token", None) or ""
    for i, message in enumerate(messages):
        gap = "\n\n" if i else ""
        heading, content = f"{gap}{_HEADINGS[message['role']]}\n", message["content"]
        if message["role"] == ANSWER and i:
            pieces += [(heading, False), (content + end, True)]
        else:
            pieces.append((heading + content, False))
    return [pieces]


def _beginning(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text; a chat template writes that itself."""
    first = tokenizer.encode("", add_special_tokens=True)[:1]
    return first if first == [getattr(tokenizer, "bos_token_id", None)] else []


def _tokens(
    pieces: list[Piece], tokenizer: Any, beginning: list[int]
) -> tuple[list[int], list[bool]]:
    """Ids of a text, and which of them are to be learned.

    A prompt has the ids that it has when it stands alone, as when the model is asked. The ids of
    prompt and answer together are taken where they begin with those; where the last letters of the
    prompt and the first of the answer would be one token, the answer is tokenised by itself.
    """
    ids: list[int] = []
    answers: list[bool] = []
    merged = [False] * len(beginning)
    text = ""
    for piece, wanted in _joined(pieces):
        text += piece
        whole = list(tokenizer.encode(text, add_special_tokens=False))
        if whole[: len(ids)] != ids:
            whole = ids + list(tokenizer.encode(piece, add_special_tokens=False))
        answers += [wanted] * (len(whole) - len(ids))
        ids = whole
    return beginning + ids, merged + answers


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece."""
    joined: list[Piece] = []
    for text, wanted in pieces:
        if joined and joined[-1][1] == wanted:
            text = joined.pop()[0] + text
        joined.append((text, wanted))
    return joined
