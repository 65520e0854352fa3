"""Compressed weights as values: what may stand where a model expects a kernel.

A *kernel* is the matrix of a linear layer in Flax's layout, ``[in, out]``, so that ``y = x @ W``.
It is either an array or a `Kernel`. Leading axes are allowed everywhere (stacks of kernels).

The contract of a `Kernel`, and all of it:

* ``shape``          ``(..., in, out)``, derived from the leaves, so that it survives ``vmap``;
* ``matmul(x)``      ``x @ W`` without forming ``W`` where that is cheaper; the dtype of ``x``;
* ``materialize()``  ``W`` itself.

A class is abstract or final. Checks live in `check`, not in constructors, because
``jax.tree.map`` builds kernels whose leaves are not arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.kernels import nf_cpu, normal_float
from lordjax.kernels.base import Kernel, materialize, matmul
from lordjax.kernels.low_rank import LowRank
from lordjax.runtime import xla_scheduling


@flax.struct.dataclass
class NFQuantized(Kernel):
    """NormalFloat codes (`nf`), 2 to 8 bits per weight and a little for the scales.

    Inputs run fastest: runs of ``format.block`` weights that share a scale belong to one output,
    where the block divides ``fan_in``. Constant under differentiation.

    Attributes:
      codes: ``[..., words]`` uint32, packed.
      scales: ``[..., words]`` uint32, packed.
      supers: ``[..., supers]`` in ``format.scale_dtype``.
      offset: ``[...]`` float32.
      fan_in: rows of the matrix.
      fan_out: columns of the matrix.
      format: bits and blocks.
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
        """The nearest matrix of a format, computed in float32."""
        *lead, fan_in, fan_out = kernel.shape
        rows = kernel.mT.reshape(*lead, fan_in * fan_out)
        packed = _vmap_leading(lead, lambda x: normal_float.quantize_packed(x, form))(rows)
        return cls.of(packed, (fan_in, fan_out), form)

    @classmethod
    def of(
        cls, packed: normal_float.Packed, shape: tuple[int, ...], form: normal_float.Format
    ) -> NFQuantized:
        """The kernel ``[in, out]`` whose transpose, flattened, was packed."""
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
        """``(..., in, out)``."""
        return (*self.codes.shape[:-1], self.fan_in, self.fan_out)

    @property
    def dtype(self) -> jnp.dtype:
        """float32, whatever the scales are stored in."""
        return jnp.dtype(jnp.float32)

    def matmul(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """``x @ W``; W is decoded for this product, and once more when it is differentiated.

        On a CPU tile by tile (`nf_tiles`); on a GPU, too, in one kernel, where that is faster.
        """
        y = _by_gpu_kernel(x, self)
        return _decoded_product(x.shape, x, self) if y is None else y

    def materialize(self) -> Float[Array, "... in out"]:
        """The decoded matrix."""
        *lead, fan_in, fan_out = self.shape
        packed = normal_float.Packed(self.codes, self.scales, self.supers, self.offset)
        values = _vmap_leading(
            lead, lambda p: normal_float.dequantize_packed(p, self.format, fan_in * fan_out)
        )(packed)
        return jax.lax.stop_gradient(values).reshape(*lead, fan_out, fan_in).mT

    def materialize_after(self, x: Float[Array, "..."]) -> Float[Array, "... in out"]:
        """W in the dtype of ``x``, decoded no earlier than ``x`` is there.

        Nothing else keeps a compiler from decoding the matrices of all layers first, or once for
        all turns of a loop, and holding them.
        """
        codes = self.codes + xla_scheduling.false_after(x).astype(self.codes.dtype)
        return dataclasses.replace(self, codes=codes).materialize().astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decoded_product(shape: tuple[int, ...], x: Array, kernel: NFQuantized) -> Array:
    """``x [shape] @ W``."""
    del shape
    if _in_tiles(kernel):
        return nf_cpu.product(x, kernel)
    return jnp.matmul(x, kernel.materialize_after(x))


def _forwards(shape: tuple[int, ...], x: Array, kernel: NFQuantized) -> tuple[Array, NFQuantized]:
    return _decoded_product(shape, x, kernel), kernel


def _backwards(shape: tuple[int, ...], kernel: NFQuantized, g: Array) -> tuple[Array, None]:
    if _in_tiles(kernel):
        return nf_cpu.transposed_product(g, kernel), None
    decoded = kernel.materialize_after(g)
    like = jax.ShapeDtypeStruct(shape, g.dtype)
    (gradient,) = jax.linear_transpose(lambda x: jnp.matmul(x, decoded), like)(g)
    return gradient, None


_decoded_product.defvjp(_forwards, _backwards)


def _in_tiles(kernel: NFQuantized) -> bool:
    return jax.default_backend() == "cpu" and nf_cpu.supported(kernel)


def _by_gpu_kernel(x: Array, base: NFQuantized, low_rank: LowRank | None = None) -> Array | None:
    """``x @ base + x @ low_rank`` by `nf_pallas` if that was measured to be faster, else None."""
    if jax.default_backend() != "gpu" or not _has_triton():
        return None
    from lordjax.kernels import nf_gpu_autotune  # Pallas, which takes a while to import

    return nf_gpu_autotune.product(x, base, low_rank)


@functools.cache
def _has_triton() -> bool:
    """Whether this jax compiles Pallas kernels with Triton: newer ones announce to drop that."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def _vmap_leading(lead: Any, fn: Any) -> Any:
    """``fn`` mapped over leading axes."""
    for _ in lead:
        fn = jax.vmap(fn)
    return fn


@flax.struct.dataclass
class LowRankPlusQuantized(Kernel):
    """``W = base + low_rank``: what the codes miss is made up for by a thin product (LQ-LoRA).

    Attributes:
      base: `NFQuantized`.
      low_rank: `LowRank`, the part that can be trained.
    """

    base: Any
    low_rank: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., in, out)``."""
        return self.base.shape

    @property
    def rank(self) -> int:
        """Of the low-rank part."""
        return self.low_rank.rank

    @property
    def dtype(self) -> jnp.dtype:
        """The wider dtype of the two."""
        return max(self.base.dtype, self.low_rank.dtype, key=lambda dtype: dtype.itemsize)

    def matmul(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """``x @ base + (x @ left) @ right``; on a GPU in one kernel, where that is faster."""
        y = _by_gpu_kernel(x, self.base, self.low_rank)
        return matmul(x, self.base) + matmul(x, self.low_rank) if y is None else y

    def materialize(self) -> Float[Array, "... in out"]:
        """The sum."""
        terms = materialize(self.base), materialize(self.low_rank)
        return terms[0].astype(self.dtype) + terms[1].astype(self.dtype)
