"""Functions that compress parameter trees: nested dicts of arrays or ``nnx.State``, no model.

They are pure and jittable, and work under ``vmap``, ``jax.pmap`` and on sharded arrays.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import Kernel, is_kernel
from lordjax.kernels.low_rank import LowRank, break_even
from lordjax.kernels.quantized import NFQuantized
from lordjax.names import listed


def _svd(kernel: Float[Array, "... in out"], rank: int) -> tuple[Array, Array]:
    # Not through the Gram matrix: in float32 it loses singular values below 3e-4 of the largest.
    u, values, v = jnp.linalg.svd(kernel, full_matrices=False)
    return (u * values[..., None, :])[..., :rank], v[..., :rank, :]


def _matrices(params: Any, where: str) -> set[str]:
    """Returns the paths of the matrices that match a pattern.

    Raises:
      KeyError: if no leaf matches.
      ValueError: if a matching leaf is not a floating-point matrix.
    """
    leaves = trees.flatten(params)
    chosen = set(trees.select(leaves, where))
    wrong = [
        f"{path} {leaves[path].shape} {leaves[path].dtype}"
        for path in sorted(chosen)
        if len(leaves[path].shape) < 2 or not jnp.issubdtype(leaves[path].dtype, jnp.floating)
    ]
    if wrong:
        raise ValueError(
            f"where={where!r} matches leaves that are not floating-point matrices: "
            f"{listed(wrong)}; choose a pattern that matches matrices only"
        )
    return chosen


def factorize(
    params: Any, *, rank: int | None = None, keep: float | None = None, where: str = "kernel$"
) -> Any:
    """Replaces matrices of a parameter tree by their best low-rank approximations.

    This is a truncated SVD of the weights, without data. See `lordjax.compress` for methods that
    use activations.

    Args:
      params: a pytree of arrays. Matrices are ``[..., in, out]``; leading axes are stacks.
      rank: the rank of every matrix. A matrix stays dense if the factors would not be smaller.
      keep: fraction of each matrix's weights to keep, in (0, 1], instead of ``rank``. 1 changes
        nothing.
      where: regular expression that is searched in the "/"-path of each leaf.

    Returns:
      A new tree of the same structure with `LowRank` leaves. Factors have the dtype of the matrix;
      they are computed in float32 or wider.

    Raises:
      KeyError: if no leaf matches ``where``. The message suggests paths.
      ValueError: if a matching leaf is not a floating-point matrix or is too small for ``keep``, if
        not exactly one of ``rank`` and ``keep`` is given, or if it is out of range.

    Source: Eckart and Young (1936).
    """
    if (rank is None) == (keep is None):
        raise ValueError(f"give exactly one of rank and keep, got rank={rank}, keep={keep}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    chosen = _matrices(params, where)
    small: list[str] = []

    def replace(path: str, leaf: Any) -> Any:
        if path not in chosen or isinstance(leaf, Kernel) or keep == 1:
            return leaf
        limit = break_even(*leaf.shape[-2:])
        wanted = int(keep * limit) if keep is not None else rank or 0
        if wanted == 0:
            small.append(f"{path} {leaf.shape}")
        if wanted == 0 or wanted >= limit:
            return leaf
        wide = leaf.astype(jnp.float32) if leaf.dtype.itemsize < 4 else leaf
        left, right = _svd(wide, wanted)
        return LowRank(left.astype(leaf.dtype), right.astype(leaf.dtype))

    new = trees.map_with_path(replace, params)
    if small:
        raise ValueError(
            f"keep={keep} leaves less than rank 1 of {listed(small)}; expected a larger keep, "
            "or a pattern (where) that does not match these matrices"
        )
    return new


def encode(params: Any, form: str = "nf4", *, where: str = "kernel$") -> Any:
    """Replaces matrices of a parameter tree by NormalFloat-quantized ones, in one jitted pass.

    Needs no data. `lordjax.materialize` decodes the matrices. See `lordjax.quantize` for a
    low-rank term beside the quantized weights, and for budgets.

    Args:
      params: a pytree of arrays. Matrices are ``[..., in, out]``; leading axes are stacks.
      form: name of the format: ``nf2``, ``nf3``, ``nf4``, ``nf8``, or with block sizes as
        `lordjax.kernels.normal_float.Format.parse` reads them.
      where: regular expression that is searched in the "/"-path of each leaf.

    Returns:
      A new tree of the same structure with `NFQuantized` leaves.

    Raises:
      KeyError: if no leaf matches ``where``. The message suggests paths.
      ValueError: if a matching leaf is not a floating-point matrix, or the format is unknown.

    Source: QLoRA, arXiv 2305.14314; theory/lq_lora §1.
    """
    chosen, parsed = _matrices(params, where), normal_float.Format.parse(form)
    leaves = {p: leaf for p, leaf in trees.flatten(params).items() if p in chosen}
    arrays = {path: leaf for path, leaf in leaves.items() if not isinstance(leaf, Kernel)}
    return trees.update(params, _encode_stack(arrays, parsed))


@functools.partial(jax.jit, static_argnums=1)
def _encode_stack(arrays: dict[str, Any], form: normal_float.Format) -> dict[str, NFQuantized]:
    return {path: NFQuantized.encode(array, form) for path, array in arrays.items()}


def cast(a: Any, dtype: Any) -> np.ndarray:
    """Returns an array on the host in another dtype; integer arrays keep their dtype.

    Overflow gives infinities without a warning. The caller has to check for them.
    """
    a = np.asarray(a)
    with np.errstate(over="ignore"):
        return a if np.issubdtype(a.dtype, np.integer) else a.astype(dtype)


@functools.partial(jax.jit, static_argnames=("form",))
def quantize_jit(kernel: Any, form: normal_float.Format) -> NFQuantized:
    """Quantizes a matrix with `NFQuantized.encode`, compiled once per shape and format."""
    return NFQuantized.encode(kernel, form)


def quantize_pair(pair: LowRank, form: normal_float.Format) -> LowRank:
    """Returns a low-rank matrix with quantized factors, on the host.

    Scale can move freely between the two factors. Before quantization column j of the left factor
    and row j of the right one get equal norms. Of the scalings that were tried this one loses least
    (theory/lord_rom §2.6).
    """
    left, right = (np.asarray(a, np.float32) for a in (pair.left, pair.right))
    lengths = np.linalg.norm(left, axis=-2), np.linalg.norm(right, axis=-1)
    usable = (lengths[0] > 0) & (lengths[1] > 0)
    root = np.sqrt(np.where(usable, lengths[1], 1) / np.where(usable, lengths[0], 1))
    codes = (quantize_jit(a, form) for a in (left * root[..., None, :], right / root[..., None]))
    return LowRank(*jax.device_get(tuple(codes)))


def quantize_pairs(params: Any, form: normal_float.Format) -> Any:
    """Returns parameters with quantized factors in place of those of every `LowRank` kernel."""
    return jax.tree.map(
        lambda leaf: quantize_pair(leaf, form) if isinstance(leaf, LowRank) else leaf,
        params,
        is_leaf=is_kernel,
    )
