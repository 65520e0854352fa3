"""Benchmark of a GPU in a time limit: one command, no download, the most valuable lines first.

Run::

    python -m lordjax.scripts.benchmarks.gpu --minutes 12
    python -m lordjax.scripts.benchmarks.gpu --toy --minutes 3       a dry run on a CPU
    python -m lordjax.scripts.benchmarks.gpu --show gpu.json         the table of a run again

Kernels are compared with float32 first. Then follow products, decoding, whole compressions and a
fine-tuning step, with random weights in the shapes of Llama-2-7B and StarCoder-16B. A line that
does not fit into the time that is left is skipped and named. The JSON file is written after every
line; the markdown is printed at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lordjax.scripts.benchmarks.gpu.lines import Deadline, Line, run_lines, show


def all_lines(sizes: Any, *, interpret: bool) -> list[Line]:
    """Returns all lines, the most valuable first.

    Args:
      sizes: the shapes.
      interpret: whether GPU kernels are interpreted, where there is no GPU.
    """
    from lordjax.scripts.benchmarks.gpu import attention, decoding, jobs, products

    names, first = list(decoding.variants(sizes)), sizes.products[0]
    single, many = sizes.batches
    pairs = [(rows, rank) for rank in (0, sizes.rank) for rows in sizes.batches]

    def product(shape: tuple[int, int], rows: int, rank: int) -> Line:
        return products.product(sizes, shape, rows, rank)

    return [
        products.machine(sizes),
        products.correctness(sizes, interpret),
        attention.attention(sizes, interpret),
        *(product(first, rows, rank) for rows, rank in pairs),
        *(decoding.decoding(sizes, name, single) for name in names),
        *jobs.jobs(sizes),
        decoding.fine_tuning(sizes),
        *(decoding.decoding(sizes, name, many) for name in names),
        *(product(shape, rows, 0) for shape in sizes.products[1:] for rows in sizes.batches),
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=12.0,
    show_default=True,
    help="Time limit of the run.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="gpu.json",
    show_default=True,
    help="JSON file for the results; a file of that name is replaced.",
)
@click.option("--toy", is_flag=True, help="Measure toy shapes: a dry run, also without a GPU.")
@click.option(
    "--show",
    "written",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Print the table of a file that was written before, and measure nothing.",
)
def main(minutes: float, out: Path, toy: bool, written: Path | None) -> None:
    """Measures this machine's GPU within a time limit."""
    from lordjax.runtime.input_files import read_json

    if written is not None:
        found = read_json(written)
        if not {"environment", "lines"} <= found.keys():
            raise click.UsageError(
                f"--show {written}: expected a file that this benchmark wrote, with environment "
                "and lines; give the file of --out"
            )
        show(found)
        return
    deadline = Deadline(60 * minutes)
    import jax

    from lordjax.scripts.benchmarks.gpu import sizes
    from lordjax.scripts.benchmarks.protocol import environment

    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not toy:
        raise click.UsageError(
            f"this machine's device is {jax.devices()[0].device_kind}; expected a GPU, since the "
            "shapes are those of a GPU's models; give --toy for a dry run with toy shapes"
        )
    if not out.absolute().parent.is_dir():
        raise click.UsageError(f"--out {out}: its directory does not exist; create it first")
    chosen = sizes.toy() if toy else sizes.released()
    facts = {"environment": environment(), "settings": {"minutes": minutes, "toy": toy}}
    show(run_lines(all_lines(chosen, interpret=not on_gpu), deadline, facts, out, show))


if __name__ == "__main__":
    main()
