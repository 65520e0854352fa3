"""Benchmark of every method at several budgets: perplexity, time and memory.

Run::

    python -m lordjax.scripts.benchmarks.compress MODEL --data DIR --out results.json

``DIR`` holds ``calib_<domain>.npy`` and ``eval_<domain>.npy``, token ids ``[sequences, length]``.
A budget is the kept fraction of the block weights, such as ``0.8``. It may be followed by the
format to which the factors are quantized, such as ``0.8:nf8``. Every method runs in its own
process, so that its peak memory can be measured. The JSON file is rewritten after every method;
``--table results.json`` prints the Markdown table again.

The column "of peak" is the rate of calibration and decomposition, as a fraction of the best float32
matmul rate that was measured in the same process. The rate is the number of operations that they
need (`lordjax.forecast.low_rank_cost`), divided by their time.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from lordjax.data.record_files import read_text
from lordjax.runtime import json_files
from lordjax.runtime.input_files import parse_json, reading
from lordjax.scripts.benchmarks.protocol import (
    environment,
    out_option,
    protocol_tokens,
    token_options,
    write_results,
)
from lordjax.scripts.flags.types import InputPath, OutputPath

# Stages that `lordjax.prepare` runs.
PREPARES = ("gradients", "statistics", "factors", "held-out check")
DEFAULT_METHODS = (
    "svd,fwsvd,asvd,svd-llm,lord-affine,lord-centred,lord-linear,lord,rom,"
    "modegpt,modegpt-cr,modegpt-published,modegpt-slice,modegpt-random"
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@token_options(domains="wikitext2,pystdlib", calibration=64, windows=8, required=False)
@click.option(
    "--methods",
    default=DEFAULT_METHODS,
    show_default=True,
    help="Methods as NAME or NAME:POLICY, separated by commas.",
)
@click.option(
    "--keeps",
    default="0.9,0.8,0.7,0.6,0.5",
    show_default=True,
    help="Budgets as FRACTION or FRACTION:FORMAT, separated by commas: the fraction of the block "
    "weights to keep, and the format to which the factors are quantized.",
)
@click.option(
    "--time-forward", is_flag=True, help="Also time calibration forward passes without statistics."
)
@out_option
@click.option(
    "--table",
    type=InputPath(),
    help="JSON file of an earlier run; print its table and measure nothing.",
)
@click.option(
    "--one",
    hidden=True,
    type=OutputPath(file=True),
    help="File for the single result of a worker process.",
)
def main(
    model: str | None,
    data: str | None,
    domains: str,
    methods: str,
    keeps: str,
    calibration_windows: int,
    windows: int,
    time_forward: bool,
    out: str | None,
    table: str | None,
    one: str | None,
) -> None:
    """Measures MODEL with every combination of method, budget and domain."""
    if table is not None:
        with reading(table, "not the results of an earlier run", "name another file"):
            click.echo(markdown(parse_json(read_text(Path(table)), table)))
        return
    if model is None or data is None:
        raise click.UsageError("MODEL and --data are required; only --table works without them")
    budgets = keeps.split(",")
    if one is not None:
        row = measure(
            model, Path(data), domains, methods, budgets, calibration_windows, windows, time_forward
        )
        Path(one).write_text(json_files.dumps_measured(row), "utf-8")
        return
    rows: list[dict[str, Any]] = []
    for domain in domains.split(","):
        for method in methods.split(","):
            rows.append(
                _in_process(
                    model, data, domain, method, keeps, calibration_windows, windows, time_forward
                )
            )
            click.echo(
                json_files.dumps_measured(
                    {k: rows[-1][k] for k in ("domain", "method", "perplexity")}
                )
            )
            write_results(out, rows, complete=False)
    write_results(out, rows)
    click.echo(markdown(rows))


def _in_process(
    model: str,
    data: str,
    domain: str,
    method: str,
    keeps: str,
    calibration: int,
    windows: int,
    time_forward: bool,
) -> dict[str, Any]:
    """Measures one method on one domain in a new process."""
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "row.json"
        flags = {
            "--data": data,
            "--domains": domain,
            "--methods": method,
            "--keeps": keeps,
            "--calibration-windows": calibration,
            "--windows": windows,
            "--one": result,
        }
        words = [str(word) for pair in flags.items() for word in pair]
        words += ["--time-forward"] if time_forward else []
        command = [sys.executable, "-m", "lordjax.scripts.benchmarks.compress", model, *words]
        subprocess.run(command, check=True)
        return parse_json(read_text(result), str(result))


def measure(
    model: str,
    data: Path,
    domain: str,
    method: str,
    keeps: list[str],
    calibration_windows: int,
    windows: int,
    time_forward: bool,
) -> dict[str, Any]:
    """Calibrates a method once, and evaluates it at every budget."""
    import jax

    from lordjax.compression.low_rank import prepare
    from lordjax.evaluate import perplexity
    from lordjax.forecast import machine_rates
    from lordjax.scripts.opened_model import open_model

    opened = open_model(model)
    tokens, held_out = protocol_tokens(data, domain, calibration_windows, windows)
    name, _, policy = method.partition(":")
    peak = machine_rates.matmul_rate(2048)
    forward = _forward_seconds(opened.source, tokens) if time_forward else None
    start = time.perf_counter()
    prepared = prepare(opened.source, tokens, method=name, allocation=policy or None)
    seconds = time.perf_counter() - start
    # The speed of a shared machine varies: measure before and after, and take the better rate.
    peak = max(peak, machine_rates.matmul_rate(2048))
    cost = _cost(opened.config, prepared, tokens.shape)
    row: dict[str, Any] = {
        "domain": domain,
        "method": method,
        "perplexity": {},
        "kept": {},
        "bytes": {},
        "gap": {},
        "apply_seconds": {},
        "prepare_seconds": seconds,
        "forward_seconds": forward,
        "stages": dict(prepared.report["seconds"]),
        "matmul_peak_flops": peak,
        "share_of_peak": cost / seconds / peak if cost else None,
    }
    for keep in keeps:
        start = time.perf_counter()
        share, _, factors = keep.partition(":")
        result = prepared.compress(float(share), policy or None, factors=factors or None)
        row["apply_seconds"][keep] = time.perf_counter() - start
        if keep == keeps[0]:  # the peak of later budgets would include earlier evaluations
            row["peak_rss_bytes"] = result.report["peak_rss_bytes"]
        row["kept"][keep] = result.report["plan"]["kept"]
        row["bytes"][keep] = result.report["bytes"]
        row["gap"][keep] = result.plan.gap
        jax.clear_caches()  # compiled models of all budgets would fill the memory
        measured = perplexity(result.config, result.params, held_out)
        row["perplexity"][keep] = measured["perplexity"]
        row["protocol"] = measured["protocol"]
    row["environment"] = {**environment(), "calibration": list(tokens.shape)}
    return row


def _forward_seconds(source: Any, tokens: Any) -> float:
    """Seconds of the calibration's forward passes without statistics, compilation included."""
    import jax

    from lordjax.calibration.calibration_set import Calibration
    from lordjax.calibration.forward_pass import block_statistics, hidden_states, on_device
    from lordjax.calibration.observers import sequences_per_step

    start = time.perf_counter()
    calibration = Calibration(tokens, None, sequences_per_step(*tokens.shape))
    states = hidden_states(source, calibration)
    for i in range(source.config.num_layers):
        block = on_device(source.block(i))
        block_statistics(block, i, states, calibration, (), {}, source.config)
    jax.block_until_ready(states)
    return time.perf_counter() - start


def _cost(config: Any, prepared: Any, shape: tuple[int, int]) -> float | None:
    """Number of operations that `lordjax.prepare` needs; None if it has computed no factors."""
    from lordjax.forecast.calibration_cost import recomputed
    from lordjax.forecast.job import CompressionSpec
    from lordjax.forecast.low_rank_cost import stages
    from lordjax.runtime import flops

    if not prepared.factors:
        return None
    policy = "block-influence" if prepared.influences else None
    job = CompressionSpec(config, prepared.method, *shape, policy, prepared.prefix)
    work = stages(job)
    return sum(flops.total(work[name]) for name in PREPARES if name in work) - recomputed(job)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Formats the results as a Markdown table: a line per domain and method."""
    keeps = list(rows[0]["perplexity"])
    head = ["domain", "method", *(f"keep {k}" for k in keeps), "prepare s", "peak RSS", "of peak"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        share = row["share_of_peak"]
        cells = [
            row["domain"],
            f"`{row['method']}`",
            *(_number(row["perplexity"][k]) for k in keeps),
            f"{row['prepare_seconds']:.0f}",
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
            "-" if share is None else f"{100 * share:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


if __name__ == "__main__":
    main()
