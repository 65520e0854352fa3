"""Quantized matrices whose scales can be trained, while their codes stay as they are.

`unpacked` gives the quantized matrices of a model arrays that have a gradient, and `packed` brings
them back to the formats that they had. Between the two a matrix is::

    ŵ = level[code] · ŝ · (1 + shift)

with one shift per block of values, 0 at first. Low-rank factors that are quantized are decoded, and
are encoded again by `packed`.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import Kernel, materialize
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized
from lordjax.names import is_block_linear


@flax.struct.dataclass
class ShiftedScales(Kernel):
    """A quantized matrix with a trainable relative change of every block's scale.

    It exists during training only, so it has no name on disk.

    Attributes:
      base: the quantized matrix, `NFQuantized` without leading axes.
      shifts: relative changes of the block scales ``[blocks]``. A change, and not a factor near 1,
        because it keeps its digits in bfloat16.
    """

    base: Any
    shifts: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape ``(in, out)``."""
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the decoded matrix."""
        return self.base.dtype

    def matmul(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Returns ``x @ W``; W is decoded for this product, and again for its gradient."""
        decoded = self.base.materialize_after(x.astype(jnp.float32))
        return jnp.matmul(x, self._shifted(decoded).astype(x.dtype))

    def materialize(self) -> Float[Array, "in out"]:
        """Returns the decoded matrix, float32."""
        return self._shifted(self.base.materialize())

    def _shifted(self, decoded: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """Returns the decoded matrix with its blocks scaled, float32."""
        fan_in, fan_out = decoded.shape
        rows = normal_float.runs(decoded.mT.reshape(-1), self.base.format.block)
        scaled = rows * (1 + self.shifts.astype(jnp.float32))[:, None]
        return scaled.reshape(-1)[: fan_in * fan_out].reshape(fan_out, fan_in).mT


def unpacked(params: Any) -> Any:
    """Gives the quantized matrices of the blocks arrays that can be trained.

    Args:
      params: nested dict of a model's parameters; leaves may be kernels of any kind.

    Returns:
      The tree with `ShiftedScales` in place of `NFQuantized`, and with decoded low-rank factors.
    """

    def replace(path: str, leaf: Any) -> Any:
        return _unpacked(leaf) if is_block_linear(path) else leaf

    return trees.map_with_path(replace, params)


def _unpacked(leaf: Any) -> Any:
    match leaf:
        case NFQuantized():
            blocks = leaf.format.blocks(leaf.fan_in * leaf.fan_out)[0]
            return ShiftedScales(leaf, jnp.zeros(blocks, jnp.float32))
        case LowRank():
            return LowRank(materialize(leaf.left), materialize(leaf.right))
        case LowRankPlusQuantized():
            return LowRankPlusQuantized(_unpacked(leaf.base), _unpacked(leaf.low_rank))
    return leaf


def packed(params: Any, like: Any) -> Any:
    """Brings the matrices of `unpacked` back to their formats.

    Codes stay bit for bit. New scales are quantized as the format says, and decoded low-rank
    factors are quantized to their nearest codes.

    Args:
      params: the tree that `unpacked` returned, trained.
      like: the tree that `unpacked` was given.

    Returns:
      The tree with the kinds, formats and sizes of ``like``.
    """
    before = trees.flatten(like)
    return trees.map_with_path(lambda path, leaf: _packed(leaf, before[path]), params)


def _packed(leaf: Any, before: Any) -> Any:
    match leaf, before:
        case ShiftedScales(), _:
            return _with_scales(leaf)
        case LowRank(), LowRank():
            return LowRank(_packed(leaf.left, before.left), _packed(leaf.right, before.right))
        case LowRankPlusQuantized(), LowRankPlusQuantized():
            base = _packed(leaf.base, before.base)
            return LowRankPlusQuantized(base, _packed(leaf.low_rank, before.low_rank))
        case _, NFQuantized():
            return NFQuantized.encode(jnp.asarray(leaf), before.format)
    return leaf


def _with_scales(kernel: ShiftedScales) -> NFQuantized:
    """Returns the quantized matrix with the same codes and the trained scales."""
    base, form = kernel.base, kernel.base.format
    codes = normal_float.unpack(base.scales, form.scale_bits, len(kernel.shifts))
    scales = normal_float.dequantize_scales(codes, base.supers, base.offset, form)
    trained = scales * jnp.maximum(1 + kernel.shifts.astype(jnp.float32), 0)
    codes, supers, offset = normal_float.quantize_scales(trained, form)
    scales = normal_float.pack(codes, form.scale_bits)
    return base.replace(scales=scales, supers=supers, offset=offset)
