"""What is put beside weights to be trained, and folded into them afterwards (LoRA, QLoRA).

An adapter is the low-rank part of a `LowRankPlusQuantized` kernel; the base, of whatever kind, is
not trained. LoRA's factor ``alpha / rank`` on the product is no part of the kernel: under Adam,
whose steps do not know the size of a gradient, it is the same as a learning rate times its square
root and factors times that, too.

Source: LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lordjax.kernels import convert, trees
from lordjax.kernels.base import is_kernel, materialize
from lordjax.kernels.kinds import weights
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import LowRankPlusQuantized
from lordjax.names import is_block_linear


def add_adapters(
    params: Any, *, rank: int, key: Array, scale: float = 1.0, where: str = r"layer_\d+/.*/kernel$"
) -> Any:
    """Puts a product beside matrices that changes nothing yet: its right factor is 0.

    Args:
      params: nested dict; matrices ``[in, out]`` or kernels of any kind.
      rank: of the products.
      key: draws the left factors, uniform within ``± sqrt(scale / in)``, as in PEFT.
      scale: LoRA's ``alpha / rank``.
      where: regular expression searched in the path of a matrix.

    Returns:
      A tree with `LowRankPlusQuantized` at those paths, the products in float32. A kernel that has
      one already stays as it is.

    Raises:
      KeyError: if no parameter matches; suggests paths.
      ValueError: if the rank is not in 1 … the smaller side of a matrix.
    """
    chosen = trees.select(trees.flatten(params), where)
    keys = dict(zip(chosen, jax.random.split(key, len(chosen)), strict=True))

    def replace(path: str, leaf: Any) -> Any:
        if path not in keys or isinstance(leaf, LowRankPlusQuantized):
            return leaf
        fan_in, fan_out = leaf.shape
        if not 1 <= rank <= min(fan_in, fan_out):
            raise ValueError(f"{path} {leaf.shape}: an adapter of rank {rank} does not fit")
        bound = math.sqrt(scale / fan_in)
        left = jax.random.uniform(keys[path], (fan_in, rank), minval=-bound, maxval=bound)
        return LowRankPlusQuantized(leaf, LowRank(left, jnp.zeros((rank, fan_out))))

    return trees.map_with_path(replace, params)


def encode_bases(params: Any, form: str) -> Any:
    """The blocks' matrices as NormalFloat codes, factors of pairs too; what is codes stays so.

    Args:
      params: nested dict of a model's parameters.
      form: name of the format, see `functional.encode`.

    Raises:
      ValueError: if there is no such format.
    """
    flat = {p: leaf for p, leaf in trees.flatten(params).items() if is_block_linear(p)}
    plain: dict[str, Any] = {p: leaf for p, leaf in flat.items() if not is_kernel(leaf)}
    for path, leaf in flat.items():
        if isinstance(leaf, LowRank):
            plain |= {f"{path}/{name}": getattr(leaf, name) for name in ("left", "right")}
    coded = convert.encode(plain, form, where="") if plain else {}
    new = {path: coded[path] for path, leaf in flat.items() if not is_kernel(leaf)}
    for path, leaf in flat.items():
        if isinstance(leaf, LowRank):
            new[path] = LowRank(coded[f"{path}/left"], coded[f"{path}/right"])
    return trees.update(params, new)


def merge(params: Any) -> Any:
    """Folds products into their bases where that loses nothing.

    A base that is a matrix becomes the sum; a pair of factors becomes a pair of the summed rank, or
    a matrix where that is smaller. Codes keep their product: to multiply it out see
    `kernels.materialize`.
    """
    return trees.map_with_path(lambda path, leaf: _merged(leaf), params)


def _merged(leaf: Any) -> Any:
    if not isinstance(leaf, LowRankPlusQuantized):
        return leaf
    base, product = leaf.base, leaf.low_rank
    if not is_kernel(base):
        wide = base.astype(jnp.float32) + materialize(product).astype(jnp.float32)
        return wide.astype(base.dtype)
    if isinstance(base, LowRank) and not any(map(is_kernel, (base.left, base.right))):
        dtype = base.dtype
        left = jnp.concatenate([base.left, product.left.astype(dtype)], axis=-1)
        right = jnp.concatenate([base.right, product.right.astype(dtype)], axis=-2)
        pair = LowRank(left, right)
        return pair if weights(pair) < math.prod(pair.shape) else pair.materialize()
    return leaf


def trainable(params: Any, patterns: tuple[str, ...]) -> list[str]:
    """Paths of the arrays (`trees.arrays`) that match one of several regular expressions.

    Codes and indices are not trained, whatever matches them.

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
