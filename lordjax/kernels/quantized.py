"""Quantized kernels: NormalFloat weights, with or without a low-rank term."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lordjax.kernels import nf_cpu, nf_gather, normal_float
from lordjax.kernels.base import Kernel, materialize, matmul
from lordjax.kernels.low_rank import LowRank
from lordjax.runtime import target, xla_scheduling


@flax.struct.dataclass
class NFQuantized(Kernel):
    """A matrix quantized to NormalFloat: 2 to 8 bits per weight, and the bits of the scales.

    The transposed matrix is stored row by row. So a block of ``format.block`` weights, which share
    a scale, belongs to one output if the block size divides ``fan_in``. The stored arrays have no
    gradient.

    Attributes:
      codes: packed codes of the weights, ``[..., words]`` uint32.
      scales: packed codes of the block scales, ``[..., words]`` uint32.
      supers: scales of the block scales, ``[..., supers]`` in ``format.scale_dtype``.
      offset: smallest block scale, ``[...]`` float32.
      fan_in: number of rows of the matrix.
      fan_out: number of columns of the matrix.
      format: number of bits and block sizes (`lordjax.kernels.normal_float.Format`).
    """

    codes: Any
    scales: Any
    supers: Any
    offset: Any
    fan_in: int = flax.struct.field(pytree_node=False)
    fan_out: int = flax.struct.field(pytree_node=False)
    format: normal_float.Format = flax.struct.field(pytree_node=False)

    @classmethod
    def encode(cls, kernel: Float[Array, "... in out"], form: normal_float.Format) -> NFQuantized:
        """Quantizes matrices to the nearest codes, computed in float32.

        Args:
          kernel: matrices ``[..., in, out]``.
          form: the format.

        Returns:
          A kernel of the same shape.
        """
        *lead, fan_in, fan_out = kernel.shape
        rows = kernel.mT.reshape(*lead, fan_in * fan_out)
        packed = _vmap_leading(lead, lambda x: normal_float.quantize_packed(x, form))(rows)
        return cls.of(packed, (fan_in, fan_out), form)

    @classmethod
    def of(
        cls, packed: normal_float.Packed, shape: tuple[int, ...], form: normal_float.Format
    ) -> NFQuantized:
        """Returns the kernel of a packed vector.

        Args:
          packed: the transposed matrix, flattened, quantized and packed.
          shape: shape ``[in, out]`` of the matrix.
          form: the format.
        """
        return cls(
            codes=packed.codes,
            scales=packed.scales,
            supers=packed.supers,
            offset=packed.offset,
            fan_in=shape[0],
            fan_out=shape[1],
            format=form,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape ``(..., in, out)``."""
        return (*self.codes.shape[:-1], self.fan_in, self.fan_out)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the decoded matrix: float32, whatever the dtype of the scales."""
        return jnp.dtype(jnp.float32)

    def matmul(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Returns ``x @ W``. W is decoded for this product, and again for its gradient.

        On a CPU it is decoded tile by tile (`nf_cpu`). On a GPU one fused kernel decodes and
        multiplies (`nf_gpu`) where that was measured to be faster.
        """
        y = _gpu_product(x, self)
        return _decoded_product(x.shape, x, self) if y is None else y

    def materialize(self) -> Float[Array, "... in out"]:
        """Returns the decoded matrix, float32."""
        *lead, fan_in, fan_out = self.shape
        packed = normal_float.Packed(self.codes, self.scales, self.supers, self.offset)
        values = _vmap_leading(
            lead, lambda p: normal_float.dequantize_packed(p, self.format, fan_in * fan_out)
        )(packed)
        return jax.lax.stop_gradient(values).reshape(*lead, fan_out, fan_in).mT

    def columns(self, index: Int[Array, "..."]) -> Float[Array, "... in"]:
        """Returns columns of one matrix, float32; only these are decoded.

        Args:
          index: indices of columns. A column that is not there is NaN.
        """
        fan_in = np.uint32(self.fan_in)
        there = ((index >= 0) & (index < self.fan_out))[..., None]
        first = jnp.where(there, index[..., None], 0).astype(jnp.uint32) * fan_in
        arrays = self.codes, self.scales, self.supers, self.offset
        packed = normal_float.Packed(*map(jnp.asarray, arrays))
        within = jnp.arange(self.fan_in, dtype=jnp.uint32)
        places = first + jnp.broadcast_to(within, (*index.shape, self.fan_in))
        values = nf_gather.values_at(packed, self.format, places)
        return jax.lax.stop_gradient(jnp.where(there, values, jnp.nan))

    def materialize_after(self, x: Float[Array, "..."]) -> Float[Array, "... in out"]:
        """Returns W in the dtype of ``x``, decoded after ``x`` was computed.

        Without this dependency the compiler may decode the matrices of all layers first, or once
        for all iterations of a loop, and keep them in memory.
        """
        codes = self.codes + xla_scheduling.false_after(x).astype(self.codes.dtype)
        return dataclasses.replace(self, codes=codes).materialize().astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decoded_product(shape: tuple[int, ...], x: Array, kernel: NFQuantized) -> Array:
    """Returns ``x @ W`` by decoding W; ``shape`` is that of ``x``, for the backward pass."""
    del shape
    if _decodes_in_tiles(kernel):
        return nf_cpu.product(x, kernel)
    return jnp.matmul(x, kernel.materialize_after(x))


