"""Comparison of LQ-LoRA's published decomposition loop with ours, matrix by matrix.

Run::

    python -m lordjax.scripts.benchmarks.decompose MODEL
    python -m lordjax.scripts.benchmarks.decompose MODEL --shapes llama-2-7b --rank 64

This module implements the published loop in PyTorch (needs ``pip install lordjax[test]``): every
alternation takes a new randomized SVD and quantizes last, and the loop stops at the first increase
of the error. Our loop is `lordjax.methods.quantized.lq.decompose`; it is compiled before it is
timed. Both decompose the same kernels: those of one block of MODEL, or random kernels of other
shapes, whose spectrum is interpolated from that of MODEL's. Errors are relative, in the Frobenius
norm. The factors count with 16 bits per number.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click

from lordjax.runtime import json_files
from lordjax.scripts.benchmarks.protocol import environment, out_option, write_results

OVERSAMPLING = 10
SHAPES = {
    "llama-2-7b": {
        "attention/q/kernel": (4096, 4096),
        "attention/o/kernel": (4096, 4096),
        "mlp/up/kernel": (4096, 11008),
        "mlp/down/kernel": (11008, 4096),
    },
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--layer", default=3, show_default=True, help="Index of the block to decompose.")
@click.option(
    "--shapes",
    type=click.Choice(sorted(SHAPES)),
    help="Model whose matrix shapes are used.  [default: the shapes of MODEL]",
)
@click.option(
    "--formats",
    default="nf4,nf3",
    show_default=True,
    help="Quantization formats, separated by commas.",
)
@click.option("--rank", default=32, show_default=True, help="Rank of the low-rank term.")
@click.option("--steps", default=5, show_default=True, help="Alternations of our loop.")
@click.option(
    "--published-steps",
    default=5,
    show_default=True,
    help="Maximum number of alternations of the published loop.",
)
@click.option(
    "--repeats", default=3, show_default=True, help="Timed runs of each loop; the fastest counts."
)
@out_option
def main(
    model: str,
    layer: int,
    shapes: str | None,
    formats: str,
    rank: int,
    steps: int,
    published_steps: int,
    repeats: int,
    out: str | None,
) -> None:
    """Compares the published loop and ours on the kernels of MODEL."""
    from lordjax.kernels import normal_float
    from lordjax.scripts.opened_model import open_model

    rows = []
    for path, kernel in kernels(open_model(model).source.block(layer), SHAPES.get(shapes or "")):
        for name in formats.split(","):
            row = {"kernel": path, "shape": kernel.shape, "format": name, "rank": rank}
            row |= {"steps": steps, "published_steps": published_steps}
            both = (steps, published_steps)
            row |= measure(kernel, normal_float.Format.parse(name), rank, both, repeats)
            rows.append({**row, "environment": environment()})
            click.echo(json_files.dumps_measured(row))
    write_results(out, rows)
    click.echo(markdown(rows))


def kernels(block: Any, shapes: dict[str, tuple[int, int]] | None) -> Iterator[tuple[str, Any]]:
    """Yields paths and kernels of a block, or random kernels with its interpolated spectra.

    Args:
      block: parameters of the block.
      shapes: shapes ``(in, out)`` of the random kernels by path; None takes the block's kernels.
    """
    import numpy as np

    from lordjax.kernels import trees
    from lordjax.models.sites import LINEAR_SITES

    flat = trees.flatten(block)
    own = [site.path for site in LINEAR_SITES if site.path in flat]
    for path in own if shapes is None else shapes:
        kernel = np.asarray(flat[path], np.float32)
        yield path, kernel if shapes is None else stretched(kernel, shapes[path])


def stretched(kernel: Any, shape: tuple[int, int], seed: int = 0) -> Any:
    """Draws a random matrix whose spectrum is interpolated from that of another matrix.

    Args:
      kernel: matrix that gives the spectrum, as a function of relative index.
      shape: shape of the new matrix.
      seed: seed of the singular vectors.
    """
    import numpy as np

    rng, count = np.random.default_rng(seed), min(shape)
    values = np.linalg.svd(kernel, compute_uv=False)
    places = np.linspace(0, len(values) - 1, count)
    spectrum = np.interp(places, np.arange(len(values)), values)
    draws = (rng.standard_normal((n, count), np.float32) for n in shape)
    left, right = (np.linalg.qr(draw)[0] for draw in draws)
    return (left * spectrum.astype(np.float32)) @ right.T


def measure(
    kernel: Any, form: Any, rank: int, steps: tuple[int, int], repeats: int
) -> dict[str, Any]:
    """Measures one kernel: errors of quantization alone and of both loops, and their seconds.

    Args:
      kernel: float32 matrix ``[in, out]``.
      form: quantization format.
      rank: rank of the low-rank term.
      steps: alternations of our loop, and maximum of the published loop.
      repeats: timed runs of each loop; the fastest counts.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from lordjax.kernels import normal_float
    from lordjax.methods.quantized.lq import decompose
    from lordjax.methods.quantized.weightings import Weights

    device = jnp.asarray(kernel)
    weight = torch.from_numpy(np.ascontiguousarray(kernel.T))
    norm = float(np.linalg.norm(kernel))

    def ours() -> float:
        fixed: dict[str, Any] = {"form": form, "width": rank, "steps": steps[0]}
        return float(jnp.sqrt(decompose(device, jnp.asarray(rank), Weights(), **fixed).error))

    @jax.jit
    def plain(kernel: Any) -> Any:
        values = normal_float.dequantize(normal_float.quantize(kernel.T.reshape(-1), form), form)
        return jnp.linalg.norm(kernel.T.reshape(-1) - values)

    start = time.perf_counter()
    ours()
    compiled = time.perf_counter() - start
    row: dict[str, Any] = {
        "codes_error": float(plain(device)) / norm,
        "bits": form.bits_per_weight + 16 * rank * sum(kernel.shape) / kernel.size,
        "codes_bits": form.bits_per_weight,
        "compile_seconds": compiled,
    }
    clocks: dict[str, list[tuple[float, float]]] = {"published": [], "ours": []}
    for _ in range(repeats):  # alternately, so that drifting speed affects both
        for name in clocks:
            run = ours if name == "ours" else lambda: published(weight, form, rank, steps[1])
            run()  # untimed: the other loop's threads still spin for a while
            wall, cpu = time.perf_counter(), time.process_time()
            error = run()
            clocks[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            row[f"{name}_error"] = error / norm
    for name, pairs in clocks.items():
        row[f"{name}_seconds"], row[f"{name}_cpu_seconds"] = map(min, zip(*pairs, strict=True))
    return row


def published(weight: Any, form: Any, rank: int, steps: int) -> float:
    """Runs LQ-LoRA's published loop (theory/lq_lora §2.1) in PyTorch.

    Args:
      weight: float32 matrix ``[out, in]``.
      form: quantization format.
      rank: rank of the low-rank term.
      steps: maximum number of alternations.

    Returns:
      The Frobenius norm of the residual after the last alternation.
    """
    import torch

    torch.manual_seed(0)
    codes, last = torch.zeros_like(weight), float("inf")
    for _ in range(steps):
        u, s, v = torch.svd_lowrank(weight - codes, q=min(rank + OVERSAMPLING, *weight.shape))
        root = s[:rank].sqrt()
        product = (u[:, :rank] * root) @ (root[:, None] * v[:, :rank].T)
        codes = published_codes(weight - product, form)
        error = float(torch.linalg.norm(weight - product - codes))
        if error > last:
            break
        last = error
    return error


def published_codes(weight: Any, form: Any) -> Any:
    """Quantizes to NormalFloat with quantized scales, and dequantizes, in PyTorch."""
    import torch

    from lordjax.kernels import normal_float

    table = torch.from_numpy(normal_float.levels(form.bits).copy())
    runs = weight.reshape(-1, form.block)
    scales = runs.abs().amax(dim=1)
    offset, top = scales.min(), 2**form.scale_bits - 1
    groups = torch.nn.functional.pad(scales - offset, (0, -len(scales) % form.scale_block))
    groups = groups.reshape(-1, form.scale_block)
    supers = groups.amax(dim=1, keepdim=True).to(getattr(torch, form.scale_dtype)).float()
    steps = (groups * (top / supers)).round().clamp(0, top)
    scales = (offset + steps * (supers / top)).reshape(-1)[: len(scales), None]
    nearest = torch.bucketize(runs / scales, (table[1:] + table[:-1]) / 2)
    return (table[nearest] * scales).reshape(weight.shape)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Formats the results as a Markdown table: a line per kernel and format."""
    head = ["kernel", "shape", "format", "bits", "error of codes", "published", "ours"]
    head += ["published s", "ours s", "ratio"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        seconds = row["published_seconds"], row["ours_seconds"]
        cells = [row["kernel"], "{} x {}".format(*row["shape"]), row["format"]]
        cells += [f"{row['bits']:.2f}"]
        cells += [f"{row[f'{name}_error']:.4f}" for name in ("codes", "published", "ours")]
        cells += [f"{value:.3f}" for value in seconds] + [f"{seconds[0] / seconds[1]:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
