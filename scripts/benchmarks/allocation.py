"""Benchmark of format allocation on a real model, with 432 formats for every matrix.

Run::

    python -m lordjax.scripts.benchmarks.allocation MODEL

The program computes the squared error of every block matrix in every format of
`lordjax.kernels.normal_float.grid`, the grid of LQ-LoRA's integer program. Then both solvers choose
formats for every budget, in one run. The table has the seconds of each solver, its optimality gap,
the excess of the bisection's error over that of the integer program, and the bits that the
bisection uses.
"""

from __future__ import annotations

import time
from typing import Any

import click

from lordjax.runtime import json_files
from lordjax.scripts.benchmarks.protocol import environment, out_option, write_results

BITS = "2.5,2.75,3,3.25,3.5,3.75,4,4.13"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option(
    "--bits",
    default=BITS,
    show_default=True,
    help="Budgets in bits per block weight, separated by commas.",
)
@out_option
def main(model: str, bits: str, out: str | None) -> None:
    """Times the choice of formats for the matrices of MODEL."""
    from lordjax.allocation.knapsack import SOLVERS
    from lordjax.scripts.opened_model import open_model

    start = time.perf_counter()
    found, count = tables(open_model(model).source)
    built = time.perf_counter() - start
    sizes, errors = ([getattr(t, name) for t in found] for name in ("sizes", "errors"))
    rows: list[dict[str, Any]] = []
    for target in bits.split(","):
        row: dict[str, Any] = {"bits": float(target), "matrices": len(found)}
        for name, solve in SOLVERS.items():
            start = time.perf_counter()
            chosen = solve(sizes, errors, float(target) * count / 8)
            row[f"{name}_seconds"] = time.perf_counter() - start
            row[f"{name}_error"], row[f"{name}_gap"] = chosen.error, chosen.gap
            used = sum(size[i] for size, i in zip(sizes, chosen.index, strict=True))
            row[f"{name}_bits"] = 8 * used / count
        row["over_milp"] = row["bisection_error"] / row["milp_error"] - 1
        rows.append({**row, "table_seconds": built, "environment": environment()})
        click.echo(json_files.dumps_measured(rows[-1]))
        write_results(out, rows, complete=False)
    write_results(out, rows)
    options = sum(len(t.candidates) for t in found) / len(found)
    click.echo(
        f"{len(found)} matrices, table in {built:.0f} s, {options:.0f} options each not beaten"
    )
    click.echo(markdown(rows))


def tables(source: Any) -> tuple[list[Any], int]:
    """Tables of candidate formats for all block matrices, and the number of their weights."""
    import jax
    import jax.numpy as jnp

    from lordjax.allocation.candidates import Candidate, Table
    from lordjax.kernels import normal_float, trees
    from lordjax.methods.quantized.predicted_loss import predict
    from lordjax.methods.quantized.weightings import Weights
    from lordjax.models.sites import LINEAR_SITES

    grid, found, count = normal_float.grid(), [], 0
    for i in range(source.config.num_layers):
        flat = trees.flatten(source.block(i))
        for site in LINEAR_SITES:
            if site.path not in flat:
                continue
            kernel = jnp.asarray(flat[site.path], jnp.float32)
            errors = jax.device_get(predict(kernel, Weights(), forms=tuple(grid), ranks=(0,)))[:, 0]
            rows = zip(grid, errors, strict=True)
            found.append(
                Table.pareto((f.nbytes(kernel.size), e, Candidate(f, None)) for f, e in rows)
            )
            count += kernel.size
    return found, count


def markdown(rows: list[dict[str, Any]]) -> str:
    """Formats the results as a Markdown table: a line per budget."""
    head = ["bits", "used", "bisection s", "gap", "HiGHS s", "gap", "bisection over HiGHS"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{row['bits']:g}", f"{row['bisection_bits']:.4f}"]
        for name in ("bisection", "milp"):
            cells += [f"{row[f'{name}_seconds']:.2f}", f"{100 * row[f'{name}_gap']:.4f} %"]
        cells.append(f"{100 * row['over_milp']:.4f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
