"""``lordjax generate``: continues a prompt, or answers in a conversation."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lordjax.scripts.console import say
from lordjax.scripts.opened_model import Model, open_model

if TYPE_CHECKING:
    from lordjax.generation.sampling import Sampling


def generate_model(
    model: str,
    prompt: str | None,
    *,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float | None,
    stop: tuple[str, ...],
    seed: int,
    chat: bool,
    interactive: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Generates text; arguments are the flags, and what is None is the model's own default.

    The text is printed while it is generated, unless ``quiet``.
    """
    from lordjax.runtime.progress import peak_rss

    if (prompt is None) != interactive:
        raise ValueError(
            "give a PROMPT ('-' reads it from standard input) or --interactive, not both"
        )
    if interactive and quiet:
        raise ValueError("--interactive prints text while it is generated; leave --json out")
    opened, names = open_model(model), ("temperature", "top_k", "top_p", "repetition_penalty")
    values = zip(names, (temperature, top_k, top_p, repetition_penalty), strict=True)
    given = {name: value for name, value in values if value is not None}
    sampling = _sampling(opened, given)
    writer = Writer(opened, sampling, max_new_tokens, stop, seed, chat=chat)
    if interactive:
        return talk(writer)
    text = _standard_input() if prompt == "-" else str(prompt)
    start, parts = time.perf_counter(), []
    for piece in writer.answer([{"role": "user", "content": text}]):
        parts.append(piece)
        if not quiet:
            print(piece, end="", flush=True)
    seconds = time.perf_counter() - start
    answer = "".join(parts)
    return {
        "prompt": text,
        "text": answer,
        "sampling": dataclasses.asdict(sampling),
        "seconds": seconds,
        "peak_rss": peak_rss(),
    }


def _standard_input() -> str:
    """Returns the text on standard input; raises ValueError if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"PROMPT - : standard input is not UTF-8 (byte {error.start}); write it in UTF-8"
        ) from error


def _sampling(opened: Model, given: dict[str, Any]) -> Sampling:
    """Returns the model's own sampling, with the values that were given in place of its own."""
    defaults = opened.generation_defaults()
    for name, value in defaults.not_followed.items():
        say(f"note: generation_config.json sets {name} to {value!r}, which is not followed")
    sampling = dataclasses.replace(defaults.sampling, **given)
    if sampling.temperature and not given:
        say(f"sampling as in generation_config.json: {sampling}; --temperature 0 is greedy")
    return sampling


def talk(writer: Writer) -> dict[str, Any]:
    """Answers lines from stdin until they end; every answer sees the conversation so far."""
    messages: list[dict[str, str]] = []
    say("write one line per turn; an empty line or the end of the input ends the conversation")
    while line := _line():
        messages.append({"role": "user", "content": line})
        answer = ""
        for piece in writer.answer(messages):
            print(piece, end="", flush=True)
            answer += piece
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})
    return {"turns": messages}


def _line() -> str:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


class Writer:
    """A model that answers messages, with its tokenizer and sampling.

    With ``chat`` the tokenizer's chat template formats the messages; else they are concatenated.
    """

    def __init__(
        self,
        opened: Model,
        sampling: Sampling,
        max_new_tokens: int,
        stop: tuple[str, ...],
        seed: int,
        *,
        chat: bool,
    ):
        from lordjax.generation.chat_turns import check_template

        self._opened, self._tokenizer = opened, opened.tokenizer()
        if chat:
            check_template(self._tokenizer, opened.name)
        self._chat = chat
        self._params = opened.arrays()
        self._how = {
            "sampling": sampling,
            "max_new_tokens": max_new_tokens,
            "stop_strings": (*stop, *opened.generation_defaults().stop_strings),
            "stop_tokens": opened.stop_tokens(self._tokenizer, chat=chat),
            "seed": seed,
        }

    def answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """Yields the answer to the last message, piece by piece."""
        from lordjax.generation.chat_turns import chat_ids
        from lordjax.generation.completion import pieces, tokenize

        if self._chat:
            ids = chat_ids(self._tokenizer, messages, self._opened.name)
        else:
            ids = tokenize(self._tokenizer, "".join(m["content"] for m in messages))
        config = self._opened.config
        yield from pieces(self._params, config, self._tokenizer, ids, **self._how)


def show(result: dict[str, Any]) -> None:
    """Ends the line of the text, which was printed while it was generated."""
    if "text" in result:
        print(flush=True)
