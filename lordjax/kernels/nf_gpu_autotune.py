"""Autotuning of quantized matrix products on GPU.

Each shape is timed once per process, with random codes, when it is first traced. The candidates are
XLA's product with the decoded matrix, and the kernel of `nf_gpu` with several tiles. XLA's product
is used without timing if there is no GPU, or if there are several devices, because XLA cannot
partition the kernel.
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
from lordjax.runtime import target, xla_scheduling

MARGIN = 1.05  # required speed-up of the kernel; times vary by less from run to run
ROWS = 4096  # largest number of rows of x that is timed; time is proportional beyond
COPIES, BYTES = 8, 2**27  # matrices used in turn, so that a cache does not hold them
ROUNDS, REPEATS = 3, 10  # the fastest of ROUNDS is taken, each the mean of REPEATS runs


def product(x: Array, quantized: Any, low_rank: Any = None) -> Array | None:
    """Returns ``x @ quantized + x @ low_rank`` by the kernel if it is faster here, else None.

    Args:
      x: inputs ``[..., in]``, an array or a tracer.
      quantized: the matrix, an `NFQuantized`.
      low_rank: the low-rank term, a `LowRank`, or None.
    """
    if target.platform() != "gpu" or target.device_count() > 1:
        return None
    if nf_gpu.unsupported(x, quantized, low_rank):
        return None
    case = Case.for_operands(x, quantized, low_rank)
    # A GPU that is not here cannot be timed.
    tile = nf_gpu.default_tile(case.rows) if target.is_absent() else fastest(case)
    if tile is None:
        return None
    return nf_gpu.matmul(x, quantized, low_rank, tile=tile)


@dataclasses.dataclass(frozen=True)
class Case:
    """A class of products that take equally long.

    Attributes:
      rows: number of rows of x, rounded up to a power of 2, at most `ROWS`.
      dtype: dtype of x.
      tree: tree structure of the pair (quantized matrix, low-rank term or None).
      leaves: shapes and dtypes of the arrays in this pair.
    """

    rows: int
    dtype: str
    tree: Any
    leaves: tuple[tuple[tuple[int, ...], str], ...]

    @classmethod
    def for_operands(cls, x: Any, quantized: Any, low_rank: Any) -> Case:
        """Returns the case of a product."""
        leaves, tree = jax.tree.flatten((quantized, low_rank))
        rows = min(ROWS, 2 ** (math.prod(x.shape[:-1]) - 1).bit_length())
        return cls(rows, x.dtype.name, tree, tuple((y.shape, y.dtype.name) for y in leaves))

    def operands(self, seed: int) -> Any:
        """Returns a random pair (quantized matrix, low-rank term or None) of this case."""
        rng = np.random.default_rng(seed)

        def leaf(shape: tuple[int, ...], dtype: str) -> Array:
            if dtype == "uint32":
                return jnp.asarray(rng.integers(0, 2**32, shape, np.uint32))
            return jnp.asarray(rng.random(shape, np.float32), dtype)

        return self.tree.unflatten([leaf(*y) for y in self.leaves])


def candidates(rows: int) -> list[Tile]:
    """Returns the tiles that may be the fastest for a number of rows of x."""
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
    """Returns the tile with which the kernel beats XLA's product on this GPU, or None."""
    # JAX may be tracing the product in this thread, so timing runs in another one.
    with futures.ThreadPoolExecutor(1) as other:
        times = other.submit(time_tiles, case).result()
    limit = times.pop(None, 0.0) / MARGIN
    best = min(times, key=lambda tile: times[tile], default=None)
    return best if best is not None and times[best] < limit else None


def time_tiles(case: Case, interpret: bool = False) -> dict[Tile | None, float]:
    """Returns the seconds of a product per tile of the kernel, and for None those of XLA's product.

    Warns about a candidate that fails, and leaves it out.
    """
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
            what = "XLA's product" if tile is None else f"the GPU kernel with {tile}"
            warnings.warn(f"{what} failed and is not used for {case}: {error}", stacklevel=2)
    return times


def _one(tile: Tile | None, interpret: bool, x: Array, operands: Any) -> Array:
    if tile is None:
        return nf_gpu.decoded(x, *operands)
    return nf_gpu.matmul(x, *operands, tile=tile, interpret=interpret)


def time_per_call(fn: Callable[[Array, Any], Array], x: Array, operands: list[Any]) -> float:
    """Returns the seconds of one ``fn(x, operand)``.

    A program calls it once per operand; the best of `ROUNDS` means is taken.
    """

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
