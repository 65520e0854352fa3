"""Low-rank pairs that a model had before it is quantized; their products are not formed."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax

from lordjax.compression.quantized_matrix import dense_dtype, stored_low_rank
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import is_kernel, nbytes
from lordjax.kernels.convert import quantize_jit
from lordjax.kernels.low_rank import LowRank
from lordjax.models.source import Source

FORMAT = "nf8"  # of the pairs' factors, for methods that name no format


def is_plain_pair(leaf: Any) -> bool:
    """Returns whether a parameter is a low-rank matrix whose factors are not quantized."""
    return isinstance(leaf, LowRank) and not is_kernel(leaf.left) and not is_kernel(leaf.right)


def pair_format(factors: str | None, default: str | None) -> normal_float.Format | None:
    """Returns the format in which pairs are stored; None: they are not quantized.

    Args:
      factors: the format that was asked for, ``dense``, or None.
      default: the method's own format of low-rank factors; None: it names none.
    """
    name = factors or default or FORMAT
    return None if name == "dense" else normal_float.Format.parse(name)


@dataclasses.dataclass(frozen=True)
class KeptPairs:
    """The low-rank pairs of a model, as a quantized model stores them.

    Attributes:
      source: the model with its pairs.
      form: format of their factors; None: arrays of ``dtype``.
      dtype: dtype of factors that are not quantized; None: float16.
    """

    source: Source
    form: normal_float.Format | None
    dtype: Any | None

    def stored(self, i: int) -> dict[str, LowRank]:
        """Returns path inside the block -> pair as it is stored, of block ``i``."""
        flat = trees.flatten(self.source.block(i)).items()
        return {
            path: stored_low_rank(pair.left, pair.right, self.dtype, self.form)
            for path, pair in flat
            if is_plain_pair(pair)
        }

    def sizes(self, path: str, pair: LowRank) -> dict[str, Any]:
        """Returns path -> bytes, for every array that a pair is stored as.

        Bytes are given as the shape of an array of bytes.

        Args:
          path: path of the pair.
          pair: its factors, or their shapes.
        """
        return {
            f"{path}/{name}/{number}": jax.ShapeDtypeStruct((size,), "uint8")
            for name, factor in (("left", pair.left), ("right", pair.right))
            for number, size in enumerate(self._bytes(factor.shape))
        }

    def _bytes(self, shape: tuple[int, ...]) -> list[int]:
        """Returns the bytes of every array that a factor is stored as."""
        if self.form is None:
            return [math.prod(shape) * dense_dtype(self.dtype).itemsize]
        factor = jax.ShapeDtypeStruct(shape, "float32")
        made = jax.eval_shape(functools.partial(quantize_jit, form=self.form), factor)
        return [nbytes(array) for array in jax.tree.leaves(made)]
