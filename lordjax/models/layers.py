"""Linear, norm, rotary embedding: the parts of a transformer block.

Axis letters: b batch, s position (query), t position (key), h head, g query heads per key head,
k key/value head, d width of a head, m model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.kernels.base import Kernel, matmul

# Keys are Hugging Face's names.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
}


class Linear(nn.Module):
    """``y = x @ kernel + bias`` where ``kernel`` is an array or a `Kernel`.

    The one caller of `kernels.matmul`. Existing parameters are taken as they are: Flax's own
    ``Dense`` would refuse a factored kernel, and compression may change the width or add a bias.
    ``features`` and ``use_bias`` matter only when parameters are initialised.

    The product without the bias is tapped as ``"out"``.

    Raises:
      ValueError: if the kernel's input width is not that of ``x``; names the path.
    """

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Applies the layer; computes in the dtype of ``x``."""
        kernel = self._read("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        if kernel.shape[-2] != x.shape[-1]:
            raise ValueError(
                f"{'/'.join(self.path)}/kernel: input width {kernel.shape[-2]}, "
                f"but the layer is fed {x.shape[-1]} features"
            )
        y = tap(self, "out", matmul(x, kernel))
        if self.has_variable("params", "bias") or (self.use_bias and self.is_initializing()):
            bias = self._read("bias", nn.initializers.zeros, (self.features,))
            y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
        elif self.use_bias:
            raise ValueError(f"{'/'.join(self.path)}/bias: missing, but this layer has a bias")
        return y

    def _read(self, name: str, init: Any, shape: tuple[int, ...]) -> Array | Kernel:
        if self.has_variable("params", name):
            return self.get_variable("params", name)
        return self.param(name, init, shape)


class Bias(nn.Module):
    """``x + bias``: the rest of a layer whose matrix is another layer's."""

    @nn.compact
    def __call__(self, x: Float[Array, "... m"]) -> Float[Array, "... m"]:
        """Adds the bias."""
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return x + jnp.broadcast_to(bias.astype(x.dtype), x.shape)


class RMSNorm(nn.Module):
    """``x / rms(x) * scale``, the mean square taken in float32.

    A scale that is wider than ``x`` is multiplied before ``x`` is rounded.
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
    """``(x - mean(x)) / std(x) * scale + bias``, the moments taken in float32."""

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
    """``cap * tanh(x / cap)`` in float32; without a cap ``x`` as it is."""
    return x if cap is None else cap * jnp.tanh(x.astype(jnp.float32) / cap)


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
