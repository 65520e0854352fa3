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

import abc
import dataclasses
import functools
import importlib.util
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax import nf, nf_tiles
from lordjax.runtime import xla_scheduling


class Kernel(abc.ABC):
    """A matrix ``[..., in, out]`` that is not stored as one array."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``(..., in, out)``."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """The dtype of `materialize`."""

    @abc.abstractmethod
    def matmul(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """``x @ W``."""

    @abc.abstractmethod
    def materialize(self) -> Float[Array, "... in out"]:
        """``W``."""


@flax.struct.dataclass
class LowRank(Kernel):
    """``W = left @ right``: two thin matrices, either of which may itself be a `Kernel`.

    Attributes:
      left: ``[..., in, rank]``.
      right: ``[..., rank, out]``.
    """

    left: Any
    right: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., in, out)``."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.left.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the factors."""
        return self.left.dtype

    def matmul(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """``(x @ left) @ right``."""
        return matmul(matmul(x, self.left), self.right)

    def materialize(self) -> Float[Array, "... in out"]:
        """``left @ right``, multiplied at full precision."""
        return jnp.matmul(materialize(self.left), materialize(self.right), precision="highest")


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
    format: nf.Format = flax.struct.field(pytree_node=False)

    @classmethod
    def encode(cls, kernel: Float[Array, "... in out"], form: nf.Format) -> NFQuantized:
        """The nearest matrix of a format, computed in float32."""
        *lead, fan_in, fan_out = kernel.shape
        rows = kernel.mT.reshape(*lead, fan_in * fan_out)
        packed = _over(lead, lambda x: nf.encode(x, form))(rows)
        return cls.of(packed, (fan_in, fan_out), form)

    @classmethod
    def of(cls, packed: nf.Packed, shape: tuple[int, ...], form: nf.Format) -> NFQuantized:
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
        packed = nf.Packed(self.codes, self.scales, self.supers, self.offset)
        values = _over(lead, lambda p: nf.decode(p, self.format, fan_in * fan_out))(packed)
        return jax.lax.stop_gradient(values).reshape(*lead, fan_out, fan_in).mT

    def decoded_after(self, x: Float[Array, "..."]) -> Float[Array, "... in out"]:
        """W in the dtype of ``x``, decoded no earlier than ``x`` is there.

        Nothing else keeps a compiler from decoding the matrices of all layers first, or once for
        all turns of a loop, and holding them.
        """
        codes = self.codes + xla_scheduling.never(x).astype(self.codes.dtype)
        return dataclasses.replace(self, codes=codes).materialize().astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decoded_product(shape: tuple[int, ...], x: Array, kernel: NFQuantized) -> Array:
    """``x [shape] @ W``."""
    del shape
    if _in_tiles(kernel):
        return nf_tiles.product(x, kernel)
    return jnp.matmul(x, kernel.decoded_after(x))


def _forwards(shape: tuple[int, ...], x: Array, kernel: NFQuantized) -> tuple[Array, NFQuantized]:
    return _decoded_product(shape, x, kernel), kernel


def _backwards(shape: tuple[int, ...], kernel: NFQuantized, g: Array) -> tuple[Array, None]:
    if _in_tiles(kernel):
        return nf_tiles.transposed_product(g, kernel), None
    decoded = kernel.decoded_after(g)
    like = jax.ShapeDtypeStruct(shape, g.dtype)
    (gradient,) = jax.linear_transpose(lambda x: jnp.matmul(x, decoded), like)(g)
    return gradient, None


_decoded_product.defvjp(_forwards, _backwards)


def _in_tiles(kernel: NFQuantized) -> bool:
    return jax.default_backend() == "cpu" and nf_tiles.supported(kernel)


def _by_gpu_kernel(x: Array, base: NFQuantized, low_rank: LowRank | None = None) -> Array | None:
    """``x @ base + x @ low_rank`` by `nf_pallas` if that was measured to be faster, else None."""
    if jax.default_backend() != "gpu" or not _has_triton():
        return None
    from lordjax import nf_choice  # Pallas, which takes a while to import

    return nf_choice.product(x, base, low_rank)


@functools.cache
def _has_triton() -> bool:
    """Whether this jax compiles Pallas kernels with Triton: newer ones announce to drop that."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def _over(lead: Any, fn: Any) -> Any:
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


# Kernel kinds by the name they have on disk.
KINDS: dict[str, type[Kernel]] = {
    "low_rank": LowRank,
    "nf_quantized": NFQuantized,
    "low_rank_plus_quantized": LowRankPlusQuantized,
}


def parts(kind: Any) -> tuple[list[str], list[str]]:
    """Names of the fields of a kernel or a kind that are arrays or kernels, and of the others."""
    fields = dataclasses.fields(kind)
    inner = [f.name for f in fields if f.metadata.get("pytree_node", True)]
    return inner, [f.name for f in fields if f.name not in inner]


def is_kernel(leaf: Any) -> bool:
    """True for a `Kernel`; the ``is_leaf`` of every tree walk over parameters."""
    return isinstance(leaf, Kernel)


def matmul(x: Float[Array, "... in"], kernel: Any) -> Float[Array, "... out"]:
    """``x @ kernel`` for an array or a `Kernel`, computed and returned in the dtype of ``x``."""
    if isinstance(kernel, Kernel):
        return kernel.matmul(x)
    return jnp.matmul(x, kernel.astype(x.dtype))


def materialize(tree: Any) -> Any:
    """Replaces every `Kernel` of a tree (or a single one) by its matrix; arrays pass through."""
    return jax.tree.map(
        lambda leaf: leaf.materialize() if isinstance(leaf, Kernel) else leaf,
        tree,
        is_leaf=is_kernel,
    )


def astype(tree: Any, dtype: Any) -> Any:
    """Arrays of numbers, factors too, in another dtype; codes and indices stay as they are."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, NFQuantized) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf.astype(dtype)

    return jax.tree.map(cast, tree, is_leaf=lambda leaf: isinstance(leaf, NFQuantized))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves of a kernel, a model, or a tree of ``ShapeDtypeStruct``.

    The one byte count of the project: plan, report and file on disk use it.
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def weights(leaf: Any) -> int:
    """How many numbers a kernel or array holds: of codes, one per code."""
    if isinstance(leaf, NFQuantized):
        return math.prod(leaf.shape)
    if isinstance(leaf, Kernel):
        return sum(weights(getattr(leaf, name)) for name in parts(leaf)[0])
    return leaf.size


def kind_of(leaf: Any) -> str:
    """The on-disk name of a leaf's kind: ``"dense"`` for an array, else a key of `KINDS`.

    Raises:
      TypeError: if the leaf is a `Kernel` of a kind that `KINDS` lacks.
    """
    for name, kind in KINDS.items():
        if type(leaf) is kind:
            return name
    if isinstance(leaf, Kernel):
        raise TypeError(f"{type(leaf).__name__} is not in KINDS, so that it has no name on disk")
    return "dense"


def check(kernel: Any, path: str) -> None:
    """Verifies that the parts of a kernel, however deep, fit each other.

    Raises:
      ValueError: if they do not; names ``path``.
    """
    if not isinstance(kernel, Kernel):  # an array fits itself
        return
    for name in parts(kernel)[0]:
        check(getattr(kernel, name), f"{path}/{name}")
    match kernel:
        case LowRank():
            _check_low_rank(kernel, path)
        case NFQuantized():
            _check_quantized(kernel, path)
        case LowRankPlusQuantized():
            if kernel.base.shape != kernel.low_rank.shape:
                raise ValueError(
                    f"{path}: base {kernel.base.shape} and low_rank {kernel.low_rank.shape} are "
                    "not of one shape"
                )


def _check_low_rank(kernel: LowRank, path: str) -> None:
    left, right = kernel.left, kernel.right
    for name, factor in (("left", left), ("right", right)):
        if len(factor.shape) < 2:
            raise ValueError(f"{path}/{name}: expected a matrix, got shape {factor.shape}")
    if left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
        raise ValueError(
            f"{path}: left {left.shape} and right {right.shape} do not fit; expected "
            "[..., in, rank] and [..., rank, out] with the same rank and leading axes"
        )
    if left.dtype != right.dtype:
        raise ValueError(
            f"{path}: left is {left.dtype}, right is {right.dtype}; expected one dtype"
        )


def _check_quantized(kernel: NFQuantized, path: str) -> None:
    sizes = (kernel.fan_in, kernel.fan_out)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{path}: fan_in and fan_out are {sizes}; expected positive integers")
    form, count = kernel.format, math.prod(sizes)
    blocks, supers = form.blocks(count)
    expected = {
        "codes": ((nf.words_for(count, form.bits),), "uint32"),
        "scales": ((nf.words_for(blocks, form.scale_bits),), "uint32"),
        "supers": ((supers,), form.scale_dtype),
        "offset": ((), "float32"),
    }
    lead = kernel.codes.shape[:-1]
    for name, (shape, dtype) in expected.items():
        part = getattr(kernel, name)
        if tuple(part.shape) != (*lead, *shape) or part.dtype != dtype:
            raise ValueError(
                f"{path}/{name}: expected {dtype} {(*lead, *shape)} for a {kernel.fan_in} x "
                f"{kernel.fan_out} matrix in {form}, got {part.dtype} {tuple(part.shape)}"
            )
