"""Low-rank adapters that are trained beside frozen weights and merged afterwards (LoRA, QLoRA).

An adapter is the low-rank term of a `LowRankPlusQuantized` kernel. The base, a matrix or a kernel
of any kind, is frozen. We do not store LoRA's scale ``alpha / rank``. Adam's step size does not
depend on the gradient's scale, so scaling the low-rank term by s is equivalent to scaling both
factors, and their learning rate, by √s.

Source: LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lordjax.kernels import convert, trees
from lordjax.kernels.base import is_kernel, materialize
from lordjax.kernels.kinds import weights
from lordjax.kernels.layout import Layout, Rearranged
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import LowRankPlusQuantized
from lordjax.names import is_block_linear

BLOCK_KERNELS = r"layer_\d+/.*/kernel$"  # linear layers of the blocks of our own models


def add_adapters(
    params: Any,
    *,
    rank: int,
    key: Array,
    scale: float = 1.0,
    where: str | None = None,
    sites: Mapping[str, Any] | None = None,
) -> Any:
    """Adds a low-rank adapter to each chosen matrix.

    The right factor is 0, so the model's outputs do not change before training.

    Args:
      params: nested dict of matrices ``[..., in, out]`` or kernels of any kind; with ``sites`` the
        parameters of any function, compressed or not.
      rank: rank of the adapters.
      key: random key for the left factors, uniform within ``± sqrt(scale / in)`` as in PEFT.
      scale: LoRA's ``alpha / rank``.
      where: regular expression searched in the path of a matrix; None: the linear layers of the
        blocks, or all of ``sites``.
      sites: the table of `lordjax.find_sites`, which says what the inputs of a parameter are where
        it is not ``[..., in, out]``.

    Returns:
      A tree with `LowRankPlusQuantized` kernels at the chosen paths and adapters in float32. A
      kernel that already has a low-rank term stays as it is.

    Raises:
      KeyError: if no parameter matches; suggests paths.
      ValueError: if the rank is below 1 or above the smaller side of a matrix, or a parameter has
        another shape than in ``sites``.

    Source: LoRA, arXiv 2106.09685.
    """
    leaves = trees.flatten(params)
    known = leaves if sites is None else [p for p in leaves if p in sites and not sites[p].reason]
    chosen = trees.select(known, where or (BLOCK_KERNELS if sites is None else ""))
    keys = dict(zip(chosen, jax.random.split(key, len(chosen)), strict=True))

    def replace(path: str, leaf: Any) -> Any:
        if path not in keys:
            return leaf
        layout = None if sites is None else sites[path].layout
        return _with_adapter(path, leaf, layout, rank, scale, keys[path])

    return trees.map_with_path(replace, params)


def _with_adapter(
    path: str, leaf: Any, layout: Layout | None, rank: int, scale: float, key: Array
) -> Any:
    """Returns a matrix with an adapter; for a function, in the shape and dtype that it expects."""
    if isinstance(leaf, LowRankPlusQuantized):
        return leaf
    if isinstance(leaf, Rearranged):
        inner = _with_adapter(path, leaf.kernel, None, rank, scale, key)
        return leaf.replace(kernel=inner, leaf_dtype=leaf.dtype.name)
    if layout is not None and not is_kernel(leaf):
        matrix = leaf if layout.plain else _matrix(path, leaf, layout)
        inner = _with_adapter(path, matrix, None, rank, scale, key)
        same = layout.plain and inner.dtype == leaf.dtype
        return inner if same else Rearranged(inner, layout, leaf.dtype.name)
    *lead, fan_in, fan_out = leaf.shape
    if not 1 <= rank <= min(fan_in, fan_out):
        raise ValueError(
            f"{path} {list(leaf.shape)}: adapter rank {rank}; expected 1 to "
            f"{min(fan_in, fan_out)}, the smaller side of the matrix"
        )
    bound = math.sqrt(scale / fan_in)
    left = jax.random.uniform(key, (*lead, fan_in, rank), minval=-bound, maxval=bound)
    return LowRankPlusQuantized(leaf, LowRank(left, jnp.zeros((*lead, rank, fan_out))))


def _matrix(path: str, leaf: Array, layout: Layout) -> Array:
    """Returns the matrices of a parameter; raises ValueError if it has another shape."""
    if leaf.shape[leaf.ndim - len(layout.shape) :] != layout.shape:
        raise ValueError(
            f"{path} {list(leaf.shape)}: expected {list(layout.shape)} as in sites; leave it out "
            "(where), or give the sites of the function as it is now"
        )
    return layout.to_matrix(leaf)


def quantize_bases(params: Any, form: str) -> Any:
    """Quantizes the matrices of the blocks to a NormalFloat format.

    Both factors of a low-rank kernel are quantized. Weights that are quantized already stay as
    they are.

    Args:
      params: nested dict of a model's parameters.
      form: name of the format; see `kernels.convert.encode`.

    Returns:
      The tree with quantized block matrices.

    Raises:
      ValueError: if the format is unknown.
    """
    flat = {p: leaf for p, leaf in trees.flatten(params).items() if is_block_linear(p)}
    plain: dict[str, Any] = {p: leaf for p, leaf in flat.items() if not is_kernel(leaf)}
    for path, leaf in flat.items():
        if isinstance(leaf, LowRank):
            plain |= {f"{path}/{name}": getattr(leaf, name) for name in ("left", "right")}
    quantized = convert.encode(plain, form, where="") if plain else {}
    new = {path: quantized[path] for path, leaf in flat.items() if not is_kernel(leaf)}
    for path, leaf in flat.items():
        if isinstance(leaf, LowRank):
            new[path] = LowRank(quantized[f"{path}/left"], quantized[f"{path}/right"])
    return trees.update(params, new)


def merge(params: Any) -> Any:
    """Merges adapters into their bases where that loses nothing.

    A dense base becomes the sum of base and adapter. A low-rank base becomes a low-rank kernel of
    the summed rank, or a dense matrix where that is smaller. A quantized base keeps its adapter;
    `kernels.base.materialize` gives the dense sum.

    Args:
      params: nested dict; leaves may be kernels of any kind.

    Returns:
      The tree with merged kernels.
    """
    return trees.map_with_path(lambda path, leaf: _merged(leaf), params)


def _merged(leaf: Any) -> Any:
    if isinstance(leaf, Rearranged):
        inner = _merged(leaf.kernel)
        same = leaf.replace(kernel=inner)
        return same if is_kernel(inner) or inner is leaf.kernel else same.materialize()
    if not isinstance(leaf, LowRankPlusQuantized):
        return leaf
    base, adapter = leaf.base, leaf.low_rank
    if not is_kernel(base):
        wide = base.astype(jnp.float32) + materialize(adapter).astype(jnp.float32)
        return wide.astype(base.dtype)
    if isinstance(base, LowRank) and not any(map(is_kernel, (base.left, base.right))):
        dtype = base.dtype
        left = jnp.concatenate([base.left, adapter.left.astype(dtype)], axis=-1)
        right = jnp.concatenate([base.right, adapter.right.astype(dtype)], axis=-2)
        pair = LowRank(left, right)
        return pair if weights(pair) < math.prod(pair.shape) else pair.materialize()
    return leaf


def trainable(params: Any, patterns: tuple[str, ...]) -> list[str]:
    """Returns the paths of the arrays (`trees.arrays`) that match one of several patterns.

    Quantized weights, their scales and integer arrays are never trained, whatever matches them.

    Args:
      params: nested dict; leaves may be kernels of any kind.
      patterns: regular expressions searched in the paths.

    Returns:
      The matching paths, in the order of the arrays.

    Raises:
      KeyError: if a pattern matches no array that can be trained; suggests paths.
    """
    codes = r"/(codes|scales|supers|offset)$"
    able = [
        path
        for path, a in trees.arrays(params).items()
        if jnp.issubdtype(a.dtype, jnp.floating) and not re.search(codes, path)
    ]
    found = {path for pattern in patterns for path in trees.select(able, pattern)}
    return [path for path in able if path in found]
