"""Windows of token ids that a model writes itself: samples at temperature 1, without filters.

Calibration on a model's own samples needs no data, and its domain is the model's own (arXiv
2410.17170). A document starts with the BOS token if the tokenizer adds one, else with a random
token. After an end token the row goes on with a new document at position 0, which sees nothing of
the one before. So every step adds a token to every window, and no row waits for another one.

Of a chat model, every second window holds conversations in the manner of Magpie (arXiv
2406.08464): after the template's opening of a user turn the model writes the question, and after
the template's change to the assistant it writes the answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from lordjax.generation.chat_turns import Turns, special_ids, turns_of
from lordjax.generation.decode import NOTHING, RunSettings, State, decode, prefill, widened
from lordjax.generation.long_rows import renewed
from lordjax.generation.prompt_batch import SMALLEST_CACHE, pad_prompts
from lordjax.generation.sampling import Sampling
from lordjax.models.config import ModelConfig
from lordjax.models.rope import trained_length

VERSION = 1  # another number where the same arguments no longer give the same ids
_SAMPLING = Sampling(temperature=1.0)
# Ends documents of pretraining, also where a chat model's own end token is another one.
_END_OF_TEXT = "<|endoftext|>"


class Writing(NamedTuple):
    """How documents start and end.

    Attributes:
      first: ``[k]`` token ids, of which one is drawn to start a document.
      ends: token ids that end a document, a question or an answer.
      special: token ids that are no text; the first of `Turns.change` or `Turns.closing` ends a
        turn if it is one of these.
      turns: the chat template; None: there is none.
    """

    first: np.ndarray
    ends: frozenset[int]
    special: frozenset[int] = frozenset()
    turns: Turns | None = None


def writing_of(tokenizer: Any, vocab_size: int, ends: Collection[int] = ()) -> Writing:
    """Returns how documents of a tokenizer's model start and end.

    Args:
      tokenizer: a tokenizer of transformers, with or without a chat template.
      vocab_size: size of the model's vocabulary.
      ends: end tokens besides the tokenizer's own, such as those of the model's config.
    """
    special = special_ids(tokenizer)
    own = {tokenizer.eos_token_id, tokenizer.get_vocab().get(_END_OF_TEXT)} - {None}
    begun = list(tokenizer.encode("", add_special_tokens=True))[:1]
    if begun and begun[0] == tokenizer.bos_token_id:
        first = np.array(begun)
    else:
        first = np.setdiff1d(np.arange(min(vocab_size, len(tokenizer))), sorted(special))
    return Writing(first, frozenset(own | set(ends)), special, turns_of(tokenizer))


class _Row:
    """A window that is being written.

    `forced` holds the next tokens that the model does not choose, each with whether it is the first
    of a document.
    """

    def __init__(self, how: Writing, number: int, seed: int):
        self._how = how
        self._draw = np.random.default_rng([seed, number])
        self._turns = how.turns if number % 2 else None
        self._asked = False  # whether a question, and not an answer or a document, is written
        self.forced: deque[tuple[int, bool]] = deque()
        self.ids: list[int] = []
        self.position = -1  # of the last token in its document
        self._start()

    def _start(self) -> None:
        """Appends the start of a new document or conversation."""
        start = self._turns.opening if self._turns else (int(self._draw.choice(self._how.first)),)
        self._asked = self._turns is not None
        self.forced.extend((token, not i) for i, token in enumerate(start))

    def _ends(self, token: int, following: tuple[int, ...]) -> bool:
        """Whether a chosen token ends a text that the template follows with some tokens."""
        turn = following[:1] if following and following[0] in self._how.special else ()
        return token in self._how.ends or token in turn

    def take(self, chosen: int) -> tuple[int, bool]:
        """Appends the next token; returns it, and whether it is the first of a document.

        Args:
          chosen: the token that the model has chosen, which counts if none is forced.
        """
        token, fresh = self.forced.popleft() if self.forced else self._next(chosen)
        self.ids.append(token)
        self.position = 0 if fresh else self.position + 1
        return token, fresh

    def _next(self, chosen: int) -> tuple[int, bool]:
        turns = self._turns
        following = () if turns is None else turns.change if self._asked else turns.closing
        if not self._ends(chosen, following):
            return chosen, False
        asked, self._asked = self._asked, False
        # The template's own end of the turn replaces the chosen one.
        self.forced.extend((token, False) for token in following or (chosen,))
        if not asked:
            self._start()
        return self.forced.popleft()


def write_windows(
    config: ModelConfig,
    params: Any,
    how: Writing,
    numbers: Sequence[int],
    *,
    length: int,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Int[np.ndarray, "b length"]:
    """Lets a model write windows.

    A window depends on the model, the seed, its number and its length, and on the other windows
    only by rounding errors where their count changes the computation. Windows of odd numbers hold
    conversations if there is a chat template.

    Args:
      config: architecture of a causal model.
      params: parameters of the model; leaves may be kernels of any kind.
      how: how documents start and end.
      numbers: numbers of the windows, which are written at the same time.
      length: tokens of a window.
      seed: seed of the random draws.
      progress: called after every token with the number of tokens of each window so far.

    Returns:
      Token ids, int32.

    Raises:
      ValueError: if the model cannot generate, or ``length`` is longer than its longest sequence.
    """
    rows = [_Row(how, number, seed) for number in numbers]
    firsts = [[row.take(NOTHING)[0]] for row in rows]
    tokens, lengths, capacity = pad_prompts(config, firsts, max(length - 1, 1))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.asarray(numbers, jnp.int32)
    )
    stops = jnp.full(4, NOTHING, jnp.int32)  # rows do not end: they go on with a new document
    settings = RunSettings(_SAMPLING.values, stops, keys, jnp.asarray(2**31 - 1, jnp.int32))
    params = jax.tree.map(jnp.asarray, params)
    same: dict[str, Any] = {"config": config, "kind": _SAMPLING.kind}
    state = prefill(params, tokens, lengths, settings, **same)
    sizes = iter(_capacities(capacity))
    columns, trained = 0, trained_length((config.rope, config.local_rope), config.max_positions)
    for count in range(1, length):
        if count > 1:
            state, _ = decode(params, state, settings, jnp.asarray(1, jnp.int32), **same)
        state = _continued(rows, state)
        if max(row.position for row in rows) >= columns:
            columns = next(sizes)
            state = state._replace(cache=widened(state.cache, capacity=columns))
        if any(crossed := [row.position == trained for row in rows]):
            documents = [row.ids[-row.position - 1 :] for row in rows]
            state = state._replace(cache=renewed(config, params, state.cache, documents, crossed))
        if progress is not None:
            progress(count + 1)
    return np.array([row.ids for row in rows], np.int32)


def _capacities(most: int) -> list[int]:
    """Returns sizes of the cache, which grows with the longest document.

    A step costs as much as the cache has columns, but every size is compiled.
    """
    sizes = [SMALLEST_CACHE]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return [min(size, most) for size in sizes]


def _continued(rows: Sequence[_Row], state: State) -> State:
    """Appends a token to every row, and puts forced tokens in place of the chosen ones."""
    chosen = np.asarray(state.token).tolist()
    taken = [row.take(token) for row, token in zip(rows, chosen, strict=True)]
    ids, fresh = zip(*taken, strict=True)
    if list(ids) == chosen and not any(fresh):
        return state
    # Columns of the cache behind a row's position are not seen, so position 0 is a fresh start.
    position = jnp.where(jnp.asarray(fresh), 0, state.position)
    return state._replace(token=jnp.asarray(ids, jnp.int32), position=position)
