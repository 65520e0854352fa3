"""Benchmark of compressing models of other libraries, small and with random weights.

Run, in an environment with the extra ``interop``::

    python -m lordjax.scripts.benchmarks.functions.third_party --out results.json

Nothing in lordjax knows these models: each is a function of a parameter tree. The columns:

* "products": products with parameters that an independent count finds, and those that
  `lordjax.find_sites` sees;
* "sites": matrices that are compressed. The other ones have more than one use (tied embeddings) or
  one output;
* "MLPs": modules that were found by following the data;
* "observed": largest difference of the outputs with and without statistics;
* "full rank": the same for factors of full rank, relative to the largest number of an output;
* "half": fraction of the bytes of all parameters that ``modegpt`` leaves at keep 0.5, and the
  transformations under which the compressed function gives what it gives without them.

Models of ``--shapes`` are traced by shapes alone: their parameters are nowhere.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import click

from lordjax.scripts.benchmarks.protocol import environment, out_option


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--models", help="Names of models, separated by commas.  [default: all]")
@click.option("--shapes/--no-shapes", default=True, help="Also trace models by shapes alone.")
@out_option
def main(models: str | None, shapes: bool, out: str | None) -> None:
    """Compresses models of other libraries and prints what holds."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2"  # for pmap
    from lordjax.scripts.benchmarks.functions.models import CASES, SHAPES

    rows: list[dict[str, Any]] = []
    for name in models.split(",") if models else [*CASES, *(SHAPES if shapes else ())]:
        rows.append({"model": name, **(measure(name) if name in CASES else trace(name))})
        click.echo(json.dumps(rows[-1]))
        if out is not None:
            found = [{**row, "environment": environment()} for row in rows]
            Path(out).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    click.echo(markdown(rows))


def measure(name: str) -> dict[str, Any]:
    """Runs every check on one model."""
    import jax

    import lordjax
    from lordjax.scripts.benchmarks.functions import checks, models

    start = time.perf_counter()
    with models.quiet(), jax.default_matmul_precision("highest"):
        case = models.build(name)
        row: dict[str, Any] = checks.found(case)
        row["observed"] = checks.observed_difference(case)
        row["full_rank"] = checks.full_rank(case)
        stats = checks.statistics(case)
        small, _ = lordjax.compress_params(case.params, stats, method="modegpt", keep=0.5)
        row["bytes"] = lordjax.nbytes(small) / lordjax.nbytes(case.params)
        row["transforms"] = checks.transforms(case, small)
    return {**row, "seconds": time.perf_counter() - start}


def trace(name: str) -> dict[str, Any]:
    """Finds the sites of a model whose parameters are shapes."""
    from lordjax.scripts.benchmarks.functions import checks, models

    start = time.perf_counter()
    with models.quiet():
        case = models.build(name)
        row: dict[str, Any] = checks.found(case)
    return {**row, "seconds": time.perf_counter() - start}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Formats the results as a Markdown table: a line per model."""
    head = ["model", "products", "sites", "MLPs", "observed", "full rank", "half", "s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        runs = row.get("transforms", {})
        half = "-"
        if runs:
            wrong = [name for name, right in runs.items() if not right]
            half = f"{row['bytes']:.2f}, {'not ' + ', '.join(wrong) if wrong else ', '.join(runs)}"
        cells = [
            row["model"],
            f"{row['counted']} / {row['seen']}",
            f"{row['sites']} + {row['left']}",
            str(row["modules"]),
            *(f"{row[key]:.1e}" if key in row else "-" for key in ("observed", "full_rank")),
            half,
            f"{row['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