def _forwards(shape: tuple[int, ...], x: Array, kernel: NFQuantized) -> tuple[Array, NFQuantized]:
    return _decoded_product(shape, x, kernel), kernel


def _backwards(shape: tuple[int, ...], kernel: NFQuantized, g: Array) -> tuple[Array, None]:
    if _decodes_in_tiles(kernel):
        return nf_cpu.transposed_product(g, kernel), None
    decoded = kernel.materialize_after(g)
    like = jax.ShapeDtypeStruct(shape, g.dtype)
    (gradient,) = jax.linear_transpose(lambda x: jnp.matmul(x, decoded), like)(g)
    return gradient, None


_decoded_product.defvjp(_forwards, _backwards)


def _decodes_in_tiles(kernel: NFQuantized) -> bool:
    return target.platform() == "cpu" and nf_cpu.supported(kernel)


def _gpu_product(x: Array, base: Any, low_rank: LowRank | None = None) -> Array | None:
    """Returns ``x @ base + x @ low_rank`` by `nf_gpu` where that is measured faster, else None.

    It is for quantized matrices; an adapter's base can be of any kind.
    """
    if target.platform() != "gpu" or not isinstance(base, NFQuantized) or not target.has_triton():
        return None
    from lordjax.kernels import nf_gpu_autotune  # Pallas is slow to import

    return nf_gpu_autotune.product(x, base, low_rank)


def _vmap_leading(lead: Any, fn: Any) -> Any:
    """Returns ``fn``, mapped over leading axes."""
    for _ in lead:
        fn = jax.vmap(fn)
    return fn


@flax.struct.dataclass
class LowRankPlusQuantized(Kernel):
    """A matrix ``W = base + low_rank``: quantized weights plus a low-rank term (LQ-LoRA).

    Attributes:
      base: the quantized matrix, `NFQuantized`.
      low_rank: the low-rank term, `LowRank`. Only this part can be trained.
    """

    base: Any
    low_rank: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape ``(..., in, out)``."""
        return self.base.shape

    @property
    def rank(self) -> int:
        """The rank of the low-rank term."""
        return self.low_rank.rank

    @property
    def dtype(self) -> jnp.dtype:
        """The wider of the two parts' dtypes."""
        return max(self.base.dtype, self.low_rank.dtype, key=lambda dtype: dtype.itemsize)

    def matmul(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Returns ``x @ base + (x @ left) @ right``, on a GPU in one kernel where it is faster."""
        y = _gpu_product(x, self.base, self.low_rank)
        return matmul(x, self.base) + matmul(x, self.low_rank) if y is None else y

    def materialize(self) -> Float[Array, "... in out"]:
        """Returns the sum of both matrices."""
        terms = materialize(self.base), materialize(self.low_rank)
        return terms[0].astype(self.dtype) + terms[1].astype(self.dtype)
