"""The registry of kinds of kernels: names in files, checks, conversions of dtype."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lordjax.kernels import normal_float
from lordjax.kernels.base import Kernel, kernel_fields
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized

# Kernel kinds by the name they have on disk.
KINDS: dict[str, type[Kernel]] = {
    "low_rank": LowRank,
    "nf_quantized": NFQuantized,
    "low_rank_plus_quantized": LowRankPlusQuantized,
}


def astype(tree: Any, dtype: Any) -> Any:
    """Arrays of numbers, factors too, in another dtype; codes and indices stay as they are."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, NFQuantized) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf.astype(dtype)

    return jax.tree.map(cast, tree, is_leaf=lambda leaf: isinstance(leaf, NFQuantized))


def weights(leaf: Any) -> int:
    """How many numbers a kernel or array holds: of codes, one per code."""
    if isinstance(leaf, NFQuantized):
        return math.prod(leaf.shape)
    if isinstance(leaf, Kernel):
        return sum(weights(getattr(leaf, name)) for name in kernel_fields(leaf)[0])
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
    for name in kernel_fields(kernel)[0]:
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
        "codes": ((normal_float.words_for(count, form.bits),), "uint32"),
        "scales": ((normal_float.words_for(blocks, form.scale_bits),), "uint32"),
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
