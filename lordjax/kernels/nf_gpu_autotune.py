"""Which way a quantised product is computed: the GPU kernel where it was measured to be faster.

Every shape is timed once per process, on random codes, when it is first traced: XLA's product with
the decoded matrix against the kernel (`nf_pallas`) with each of a few tiles. Without a GPU nothing
is timed, and XLA's product is taken; so it is with several devices, since XLA cannot divide a
kernel among them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lordjax.kernels import nf_gpu
from lordjax.kernels.nf_gpu import Tile
from lordjax.runtime import xla_scheduling

MARGIN = 1.05  # the kernel must be faster by more than times differ from run to run
ROWS = 4096  # of x at most: more take longer in proportion
COPIES, BYTES = 8, 2**27  # matrices that take turns, so that a cache does not hold them
ROUNDS, REPEATS = 3, 10  # the best of rounds, each of repeated runs


def product(x: Array, quantized: Any, low_rank: Any = None) -> Array | None:
    """``x @ quantized + x @ low_rank`` by the kernel if that is faster here, else None.

    Args:
      x: ``[..., in]``, a tracer or an array.
      quantized: `kernels.NFQuantized`.
      low_rank: `kernels.LowRank` or None.
    """
    if jax.default_backend() != "gpu" or jax.device_count() > 1:
        return None
    if nf_gpu.unsupported(x, quantized, low_rank):
        return None
    tile = fastest(Case.for_operands(x, quantized, low_rank))
    if tile is None:
        return None
    return nf_gpu.matmul(x, quantized, low_rank, tile=tile)


@dataclasses.dataclass(frozen=True)
class Case:
    """Products that take equally long.

    Attributes:
      rows: of x, rounded up to a power of 2, at most `ROWS`.
      dtype: of x.
      tree: structure of (quantised matrix, low-rank product or None).
      leaves: their shapes and dtypes.
    """

    rows: int
    dtype: str
    tree: Any
    leaves: tuple[tuple[tuple[int, ...], str], ...]

    @classmethod
    def for_operands(cls, x: Any, quantized: Any, low_rank: Any) -> Case:
        """The case of a product."""
        leaves, tree = jax.tree.flatten((quantized, low_rank))
        rows = min(ROWS, 2 ** (math.prod(x.shape[:-1]) - 1).bit_length())
        return cls(rows, x.dtype.name, tree, tuple((y.shape, y.dtype.name) for y in leaves))

    def operands(self, seed: int) -> Any:
        """A random (quantised matrix, low-rank product or None) of this case."""
        rng = np.random.default_rng(seed)

        def leaf(shape: tuple[int, ...], dtype: str) -> Array:
            if dtype == "uint32":
                return jnp.asarray(rng.integers(0, 2**32, shape, np.uint32))
            return jnp.asarray(rng.random(shape, np.float32), dtype)

        return self.tree.unflatten([leaf(*y) for y in self.leaves])


def candidates(rows: int) -> list[Tile]:
    """Tiles that may be the fastest for a number of rows of x."""
    tiles = []
    if rows <= 4:
        tiles += [Tile(1, 16), Tile(1, 16, splits=4), Tile(1, 32, splits=4)]
        tiles += [Tile(1, 16, splits=4, gather=False)]
    if rows <= 64:
        least = max(nf_gpu.LEAST, 2 ** (rows - 1).bit_length())
        tiles += [Tile(least, 32, stages=1), Tile(least, 32, gather=False)]
        tiles += [Tile(least, 64, splits=4, gather=False), Tile(least, 32, splits=4, stages=1)]
    if rows > 32:
        tiles += [Tile(64, 64, 16, gather=False), Tile(64, 128, 16, stages=1, warps=8)]
        tiles += [Tile(128, 64, 16, gather=False, warps=8)]
    return tiles


@functools.cache
def fastest(case: Case) -> Tile | None:
    """The tile of the kernel that beats XLA's product on this machine's GPU, or None."""
    # The product itself may be under trace, which is a state of the thread.
    with futures.ThreadPoolExecutor(1) as other:
        times = other.submit(time_tiles, case).result()
    limit = times.pop(None, 0.0) / MARGIN
    best = min(times, key=lambda tile: times[tile], default=None)
    return best if best is not None and times[best] < limit else None


def time_tiles(case: Case, interpret: bool = False) -> dict[Tile | None, float]:
    """Seconds of a product, per tile of the kernel; None is XLA's. What fails is warned of."""
    copies = [case.operands(0)]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(copies))
    copies += [case.operands(i) for i in range(1, min(COPIES, math.ceil(BYTES / size)))]
    fan_in = copies[0][0].shape[0]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(case.rows, fan_in)), case.dtype)
    times: dict[Tile | None, float] = {}
    for tile in (None, *candidates(case.rows)):
        try:
            times[tile] = time_per_call(functools.partial(_one, tile, interpret), x, copies)
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            what = "XLA's product" if tile is None else f"the kernel with {tile}"
            warnings.warn(f"{what} is not used for {case}: {error}", stacklevel=2)
    return times


def _one(tile: Tile | None, interpret: bool, x: Array, operands: Any) -> Array:
    if tile is None:
        return nf_gpu.decoded(x, *operands)
    return nf_gpu.matmul(x, *operands, tile=tile, interpret=interpret)


def time_per_call(fn: Callable[[Array, Any], Array], x: Array, operands: list[Any]) -> float:
    """Of one ``fn(x, operand)``: best mean of a program that calls it once per operand."""

    @jax.jit
    def chain(x: Array, operands: list[Any]) -> list[Array]:
        found = []
        for operand in operands:
            found.append(fn(x, operand))
            x = xla_scheduling.tie(x, found[-1])
        return found

    program = chain.lower(x, operands).compile()
    jax.block_until_ready(program(x, operands))
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(REPEATS):
            last = program(x, operands)
        jax.block_until_ready(last)
        rounds.append((time.perf_counter() - start) / (REPEATS * len(operands)))
    return min(rounds)
