"""The registry of kernel kinds: their names on disk, checks, and dtype conversion."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lordjax.kernels import normal_float
from lordjax.kernels.base import Kernel, kernel_fields
from lordjax.kernels.layout import Rearranged, length
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.pruned import Pruned
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized

# Name on disk -> class.
KINDS: dict[str, type[Kernel]] = {
    "low_rank": LowRank,
    "nf_quantized": NFQuantized,
    "low_rank_plus_quantized": LowRankPlusQuantized,
    "rearranged": Rearranged,
    "pruned": Pruned,
}


def astype(tree: Any, dtype: Any) -> Any:
    """Converts the floating-point arrays of a tree to another dtype.

    Low-rank factors are converted. Quantized matrices and integer arrays stay as they are. A
    `Rearranged` kernel stands for a parameter, which is converted, too.
    """

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, NFQuantized) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if isinstance(leaf, Rearranged):
            own = None if leaf.leaf_dtype is None else jnp.dtype(dtype).name
            return leaf.replace(kernel=astype(leaf.kernel, dtype), leaf_dtype=own)
        return leaf.astype(dtype)

    return jax.tree.map(cast, tree, is_leaf=lambda leaf: isinstance(leaf, NFQuantized | Rearranged))


def weights(leaf: Any) -> int:
    """Returns the number of weights of a kernel or array; a code counts as one weight."""
    if isinstance(leaf, NFQuantized):
        return math.prod(leaf.shape)
    if isinstance(leaf, Kernel):
        return sum(weights(getattr(leaf, name)) for name in kernel_fields(leaf)[0])
    return leaf.size


def kind_of(leaf: Any) -> str:
    """Returns the name on disk of a leaf's kind: ``"dense"`` for an array, else a key of `KINDS`.

    Raises:
      TypeError: if the leaf is a `Kernel` whose class is not in `KINDS`.
    """
    for name, kind in KINDS.items():
        if type(leaf) is kind:
            return name
    if isinstance(leaf, Kernel):
        raise TypeError(
            f"{type(leaf).__name__} has no name on disk; expected one of the classes "
            f"{', '.join(kind.__name__ for kind in KINDS.values())}; a new kind must be added to "
            "lordjax.kernels.kinds.KINDS"
        )
    return "dense"


def check(kernel: Any, path: str) -> None:
    """Checks that the arrays of a kernel, nested kernels included, have matching shapes and dtypes.

    Args:
      kernel: an array or a `Kernel`.
      path: name of the kernel for error messages.

    Raises:
      ValueError: if they do not match. The message names ``path``.
    """
    if not isinstance(kernel, Kernel):  # an array needs no check
        return
    for name in kernel_fields(kernel)[0]:
        check(getattr(kernel, name), f"{path}/{name}")
    match kernel:
        case LowRank():
            _check_low_rank(kernel, path)
        case NFQuantized():
            _check_quantized(kernel, path)
        case Rearranged():
            _check_rearranged(kernel, path)
        case Pruned():
            if len(kernel.kernel.shape) < 2 or not 1 <= kernel.width <= kernel.size:
                raise ValueError(
                    f"{path}: has shape {kernel.kernel.shape}; expected a matrix with 1 to "
                    f"{kernel.size} neurons"
                )
        case LowRankPlusQuantized():
            if kernel.base.shape != kernel.low_rank.shape:
                raise ValueError(
                    f"{path}: base has shape {kernel.base.shape}, low_rank has shape "
                    f"{kernel.low_rank.shape}; expected equal shapes"
                )


def _check_rearranged(kernel: Rearranged, path: str) -> None:
    layout, shape = kernel.layout, tuple(kernel.kernel.shape)
    stack = tuple(size for size, _ in layout.stack)
    expected = (*stack, length(layout.rows), length(layout.cols))
    if len(shape) < len(expected) or shape[len(shape) - len(expected) :] != expected:
        raise ValueError(f"{path}: has shape {shape}; expected {expected} after leading axes")
    if math.prod(layout.shape) != math.prod(expected):
        raise ValueError(f"{path}: {expected} does not fill a parameter of shape {layout.shape}")


def _check_low_rank(kernel: LowRank, path: str) -> None:
    left, right = kernel.left, kernel.right
    for name, factor in (("left", left), ("right", right)):
        if len(factor.shape) < 2:
            raise ValueError(f"{path}/{name}: expected a matrix, got shape {factor.shape}")
    if left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
        raise ValueError(
            f"{path}: left {left.shape} and right {right.shape} do not match; expected "
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
