"""Errors and times of products with quantized matrices, as lines of the benchmark of a GPU."""

from __future__ import annotations

from lordjax.scripts.benchmarks.gpu import kernels
from lordjax.scripts.benchmarks.gpu.lines import Line, Row, median_seconds, row
from lordjax.scripts.benchmarks.gpu.sizes import Sizes

# Largest relative error: rounding of the inputs and of the decoded weights to the dtype.
LIMITS = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-3}
ROWS = (1, 32, 256)  # a kernel for one row, for few rows, and for many


def machine(sizes: Sizes) -> Line:
    """Returns the line that measures the memory's bandwidth and the speed of dense products."""

    def run(seconds: float) -> list[Row]:
        import jax
        import jax.numpy as jnp

        found = [row("bandwidth of a copy", kernels.bandwidth(sizes.copied) / 1e9, "GB/s")]
        side = sizes.products[0][0]
        with jax.enable_x64(True):
            for dtype in ("bfloat16", "float32", "float64"):
                a = jnp.ones((side, side), dtype)
                multiply = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
                took = median_seconds(lambda multiply=multiply, a=a: multiply(a))
                found.append(row(f"{dtype} product, {side}", 2e-12 * side**3 / took, "TFLOP/s"))
            eigh = jax.jit(jnp.linalg.eigh)
            for dtype in ("float32", "float64"):
                a = jnp.eye(side, dtype=dtype) + jnp.asarray(1 / side, dtype)
                took = median_seconds(lambda a=a: eigh(a), 1)
                found.append(row(f"{dtype} eigh, {side}", took, "s"))
        return found

    return Line("machine", 30, run)


def correctness(sizes: Sizes, interpret: bool) -> Line:
    """Returns the line that compares every kernel with float32; one wrong kernel is an error.

    Args:
      sizes: the shapes.
      interpret: whether the kernel is interpreted, which any device can do.
    """
    cases = [("nf4", "bfloat16", True), ("nf3", "bfloat16", True)]
    cases += [("nf2", "bfloat16", False), ("nf8", "bfloat16", False)]
    cases += [("nf4", "float16", False), ("nf4", "float32", False)]

    def run(seconds: float) -> list[Row]:
        found = []
        for form, dtype, every in cases:
            # Interpreting a kernel takes as long as compiling it, and a tile changes nothing else.
            errors = _errors(sizes, form, dtype, every and not interpret, interpret)
            worst = max(errors, key=lambda name: errors[name])
            note = f"{len(errors)} kernels; limit {LIMITS[dtype]:.0e}"
            found.append(row(f"{form}, {dtype}", errors[worst], "relative error", note))
            if not errors[worst] < LIMITS[dtype]:
                raise ValueError(
                    f"{form} in {dtype}: {worst} has a relative error of {errors[worst]:.2e}; "
                    f"expected less than {LIMITS[dtype]:.0e}"
                )
        return found

    return Line("correctness", 75, run)


def _errors(sizes: Sizes, form: str, dtype: str, every: bool, interpret: bool) -> dict[str, float]:
    """Relative errors of the kernel by tile and rows; ``every`` tile or the default one."""
    import jax.numpy as jnp

    from lordjax.kernels import nf_gpu, nf_gpu_autotune
    from lordjax.kernels.base import materialize

    found = {}
    for rows in ROWS[:1] if interpret else ROWS:
        x, quantized, low_rank = kernels.operands(sizes.check, rows, form, sizes.rank, dtype)
        whole = materialize(quantized) + materialize(low_rank).astype(jnp.float32)
        exact = jnp.matmul(x.astype(jnp.float32), whole, precision="highest")
        tiles = nf_gpu_autotune.candidates(rows) if every else [nf_gpu.default_tile(rows)]
        for tile in tiles:
            y = nf_gpu.matmul(x, quantized, low_rank, tile=tile, interpret=interpret)
            error = jnp.linalg.norm(y.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
            found[f"{rows} rows, {tile}"] = float(error)
    return found


def product(sizes: Sizes, shape: tuple[int, int], rows: int, rank: int) -> Line:
    """Returns the line of one product: dense, decoded by XLA, and by the kernel.

    Args:
      sizes: the shapes.
      shape: ``(in, out)`` of the matrix.
      rows: rows of the activations.
      rank: rank of a low-rank term; 0: none.
    """

    def run(seconds: float) -> list[Row]:
        speed = kernels.bandwidth(sizes.copied)
        ways = kernels.measure(shape, rows, "nf4", rank, "bfloat16", interpret=False)
        return [
            row(
                way["product"],
                1e6 * way["seconds"],
                "µs",
                f"{way['bytes'] / way['seconds'] / speed:.0%} of the bandwidth, "
                f"{ways[0]['seconds'] / way['seconds']:.2f} x dense",
            )
            for way in ways
        ]

    what = f"NF4 + rank {rank}" if rank else "NF4"
    return Line(f"{what} product, {shape[0]} x {shape[1]}, {rows} rows", 35, run)
