"""Chooses the next token from logits: the most likely one, or a random draw after filtering.

The steps run in the order of Hugging Face's ``generate``::

    penalty      positive logits of tokens that occurred are divided by it, negative ones multiplied
    temperature  logits / temperature
    top_k        keeps the k largest logits
    top_p        of those, keeps the largest whose probabilities add up to top_p, at least one
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the sampling of tokens; see the module's docstring.

    Attributes:
      temperature: divisor of the logits; 0: the most likely token is chosen, nothing is drawn.
      top_k: number of tokens to draw from; None: all.
      top_p: probability of the tokens to draw from, in (0, 1]; None: all.
      repetition_penalty: factor against tokens that have occurred; 1: no penalty.

    Raises:
      ValueError: if a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        expected = (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more, or None"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or None"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        )
        for name, right, what in expected:
            if not right:
                raise ValueError(f"{name} {getattr(self, name)}: expected {what}")

    @property
    def kind(self) -> Kind:
        """The part of the settings that a program is compiled for."""
        drawn = self.temperature > 0
        top_k = self.top_k if drawn else None
        nucleus = drawn and self.top_p is not None and self.top_p < 1
        return Kind(drawn, top_k, nucleus, self.repetition_penalty != 1)

    @property
    def values(self) -> Values:
        """The part of the settings that are arguments of the compiled program."""
        numbers = (self.temperature, self.top_p or 1.0, self.repetition_penalty)
        return Values(*(jnp.asarray(x, jnp.float32) for x in numbers))


GREEDY = Sampling()


class Kind(NamedTuple):
    """Which steps the sampling has."""

    drawn: bool
    top_k: int | None
    nucleus: bool
    penalised: bool


class Values(NamedTuple):
    """Numbers of the sampling's steps, float32."""

    temperature: Any
    top_p: Any
    penalty: Any


def pick(
    logits: Float[Array, "b v"],
    occurred: Bool[Array, "b v"] | None,
    keys: Any,
    kind: Kind,
    values: Values,
) -> Int[Array, "b"]:
    """Chooses the next token of every row.

    Args:
      logits: float32 logits.
      occurred: tokens that the penalty applies to; None: no penalty.
      keys: ``[b]`` random keys; not read if nothing is drawn.
      kind: steps of the sampling.
      values: numbers of the steps.

    Returns:
      Token ids.
    """
    if occurred is not None:
        lower = jnp.where(logits > 0, logits / values.penalty, logits * values.penalty)
        logits = jnp.where(occurred, lower, logits)
    if not kind.drawn:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filtered(logits / values.temperature, kind, values)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def filtered(logits: Float[Array, "b v"], kind: Kind, values: Values) -> Float[Array, "b v"]:
    """Returns the logits, with -∞ for tokens that ``top_k`` and ``top_p`` remove."""
    if kind.top_k is None and not kind.nucleus:
        return logits
    count = min(kind.top_k or logits.shape[-1], logits.shape[-1])
    best = jax.lax.top_k(logits, count)[0]  # in descending order
    least = best[:, -1:]
    if kind.nucleus:
        shares = jax.nn.softmax(best, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        # No probability comes before the largest token, so it always stays.
        least = jnp.min(jnp.where(before < values.top_p, best, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
