"""Statistics of activations: places to look at, and sums that can be streamed.

A model marks places with `tap`; a caller chooses what is recorded with
``apply(..., mutable=["taps"])``. With nothing mutable a tap costs nothing.

Moments are kept as count, mean and *centred* scatter and merged by Chan, Golub and LeVeque's rule
(1983), so that a large mean cannot swallow the covariance in float32::

    δ = m_b - m_a        m = m_a + δ·n_b/n        S = S_a + S_b + δδᵀ·n_a·n_b/n
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

TAPS = "taps"
PERTURBATIONS = "perturbations"


def tap(module: nn.Module, name: str, x: Array) -> Array:
    """Marks ``x`` as a place where statistics can be taken, and returns it.

    The value is recorded as ``taps/<module path>/<name>`` if that collection is mutable. If the
    collection ``perturbations`` holds an array of that name it is added, so that the gradient with
    respect to a zero perturbation is the gradient with respect to ``x``.
    """
    if module.has_variable(PERTURBATIONS, name):
        x = x + module.get_variable(PERTURBATIONS, name)
    module.sow(TAPS, name, x, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    return x


@flax.struct.dataclass
class Moments:
    """Count, mean and centred scatter of vectors of width d.

    Attributes:
      count: ``[]`` sum of token weights.
      mean: ``[d]``.
      scatter: ``[d, d]``, Σ w (x - mean)(x - mean)ᵀ.
    """

    count: Any
    mean: Any
    scatter: Any

    @classmethod
    def zeros(cls, width: int, dtype: Any = jnp.float32) -> Moments:
        """The moments of no vectors."""
        return cls(jnp.zeros((), dtype), jnp.zeros(width, dtype), jnp.zeros((width, width), dtype))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together."""
        count = self.count + other.count
        share = jnp.where(count > 0, other.count / jnp.where(count > 0, count, 1), 0)
        shift = other.mean - self.mean
        return Moments(
            count,
            self.mean + shift * share,
            self.scatter + other.scatter + jnp.outer(shift, shift) * (self.count * share),
        )

    def update(self, x: Float[Array, "... d"], weights: Float[Array, ...] | None = None) -> Moments:
        """Adds the rows of ``x``; ``weights`` (0 at padding) are broadcast over the last axis."""
        rows = x.reshape(-1, x.shape[-1]).astype(self.mean.dtype)
        if weights is None:
            count = jnp.asarray(rows.shape[0], rows.dtype)
            mean = jnp.mean(rows, axis=0)
            centred = rows - mean[None]
            weighted = centred
        else:
            w = weights.reshape(-1, 1).astype(rows.dtype)
            # Masked rows may hold anything, NaN included; 0 · NaN is NaN.
            rows = jnp.where(w > 0, rows, 0)
            count = jnp.sum(w)
            mean = jnp.sum(w * rows, axis=0) / jnp.where(count > 0, count, 1)
            centred = rows - mean[None]
            weighted = w * centred
        # float32 products at the default precision are TF32 on GPU and bfloat16 on TPU.
        scatter = jnp.matmul(weighted.T, centred, precision="highest")
        return self.merge(Moments(count, mean, scatter))

    def covariance(self) -> Float[Array, "d d"]:
        """Centred second moment per token, symmetrised."""
        return (self.scatter + self.scatter.T) / (2 * self.count)

    def second_moment(self) -> Float[Array, "d d"]:
        """Uncentred second moment per token, symmetrised."""
        return self.covariance() + jnp.outer(self.mean, self.mean)


@flax.struct.dataclass
class AbsMean:
    """Mean magnitude of each feature.

    Attributes:
      count: ``[]`` sum of token weights.
      total: ``[d]``, Σ w |x|.
    """

    count: Any
    total: Any

    @classmethod
    def zeros(cls, width: int, dtype: Any = jnp.float32) -> AbsMean:
        """The statistic of no vectors."""
        return cls(jnp.zeros((), dtype), jnp.zeros(width, dtype))

    def update(self, x: Float[Array, "... d"], weights: Float[Array, ...] | None = None) -> AbsMean:
        """Adds the rows of ``x``."""
        rows = jnp.abs(x.reshape(-1, x.shape[-1]).astype(self.total.dtype))
        w = jnp.ones(rows.shape[0], rows.dtype) if weights is None else weights.reshape(-1)
        w = w.astype(rows.dtype)[:, None]
        rows = jnp.where(w > 0, rows, 0)
        return AbsMean(self.count + jnp.sum(w), self.total + jnp.sum(w * rows, axis=0))

    def mean(self) -> Float[Array, "d"]:
        """Mean magnitude per token."""
        return self.total / self.count


# Kinds of statistics by name; a method's `needs` and the driver's accumulators use these names.
STATISTICS: dict[str, Any] = {"moments": Moments, "abs_mean": AbsMean}
