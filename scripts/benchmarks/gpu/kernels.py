"""Benchmark of products with quantized matrices: time, memory throughput and error.

Run::

    python -m lordjax.scripts.benchmarks.gpu.kernels                    on a GPU or a CPU
    python -m lordjax.scripts.benchmarks.gpu.kernels --interpret        the GPU kernel, small shapes

For every shape and number of rows it measures the dense product, XLA's product with the whole
dequantized matrix and, on a CPU, the product in tiles or, on a GPU, the kernel with its fastest
tile. The columns are:

* the time of one product, in microseconds;
* memory throughput: bytes that must be read and written per second, relative to the rate of a copy
  of a much larger array. A matrix that fits into a cache can exceed 100 %;
* the error: norm of the difference from the product with the materialized matrix in float32,
  relative to the norm of that product.

With ``--interpret`` the times do not predict those of a GPU.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import click

LLAMA_2_7B = "4096x4096,4096x11008,11008x4096"
SMALL = "128x96,96x128"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--shapes",
    help="Matrix shapes INxOUT, separated by commas.  "
    f"[default: {LLAMA_2_7B}; with --interpret: {SMALL}]",
)
@click.option(
    "--rows",
    help="Numbers of rows of the activations, separated by commas.  "
    "[default: 1,32,1024; with --interpret: 1,20]",
)
@click.option(
    "--format", "form", default="nf4", show_default=True, help="Format of the quantized matrix."
)
@click.option(
    "--rank",
    default=0,
    show_default=True,
    help="Rank of a low-rank term that is added to the quantized matrix; 0: none.",
)
@click.option(
    "--dtype", default="bfloat16", show_default=True, help="Dtype of activations and dense matrix."
)
@click.option(
    "--interpret", is_flag=True, help="Interpret the GPU kernel on a machine without a GPU."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(
    shapes: str | None,
    rows: str | None,
    form: str,
    rank: int,
    dtype: str,
    interpret: bool,
    as_json: bool,
) -> None:
    """Measures time and error of products with quantized matrices."""
    from lordjax.scripts.benchmarks.protocol import environment

    pairs = _numbers(shapes or (SMALL if interpret else LLAMA_2_7B))
    counts = [count for (count,) in _numbers(rows or ("1,20" if interpret else "1,32,1024"))]
    speed = bandwidth(2**22 if interpret else 2**29)
    facts = {**environment(), "format": form, "rank": rank, "dtype": dtype, "interpret": interpret}
    facts["copied_gb_per_second"] = round(speed / 1e9, 1)
    found = [
        row
        for shape in pairs
        for count in counts
        for row in measure(shape, count, form, rank, dtype, interpret)
    ]
    found = [{**row, "share": row["bytes"] / row["seconds"] / speed} for row in found]
    if as_json:
        click.echo(json.dumps({"products": found, "environment": facts}, indent=1))
        return
    click.echo(json.dumps(facts) + "\n")
    click.echo("| in x out | rows | product | µs | of memory's speed | error |")
    click.echo("|---|---|---|---|---|---|")
    for row in found:
        cells = (row["shape"], row["rows"], row["product"], f"{1e6 * row['seconds']:.1f}")
        cells = (*cells, f"{100 * row['share']:.0f} %", f"{row['error']:.1e}")
        click.echo(f"| {' | '.join(map(str, cells))} |")


def _numbers(text: str) -> list[tuple[int, ...]]:
    """Parses ``1x2,3x4`` into ``[(1, 2), (3, 4)]``."""
    try:
        return [tuple(int(number) for number in part.split("x")) for part in text.split(",")]
    except ValueError as error:
        raise click.ClickException(
            f"--shapes or --rows is {text!r}; expected shapes such as 128x96,96x128, or numbers of "
            "rows such as 1,32"
        ) from error


def bandwidth(size: int) -> float:
    """Measures the bytes read and written per second while an array of ``size`` bytes is copied."""
    import jax.numpy as jnp

    from lordjax.kernels.nf_gpu_autotune import time_per_call

    x = jnp.zeros(size // 4, jnp.float32)
    return 2 * size / time_per_call(lambda x, one: x + one, x, [jnp.float32(1)])


def measure(
    shape: tuple[int, ...], rows: int, form: str, rank: int, dtype: str, interpret: bool
) -> list[dict[str, Any]]:
    """Measures every way to compute one product; returns a row per way.

    Activations ``[rows, in]`` are multiplied with a matrix of shape ``(in, out)`` in format
    ``form``, to which a low-rank term of rank ``rank`` is added.
    """
    import jax
    import jax.numpy as jnp

    from lordjax.kernels import nf_gpu, nf_gpu_autotune
    from lordjax.kernels.base import materialize, nbytes
    from lordjax.kernels.base import matmul as product
    from lordjax.kernels.quantized import LowRankPlusQuantized

    x, quantized, low_rank = operands(shape, rows, form, rank, dtype)
    w = materialize(quantized)
    w = w if low_rank is None else w + materialize(low_rank).astype(w.dtype)
    exact = jnp.matmul(x.astype(w.dtype), w, precision="highest")
    dense = w.astype(dtype)

    moved = x.nbytes + rows * shape[1] * x.dtype.itemsize
    packed = nbytes((quantized, low_rank)) + moved
    copies = [dense] if interpret else [dense + i for i in range(4)]
    time = nf_gpu_autotune.time_per_call(jnp.matmul, x, copies)
    ways = [("dense", time, dense.nbytes + moved, x @ dense)]
    if interpret or jax.default_backend() == "gpu":
        times = nf_gpu_autotune.time_tiles(
            nf_gpu_autotune.Case.for_operands(x, quantized, low_rank), interpret
        )
        ways.append(("XLA", times.pop(None), packed, nf_gpu.decoded(x, quantized, low_rank)))
        tile = min(times, key=lambda tile: times[tile])
        y = nf_gpu.matmul(x, quantized, low_rank, tile=tile, interpret=interpret)
        ways.append((str(tile), times[tile], packed, y))
    else:
        kernel = quantized if low_rank is None else LowRankPlusQuantized(quantized, low_rank)
        whole = functools.partial(_whole, low_rank)
        for name, way, operand in (("whole", whole, quantized), ("in tiles", product, kernel)):
            time = nf_gpu_autotune.time_per_call(way, x, [operand])
            ways.append((name, time, packed, way(x, operand)))
    return [
        {
            "shape": "x".join(map(str, shape)),
            "rows": rows,
            "product": name,
            "seconds": seconds,
            "bytes": size,
            "error": float(jnp.linalg.norm(y.astype(w.dtype) - exact) / jnp.linalg.norm(exact)),
        }
        for name, seconds, size, y in ways
    ]


def operands(
    shape: tuple[int, ...], rows: int, form: str, rank: int, dtype: str
) -> tuple[Any, Any, Any]:
    """Returns random activations, a quantized matrix, and its low-rank term or None."""
    import jax

    from lordjax.kernels import normal_float
    from lordjax.kernels.low_rank import LowRank
    from lordjax.kernels.quantized import NFQuantized

    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (rows, shape[0]), dtype)
    matrix = jax.random.normal(keys[1], shape)
    quantized = NFQuantized.encode(matrix, normal_float.Format.parse(form))
    if not rank:
        return x, quantized, None
    factors = [(keys[2], (shape[0], rank)), (keys[3], (rank, shape[1]))]
    low_rank = LowRank(*(jax.random.normal(key, size, dtype) for key, size in factors))
    return x, quantized, low_rank


def _whole(low_rank: Any, x: Any, quantized: Any) -> Any:
    """Computes the product with the whole dequantized matrix."""
    from lordjax.kernels import nf_gpu

    return nf_gpu.decoded(x, quantized, low_rank)


if __name__ == "__main__":
    main()
