"""Statistics: accumulators that are updated batch by batch.

`observers` updates them with the activations and gradients of a block. Each has ``zeros`` (a
statistic of no vectors) and ``update`` (adds the vectors of a batch, with optional token weights).

`Moments` holds count, mean and *centered* scatter. Two of them are merged by the rule of Chan,
Golub and LeVeque (1983), so that a large mean does not destroy the precision of the covariance in
float32::

    δ = m_b - m_a        m = m_a + δ·n_b/n        S = S_a + S_b + δδᵀ·n_a·n_b/n
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lordjax.methods import linalg


def _rows(x: Array, weights: Array | None, dtype: Any) -> tuple[Array, Array | None]:
    """Reshapes vectors to rows ``[t, d]`` and weights to ``[t]``; rows of weight 0 become 0."""
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    if weights is None:
        return rows, None
    w = weights.reshape(-1).astype(dtype)
    # Masked rows may hold NaN, and 0 · NaN is NaN.
    return jnp.where(w[:, None] > 0, rows, 0), w


def _per_token(total: Array, count: Array) -> Array:
    """Returns ``total / count``; ``total`` if no token has a weight, as without any gradient."""
    return total / jnp.where(count > 0, count, 1)


@flax.struct.dataclass
class Moments:
    """Count, mean and centered scatter of vectors of width d.

    Attributes:
      count: ``[]``, sum of token weights.
      mean: ``[d]``.
      scatter: ``[d, d]``, Σ w (x - mean)(x - mean)ᵀ.
    """

    count: Any
    mean: Any
    scatter: Any

    @classmethod
    def zeros(cls, width: int, dtype: Any = jnp.float32) -> Moments:
        """Returns the moments of no vectors."""
        return cls(jnp.zeros((), dtype), jnp.zeros(width, dtype), jnp.zeros((width, width), dtype))

    def merge(self, other: Moments) -> Moments:
        """Returns the moments of both sets of vectors together."""
        count = self.count + other.count
        share = jnp.where(count > 0, other.count / jnp.where(count > 0, count, 1), 0)
        shift = other.mean - self.mean
        return Moments(
            count,
            self.mean + shift * share,
            self.scatter + other.scatter + jnp.outer(shift, shift) * (self.count * share),
        )

    def update(self, x: Float[Array, "... d"], weights: Float[Array, ...] | None = None) -> Moments:
        """Adds the vectors of ``x``; ``weights``, 0 at padding, has one number per vector."""
        rows, w = _rows(x, weights, self.mean.dtype)
        if w is None:
            count = jnp.asarray(rows.shape[0], rows.dtype)
            mean = jnp.mean(rows, axis=0)
        else:
            count = jnp.sum(w)
            mean = jnp.sum(w[:, None] * rows, axis=0) / jnp.where(count > 0, count, 1)
        scatter = linalg.gram(rows - mean[None], w)
        return self.merge(Moments(count, mean, scatter))

    def covariance(self) -> Float[Array, "d d"]:
        """Returns the centered second moment per token, symmetrized."""
        return (self.scatter + self.scatter.T) / (2 * self.count)

    def take(self, order: Int[Array, "k"]) -> Moments:
        """Returns the moments of the features ``order``, in that order."""
        return Moments(self.count, self.mean[order], self.scatter[order][:, order])

    def second_moment(self) -> Float[Array, "d d"]:
        """Returns the uncentered second moment per token, symmetrized."""
        return self.covariance() + jnp.outer(self.mean, self.mean)


@flax.struct.dataclass
class SecondMoment:
    """Uncentered second moment of vectors of width d, where the mean is not needed.

    Attributes:
      count: ``[]``, sum of token weights.
      total: ``[d, d]``, Σ w x xᵀ.
    """

    count: Any
    total: Any

    @classmethod
    def zeros(cls, width: int, dtype: Any = jnp.float32) -> SecondMoment:
        """Returns the statistic of no vectors."""
        return cls(jnp.zeros((), dtype), jnp.zeros((width, width), dtype))

    def update(
        self, x: Float[Array, "... d"], weights: Float[Array, ...] | None = None
    ) -> SecondMoment:
        """Adds the vectors of ``x``."""
        rows, w = _rows(x, weights, self.total.dtype)
        count = jnp.asarray(rows.shape[0], rows.dtype) if w is None else jnp.sum(w)
        return SecondMoment(self.count + count, self.total + linalg.gram(rows, w))

    def second_moment(self) -> Float[Array, "d d"]:
        """Returns the uncentered second moment per token."""
        return _per_token(self.total, self.count)


@flax.struct.dataclass
class AbsMean:
    """Mean magnitude of each feature.

    Attributes:
      count: ``[]``, sum of token weights.
      total: ``[d]``, Σ w |x|.
    """

    count: Any
    total: Any

    @classmethod
    def zeros(cls, width: int, dtype: Any = jnp.float32) -> AbsMean:
        """Returns the statistic of no vectors."""
        return cls(jnp.zeros((), dtype), jnp.zeros(width, dtype))

    def update(self, x: Float[Array, "... d"], weights: Float[Array, ...] | None = None) -> AbsMean:
        """Adds the vectors of ``x``."""
        rows, w = _rows(x, weights, self.total.dtype)
        w = jnp.ones(rows.shape[0], rows.dtype) if w is None else w
        total = jnp.sum(w[:, None] * jnp.abs(rows), axis=0)
        return AbsMean(self.count + jnp.sum(w), self.total + total)

    def mean(self) -> Float[Array, "d"]:
        """Returns the mean magnitude per token."""
        return _per_token(self.total, self.count)


@flax.struct.dataclass
class MeanSquare:
    """Mean square of each feature: the diagonal of a `SecondMoment`.

    Attributes:
      count: ``[]``, sum of token weights.
      total: ``[d]``, Σ w x².
    """

    count: Any
    total: Any

    @classmethod
    def zeros(cls, width: int, dtype: Any = jnp.float32) -> MeanSquare:
        """Returns the statistic of no vectors."""
        return cls(jnp.zeros((), dtype), jnp.zeros(width, dtype))

    def update(
        self, x: Float[Array, "... d"], weights: Float[Array, ...] | None = None
    ) -> MeanSquare:
        """Adds the vectors of ``x``."""
        rows, w = _rows(x, weights, self.total.dtype)
        w = jnp.ones(rows.shape[0], rows.dtype) if w is None else w
        return MeanSquare(
            self.count + jnp.sum(w), self.total + jnp.sum(w[:, None] * rows**2, axis=0)
        )

    def mean(self) -> Float[Array, "d"]:
        """Returns the mean square per token."""
        return _per_token(self.total, self.count)


@flax.struct.dataclass
class HeadMoments:
    """Uncentered second moments of the heads of vectors ``[heads · d]``.

    Attributes:
      count: ``[]``, sum of token weights.
      total: ``[heads, d, d]``, Σ w x_h x_hᵀ.
    """

    count: Any
    total: Any

    @classmethod
    def zeros(cls, width: tuple[int, int], dtype: Any = jnp.float32) -> HeadMoments:
        """Returns the statistic of no vectors; ``width`` is (heads, d)."""
        heads, d = width
        return cls(jnp.zeros((), dtype), jnp.zeros((heads, d, d), dtype))

    def update(
        self, x: Float[Array, "... hd"], weights: Float[Array, ...] | None = None
    ) -> HeadMoments:
        """Adds the vectors of ``x``."""
        rows, w = _rows(x, weights, self.total.dtype)
        heads = rows.reshape(len(rows), *self.total.shape[:2]).transpose(1, 0, 2)
        grams = jax.vmap(linalg.gram, in_axes=(0, None))(heads, w)
        count = jnp.asarray(len(rows), rows.dtype) if w is None else jnp.sum(w)
        return HeadMoments(self.count + count, self.total + grams)

    def second_moment(self) -> Float[Array, "heads d d"]:
        """Returns the uncentered second moment of each head, per token."""
        return _per_token(self.total, self.count)


@flax.struct.dataclass
class Influence:
    """Block influence: one minus the mean cosine between a block's input and output (ShortGPT).

    Attributes:
      count: ``[]``, sum of token weights.
      total: ``[]``, Σ w (1 - cos).
    """

    count: Any
    total: Any

    @classmethod
    def zeros(cls, width: Any = None, dtype: Any = jnp.float32) -> Influence:
        """Returns the statistic of no vectors; it has no width."""
        del width
        return cls(jnp.zeros((), dtype), jnp.zeros((), dtype))

    def update(
        self,
        pair: tuple[Float[Array, "... d"], Float[Array, "... d"]],
        weights: Float[Array, ...] | None = None,
    ) -> Influence:
        """Adds the vectors of a block's input and output."""
        (x, w), (y, _) = (_rows(z, weights, self.total.dtype) for z in pair)
        norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
        cosine = jnp.sum(x * y, axis=-1) / jnp.where(norms > 0, norms, 1)
        w = jnp.ones_like(cosine) if w is None else w
        return Influence(self.count + jnp.sum(w), self.total + jnp.sum(w * (1 - cosine)))

    def mean(self) -> Float[Array, ""]:
        """Returns the block influence per token, in [0, 2]."""
        return _per_token(self.total, self.count)


def merged(folds: Sequence[Any]) -> Any:
    """Returns the statistics of several folds together.

    Args:
      folds: trees of equal structure, of statistics of this module and of plain sums.
    """

    def merge(first: Any, second: Any) -> Any:
        if isinstance(first, Moments):
            return first.merge(second)
        return jax.tree.map(operator.add, first, second)

    def merge_trees(first: Any, second: Any) -> Any:
        return jax.tree.map(merge, first, second, is_leaf=lambda leaf: isinstance(leaf, Moments))

    return functools.reduce(merge_trees, folds)


# Kinds of statistics by name; the keys of accumulators, ``"<tap>:<kind>"``, use these names.
STATISTICS: dict[str, Any] = {
    "moments": Moments,
    "second_moment": SecondMoment,
    "abs_mean": AbsMean,
    "heads": HeadMoments,
    "influence": Influence,
}
