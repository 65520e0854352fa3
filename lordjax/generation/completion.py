"""Completion of texts: tokenizes prompts, generates, decodes answers, finds stop strings."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lordjax.generation.decode import NOTHING, generate, stream
from lordjax.generation.sampling import GREEDY, Sampling
from lordjax.models.config import ModelConfig
from lordjax.runtime.progress import Progress


class Completion(NamedTuple):
    """The completion of a prompt.

    Attributes:
      text: generated text up to the first stop string.
      tokens: number of generated tokens.
      reason: why generation ended; see `decode.Generated`.
    """

    text: str
    tokens: int
    reason: str


def complete(
    params: Any,
    config: ModelConfig,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_strings: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[Completion]:
    """Completes prompts, in batches of similar lengths.

    A completion ends before the first stop string, at a stop token, or after ``max_new_tokens``.
    Draws for a prompt depend on its place in the list, not on its batch.

    Args:
      params: parameters of the model; leaves may be kernels of any kind.
      config: architecture of a causal model.
      tokenizer: the model's tokenizer, with the interface of transformers.
      prompts: texts, or token ids.
      max_new_tokens: largest number of new tokens per prompt.
      sampling: how tokens are chosen.
      stop_strings: texts that end a completion; they are not part of it.
      stop_tokens: ids that end a completion; None: the EOS token. See `generation.defaults`.
      seed: seed of the random draws.
      batch_size: prompts that are completed at a time.
      progress: called after every batch with the number of finished prompts.

    Returns:
      One completion per prompt, in the order of the prompts.

    Raises:
      ValueError: as `decode.stream`.
    """
    ids = [tokenize(tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
    found: dict[int, Completion] = {}
    for rows, filled in _batches(ids, batch_size):
        texts = [_Text(tokenizer, ids[i], stop_strings) for i in rows]
        answers = generate(
            config,
            params,
            [ids[i] for i in filled],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=_stops(stop_tokens, tokenizer),
            seed=seed,
            rows=filled,
            ended=functools.partial(_ended, texts),
        )
        for i, text, answer in zip(rows, texts, answers, strict=False):
            found[i] = Completion(text.so_far(answer.tokens), len(answer.tokens), answer.reason)
        if progress is not None:
            progress("generate", len(found), len(ids))
    return [found[i] for i in range(len(ids))]


def _ended(texts: Sequence[_Text], i: int, tokens: list[int]) -> bool:
    """Returns whether a row ends: one with a stop string, or one that only fills the batch."""
    return i >= len(texts) or texts[i].ended(tokens)


def _batches(
    ids: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields numbers of prompts of similar lengths, and the same filled up to the batch size."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        # A smaller last batch is padded, because another shape needs another compilation.
        yield rows, [*rows, *[rows[-1]] * (batch_size - len(rows))] if first else rows


def pieces(
    params: Any,
    config: ModelConfig,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_strings: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    seed: int = 0,
    chunk: int = 4,
) -> Iterator[str]:
    """Completes one prompt and yields the text piece by piece, for a terminal.

    Args:
      params: parameters of the model; leaves may be kernels of any kind.
      config: architecture of a causal model.
      tokenizer: the model's tokenizer, with the interface of transformers.
      prompt: token ids.
      max_new_tokens: largest number of new tokens.
      sampling: how tokens are chosen.
      stop_strings: texts that end the completion; they are not part of it.
      stop_tokens: as for `complete`.
      seed: seed of the random draws.
      chunk: tokens between two pieces.

    Yields:
      Pieces of the completion. Text that may still change is held back.

    Raises:
      ValueError: as `decode.stream`.
    """
    text, tokens, shown = _Text(tokenizer, prompt, stop_strings), [], 0
    settings = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed}
    stops = _stops(stop_tokens, tokenizer)
    for out in stream(config, params, [prompt], **settings, stop_tokens=stops, chunk=chunk):
        tokens += [int(token) for token in out[0] if token != NOTHING]
        over = text.ended(tokens)
        so_far = text.so_far(tokens)
        # An incomplete character, and a possible start of a stop string, are held back.
        ready = so_far if over else so_far[: len(so_far) - text.uncertain(so_far)]
        yield ready[shown:]
        shown = max(shown, len(ready))
        if over:
            return
    yield text.so_far(tokens)[shown:]


class _Text:
    """Decodes the tokens of an answer and finds stop strings in them."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]):
        self._tokenizer, self._prompt, self._stops = tokenizer, list(prompt), tuple(stops)
        self._start = len(self._decoded([]))

    def _decoded(self, tokens: list[int]) -> str:
        # The prompt is decoded, too: some tokenizers drop the space of a text's first token.
        return self._tokenizer.decode(
            [*self._prompt, *tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _cut(self, text: str) -> str:
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        return text[: min(places, default=len(text))]

    def ended(self, tokens: list[int]) -> bool:
        """Returns whether the answer holds a stop string."""
        if not self._stops:
            return False
        text = self._decoded(tokens)[self._start :]
        return any(stop in text for stop in self._stops)

    def so_far(self, tokens: list[int]) -> str:
        """Returns the answer's text before the first stop string."""
        return self._cut(self._decoded(tokens)[self._start :])

    def uncertain(self, text: str) -> int:
        """Returns how many last characters may change, or may be the start of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return count
        return len(text) - len(text.rstrip("\ufffd"))


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a prompt; for an empty prompt the BOS token, or else the EOS token.

    Raises:
      ValueError: if the prompt is empty, and the tokenizer has neither token.
    """
    if ids := encode(tokenizer, text):
        return ids
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError(
            "empty prompt: the tokenizer has no BOS or EOS token to start with; give a prompt"
        )
    return [first]


def encode(tokenizer: Any, text: str, *, special: bool | None = None) -> list[int]:
    """Returns the token ids of a text.

    Args:
      tokenizer: a tokenizer of transformers.
      text: the text.
      special: whether special tokens are added. None: as the tokenizer does by default, but not to
        a text that already begins with the BOS token (EOS, if there is no BOS).
    """
    first = tokenizer.bos_token or tokenizer.eos_token
    if special is None and first and text.startswith(first):
        special = False
    how = {} if special is None else {"add_special_tokens": special}
    return list(tokenizer.encode(text, **how))


def _stops(given: Sequence[int] | None, tokenizer: Any) -> Sequence[int]:
    """Returns the given stop tokens, or else the tokenizer's EOS token, if it has one."""
    if given is not None:
        return given
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
