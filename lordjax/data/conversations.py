"""Reads conversations from the formats that instruction data has.

The data is a file of records (``.jsonl``, ``.jsonl.gz``, ``.parquet``) or a ``.json`` list of them.
A record has one of these kinds (`_KINDS`)::

    {"messages": [{"role": "user", "content": "…"}, …]}               chats
    {"conversations": [{"from": "human", "value": "…"}, …]}           ShareGPT
    {"instruction": "…", "input": "…", "output": "…"}                 Alpaca; input may be missing
    {"prompt": "…", "completion": "…"}                                or "response"
    {"question": "…", "answer": "…"}                                  or "response"

Prompt and completion may be lists of messages. The content of a message is a text, or a list of
parts like ``{"type": "text", "text": "…"}``. Calls of tools (``tool_calls``, and ``tools`` of a
record) are left to the chat template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lordjax.data import documents, record_files
from lordjax.runtime.input_files import parse_json

Message = dict[str, Any]  # role and content; with calls of tools also other keys

ANSWER = "assistant"
# Names that data sets use for the roles. A developer's message is what a system's was before.
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys((ANSWER, "gpt", "bot", "chatgpt", "model", "function_call"), ANSWER),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response"), "tool"),
}
_CALLS = ("tool_calls", "tool_call_id", "name")  # keys of messages that a template may read


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation up to its last answer.

    Attributes:
      where: its file and line, for error messages.
      messages: the messages, with the roles system, user, assistant and tool.
      tools: descriptions of the tools that it may call.
    """

    where: str
    messages: list[Message]
    tools: list[Any]


def conversations(path: Path) -> Iterator[Conversation]:
    """Yields the conversations of a file; the module's docstring describes its format.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a record has another format; says where.
      ImportError: if the file is parquet and pyarrow is not installed.
    """
    documents.located(path)
    if record_files.suffix_of(path) in record_files.RECORDS:
        found = record_files.read_records(path)
    else:
        listed = parse_json(record_files.read_text(path), str(path))
        if not isinstance(listed, list):
            raise ValueError(f"{path}: {type(listed).__name__}; expected a list, or a .jsonl file")
        found = [(f"{path}, record {number}", record) for number, record in enumerate(listed, 1)]
    for where, record in found:
        messages = _messages(record, where)
        yield Conversation(where, messages, _tools(record, where))


def _messages(record: Any, where: str) -> list[Message]:
    """Returns the messages of a record up to its last answer."""
    keys = [key for key in _KINDS if isinstance(record, dict) and record.get(key) is not None]
    if not keys:
        known = " or ".join(f'"{key}"' for key in _KINDS)
        raise ValueError(f"{where}: expected a JSON object with {known}")
    messages = _KINDS[keys[0]](record, where)
    roles = [message["role"] for message in messages]
    if ANSWER not in roles[1:]:
        raise ValueError(f"{where}: no answer; expected one (role {ANSWER}) after a question")
    return messages[: len(roles) - roles[::-1].index(ANSWER)]


def _tools(record: Mapping[str, Any], where: str) -> list[Any]:
    """Returns the descriptions of tools of a record: a list, or a text that holds it as JSON."""
    tools = record.get("tools") or []
    if isinstance(tools, str):
        tools = parse_json(tools, f'{where}, "tools"')
    if not isinstance(tools, list):
        raise ValueError(f'{where}: "tools" is a {type(tools).__name__}; expected a list')
    return tools


def _alpaca(record: dict[str, Any], where: str) -> list[Message]:
    question, answer = (_text(record, key, where) for key in ("instruction", "output"))
    context = _text(record, "input", where) if record.get("input") else ""
    question = f"{question}\n\n{context}" if context else question
    system = _text(record, "system", where) if record.get("system") else ""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *_turn(question, answer)]


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": ANSWER, "content": answer}]


def _pair(question: str, *answers: str) -> Callable[[dict[str, Any], str], list[Message]]:
    """Returns a reader of a question and its answer, each a text or a list of messages.

    Args:
      question: the record's key of the question.
      *answers: possible keys of the answer.
    """

    def read(record: dict[str, Any], where: str) -> list[Message]:
        answer = next((key for key in answers if record.get(key) is not None), answers[0])
        if not isinstance(record[question], list):
            return _turn(*(_text(record, key, where) for key in (question, answer)))
        return [*_listed(record, question, where), *_listed(record, answer, where)]

    return read


def _chat(key: str) -> Callable[[dict[str, Any], str], list[Message]]:
    """Returns a reader of the list of messages under a key of a record."""
    return lambda record, where: _listed(record, key, where)


def _listed(record: dict[str, Any], key: str, where: str) -> list[Message]:
    """Returns the messages of a list in a record."""
    if not isinstance(record.get(key), list):
        raise ValueError(f'{where}: "{key}" is no list; expected a list of messages')
    return [
        _message(message, f"{where}, message {number}")
        for number, message in enumerate(record[key], 1)
    ]


def _message(message: Any, where: str) -> Message:
    """Returns a message with the names of its role and its content as chat templates know them."""
    known = message if isinstance(message, dict) else {}
    role, content = ("from", "value") if "from" in known and "role" not in known else _KEYS
    if not isinstance(known.get(role), str) or known[role] not in _ROLES:
        raise ValueError(f'{where}: expected "{role}", one of {", ".join(_ROLES)}')
    calls = {key: known[key] for key in _CALLS if known.get(key)}
    if "tool_calls" in calls and known.get(content) is None:
        known = {**known, content: ""}
    return {"role": _ROLES[known[role]], "content": _text(known, content, where), **calls}


_KEYS = ("role", "content")
# Readers of records by key; the first key that a record has chooses its reader.
_KINDS: dict[str, Callable[[dict[str, Any], str], list[Message]]] = {
    "messages": _chat("messages"),
    "conversations": _chat("conversations"),
    "instruction": _alpaca,
    "prompt": _pair("prompt", "completion", "response"),
    "question": _pair("question", "answer", "response"),
}


def _text(record: dict[str, Any], key: str, where: str) -> str:
    """Returns a text, or the joined texts of a list of parts."""
    value = record.get(key)
    if isinstance(value, list) and value:
        return "".join(_part(part, f'{where}: "{key}"') for part in value)
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{key}" is {value!r}; expected text')
    return value


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise ValueError(
            f"{where} has a part of type {kind!r}; expected texts, as the model reads nothing else"
        )
    return text
