"""How the next token is chosen from logits: greedily, or drawn from what filters leave.

In this order, which is that of Hugging Face's generate::

    penalty      a logit of a token that occurred is divided by it where positive, else multiplied
    temperature  logits / temperature
    top_k        only the k largest
    top_p        of those, only the largest whose probabilities add up to top_p, one at least
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the module's docstring.

    Attributes:
      temperature: 0 is greedy: the likeliest token after the penalty, nothing is drawn.
      top_k: None: all.
      top_p: in (0, 1]; None: all.
      repetition_penalty: 1 is none.

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
        """What a program is compiled for."""
        drawn = self.temperature > 0
        top_k = self.top_k if drawn else None
        nucleus = drawn and self.top_p is not None and self.top_p < 1
        return Kind(drawn, top_k, nucleus, self.repetition_penalty != 1)

    @property
    def values(self) -> Values:
        """What it is told when it runs."""
        numbers = (self.temperature, self.top_p or 1.0, self.repetition_penalty)
        return Values(*(jnp.asarray(x, jnp.float32) for x in numbers))


GREEDY = Sampling()


class Kind(NamedTuple):
    """Which steps there are."""

    drawn: bool
    top_k: int | None
    nucleus: bool
    penalised: bool


class Values(NamedTuple):
    """Numbers of the steps, float32."""

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
    """The next token of every row.

    Args:
      logits: float32.
      occurred: tokens that the penalty is for; None without a penalty.
      keys: ``[b]`` random keys; not read when nothing is drawn.
      kind: the steps.
      values: their numbers.
    """
    if occurred is not None:
        lower = jnp.where(logits > 0, logits / values.penalty, logits * values.penalty)
        logits = jnp.where(occurred, lower, logits)
    if not kind.drawn:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filtered(logits / values.temperature, kind, values)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def filtered(logits: Float[Array, "b v"], kind: Kind, values: Values) -> Float[Array, "b v"]:
    """Logits, -∞ where ``top_k`` and ``top_p`` leave nothing."""
    if kind.top_k is None and not kind.nucleus:
        return logits
    count = min(kind.top_k or logits.shape[-1], logits.shape[-1])
    best = jax.lax.top_k(logits, count)[0]  # falling
    least = best[:, -1:]
    if kind.nucleus:
        shares = jax.nn.softmax(best, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        # The largest has nothing before it, so it stays.
        least = jnp.min(jnp.where(before < values.top_p, best, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
