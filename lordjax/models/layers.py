"""Layers of a transformer block: linear layer, norms, activations; `tap` for statistics.

Axis letters: b batch, s position (query), t position (key), h head, g query heads per key head,
k key/value head, d width of a head, m width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lordjax.kernels.base import Kernel, matmul
from lordjax.kernels.table import scores, take_rows

# The keys are Hugging Face's names.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
}


class Linear(nn.Module):
    """``y = x @ kernel + bias`` where ``kernel`` is an array or a `Kernel`.

    Existing parameters are used as they are: Flax's own ``Dense`` would reject a factored kernel,
    and compression may change the width or add a bias. The product without the bias is tapped as
    ``"out"``.

    Attributes:
      features: output width, used only when parameters are initialized.
      use_bias: whether the layer has a bias.

    Raises:
      ValueError: if the kernel's input width is not that of ``x``, or the bias is missing; the
        error names the path.
    """

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Applies the layer in the dtype of ``x``."""
        kernel = self._read("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        if kernel.shape[-2] != x.shape[-1]:
            raise ValueError(
                f"{'/'.join(self.path)}/kernel: expected {x.shape[-1]} rows, the width of the "
                f"layer's input, got {kernel.shape[-2]}"
            )
        y = tap(self, "out", matmul(x, kernel))
        if self.has_variable("params", "bias") or (self.use_bias and self.is_initializing()):
            bias = self._read("bias", nn.initializers.zeros, (self.features,))
            y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
        elif self.use_bias:
            raise ValueError(f"{'/'.join(self.path)}/bias: missing; this layer needs a bias")
        return y

    def _read(self, name: str, init: Any, shape: tuple[int, ...]) -> Array | Kernel:
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return self.param(name, init, shape)


class Embedding(nn.Module):
    """Rows of a table by their indices. The table is an array or a kernel; see `kernels.table`.

    The rows are tapped as ``"out"``, their indices as ``"ids"``.

    Attributes:
      rows: number of rows.
      columns: number of columns.
    """

    rows: int
    columns: int

    def setup(self) -> None:
        """Makes a random table if there is none."""
        if not self.has_variable("params", "embedding"):
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
            self.param("embedding", init, (self.rows, self.columns))

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... columns"]:
        """Returns rows, in the table's dtype."""
        tap(self, "ids", ids)
        return tap(self, "out", take_rows(self.get_variable("params", "embedding"), ids))

    def scores(self, x: Float[Array, "... columns"]) -> Float[Array, "... rows"]:
        """Returns the products of ``x`` with all rows: logits of a tied head."""
        return scores(x, self.get_variable("params", "embedding"))


class Bias(nn.Module):
    """``x + bias``: the bias of an output head whose matrix is the tied embedding."""

    @nn.compact
    def __call__(self, x: Float[Array, "... m"]) -> Float[Array, "... m"]:
        """Adds the bias."""
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return x + jnp.broadcast_to(bias.astype(x.dtype), x.shape)


class RMSNorm(nn.Module):
    """``x / rms(x) * scale``; the mean square is computed in float32.

    The product is computed in the wider dtype of ``x`` and the scale, and then rounded to that of
    ``x``.
    """

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... m"]) -> Float[Array, "... m"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        dtype = max(x.dtype, scale.dtype, key=lambda d: d.itemsize)
        product = wide.astype(dtype) * jnp.broadcast_to(scale.astype(dtype), x.shape)
        return product.astype(x.dtype)


class LayerNorm(nn.Module):
    """``(x - mean(x)) / std(x) * scale + bias``; mean and variance are computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... m"]) -> Float[Array, "... m"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        scale, bias = (jnp.broadcast_to(a.astype(x.dtype), x.shape) for a in (scale, bias))
        return wide.astype(x.dtype) * scale + bias


NORMS: dict[str, Callable[..., nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}


def softcap(x: Array, cap: float | None) -> Array:
    """Returns ``cap * tanh(x / cap)`` in float32, or ``x`` itself if there is no cap."""
    return x if cap is None else cap * jnp.tanh(x.astype(jnp.float32) / cap)


TAPS = "taps"  # Flax collection of recorded activations
PERTURBATIONS = "perturbations"  # Flax collection of what is added to them


def tap(module: nn.Module, name: str, x: Array) -> Array:
    """Marks an activation for statistics, and returns it.

    If the collection ``taps`` is mutable, the value is recorded as ``taps/<module path>/<name>``;
    else a tap costs nothing. If the collection ``perturbations`` holds an array of that name, it is
    added. So the gradient by a zero perturbation is the gradient by the activation.

    Args:
      module: the module that computes the activation.
      name: name of the tap inside the module.
      x: the activation.
    """
    if module.has_variable(PERTURBATIONS, name):
        x = x + module.get_variable(PERTURBATIONS, name)
    module.sow(TAPS, name, x, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    return x
