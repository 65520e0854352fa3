"""Models and shapes that the benchmark of a GPU measures; random weights, made on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lordjax.kernels import trees
from lordjax.models.config import ModelConfig
from lordjax.models.transformer import parameter_shapes

SCALE = 0.02  # standard deviation of random weights


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: shapes of released models, or toy shapes for a dry run.

    Attributes:
      llama: Llama-2-7B.
      starcoder: StarCoder-16B.
      products: shapes ``(in, out)`` of single products.
      check: shape of the products whose errors are checked.
      batches: batch sizes of decoding.
      sequences: calibration sequences.
      length: tokens of a sequence.
      blocks: number of blocks that are fine-tuned.
      rank: rank of a low-rank term.
      copied: bytes of the array that is copied to measure the memory's bandwidth.
    """

    llama: ModelConfig
    starcoder: ModelConfig
    products: tuple[tuple[int, int], ...]
    check: tuple[int, int]
    batches: tuple[int, int]
    sequences: int
    length: int
    blocks: int
    rank: int
    copied: int


def released() -> Sizes:
    """Returns the shapes of the released models."""
    products = ((4096, 11008), (11008, 4096), (4096, 4096))
    models = _config("llama-2-7b"), _config("starcoder-16b")
    return Sizes(*models, products, (1024, 1024), (1, 32), 128, 2048, 8, 64, 2**30)


def toy() -> Sizes:
    """Returns shapes that a CPU computes in seconds."""
    models = (
        _config("llama-2-7b", layers=2, shrink=32, vocabulary=128),
        _config("starcoder-16b", layers=2, shrink=48, vocabulary=128),
    )
    return Sizes(*models, ((64, 32),), (64, 32), (1, 2), 4, 16, 2, 8, 2**20)


def _config(like: str, **changes: Any) -> ModelConfig:
    from lordjax.conversions.families.registry import model_config
    from lordjax.scripts.make_checkpoint import config_like

    return model_config(config_like(like, **changes))


@dataclasses.dataclass(frozen=True)
class RandomSource:
    """A model whose blocks are random bfloat16 numbers, made on the device when they are read.

    Attributes:
      config: the architecture.
      seed: seed of the numbers.
    """

    config: ModelConfig
    seed: int = 0

    def block(self, i: int) -> dict[str, Any]:
        """Returns the parameters of block ``i``."""
        return self._random(i, parameter_shapes(self.config)[1])

    def non_block_params(self) -> dict[str, Any]:
        """Returns the parameters outside the blocks."""
        return self._random(self.config.num_layers, parameter_shapes(self.config)[0])

    def _random(self, number: int, shapes: Mapping[str, Any]) -> dict[str, Any]:
        stored = {path: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16) for path, s in shapes.items()}
        return trees.unflatten(random_arrays(stored, self.seed + number))


def random_arrays(shapes: Any, seed: int) -> Any:
    """Returns random arrays in place of shapes: codes of all bits, and small numbers elsewhere.

    Args:
      shapes: a tree of shapes; kernels are trees, too.
      seed: seed of the numbers.
    """
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [_random(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, made)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        if len(shape) == 1:  # scales of norms
            return jnp.ones(shape, dtype)
        return (SCALE * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return jax.random.bits(key, shape, dtype)
