"""Benchmark of quantized models: errors, perplexity, size and time.

Run::

    python -m lordjax.scripts.benchmarks.quantize MODEL --data DIR --out results.json

``DIR`` holds token arrays, as for `lordjax.scripts.benchmarks.compress`. A *case* is
``METHOD[:RANK][:WEIGHTING][:FACTORS][:no-feedback]@BUDGET``. FACTORS is the format of the low-rank
factors; BUDGET is bits per weight, a format, or bytes of the files. Examples: ``nf@nf4``,
``lq:32:both@3.5``, ``lq:8:both:nf8@3.4``, ``auto@4.13``, ``auto@60MB``.

For every case and domain the program prints and writes:

* bits per block weight, with quantized weights, scales and factors, and bytes of all files with
  weights;
* the error of the weights and of the layers' outputs on calibration data, as the root of the sum of
  squares over all matrices, relative to the dense model;
* perplexity;
* seconds of the choice of formats and of the decomposition.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from lordjax.names import layer
from lordjax.runtime import json_files
from lordjax.scripts.benchmarks.protocol import (
    environment,
    out_option,
    protocol_tokens,
    token_options,
    write_results,
)
from lordjax.scripts.flags.types import BYTES

BITS = ("4", "3.5", "3.25", "3", "2.75", "2.5")
RANKS = (0, 16, 32, 64)


def default_cases() -> list[str]:
    """Default cases.

    They are every budget at every rank, without data and weighted; single formats for all
    matrices; and every budget of method ``auto``.
    """
    grid = itertools.product(("none", "both"), RANKS, BITS)
    ranked = [f"{'lq:' + str(r) if r else 'nf'}:{w}@{b}" for w, r, b in grid]
    fixed = ["nf@nf4", "nf@nf3", "lq:32@nf4", "lq:32@nf3"]
    return [*fixed, *ranked, *(f"auto@{b}" for b in ("4.13", "3.6", "3.13", *BITS[1:]))]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@token_options(domains="wikitext2,pystdlib", calibration=64, windows=8)
@click.option(
    "--cases",
    help="Cases METHOD[:RANK][:WEIGHTING][:FACTORS][:no-feedback]@BUDGET, separated by commas.  "
    "[default: the whole grid]",
)
@out_option
def main(
    model: str,
    data: str,
    domains: str,
    cases: str | None,
    calibration_windows: int,
    windows: int,
    out: str | None,
) -> None:
    """Measures quantized versions of MODEL."""
    from lordjax.scripts.opened_model import open_model

    opened, rows = open_model(model), []
    for domain in domains.split(","):
        tokens, held_out = protocol_tokens(data, domain, calibration_windows, windows)
        judge = _moments(opened.source, tokens)
        gradients = functools.cache(functools.partial(_prepare, opened.source, tokens))
        quantizers = functools.cache(functools.partial(_quantizer, gradients))
        for case in cases.split(",") if cases else default_cases():
            row = {"domain": domain, "case": case, **measure(quantizers, judge, held_out, case)}
            rows.append({**row, "environment": environment()})
            click.echo(json_files.dumps_measured(row))
            write_results(out, rows, complete=False)
    write_results(out, rows)
    click.echo(markdown(rows))


def _moments(source: Any, tokens: Any) -> dict[str, Any]:
    """Second moments of the inputs of every site, by site path, on the host."""
    import numpy as np

    from lordjax.compression.quantized import prepare_quantized
    from lordjax.models.sites import site_path
    from lordjax.runtime.progress import Clock

    prepared = prepare_quantized(source, tokens, method="nf", weighting="input")
    found = {}
    for i, sites, matrix in prepared.walk(Clock(None), "moments", lambda _: False):
        found |= {site_path(i, site): np.asarray(matrix(site)[1].inputs) for site in sites}
    return found


def _prepare(source: Any, tokens: Any, weighting: str) -> tuple[Any, float]:
    """Builds a `Quantizer` for a weighting; also returns the seconds of its backward pass."""
    from lordjax.compression.quantized import prepare_quantized

    start = time.perf_counter()
    prepared = prepare_quantized(source, tokens, method="nf", weighting=weighting)
    return prepared, time.perf_counter() - start


def _quantizer(gradients: Any, what: str) -> tuple[Any, float]:
    """`Quantizer` of a case, and the seconds that `_prepare` took for its weighting.

    Args:
      gradients: cached function from a weighting to a `Quantizer` and its seconds.
      what: the part of the case before ``@``.
    """
    from lordjax.allocation.candidates import QUANTIZERS
    from lordjax.kernels import normal_float
    from lordjax.methods.quantized.weightings import WEIGHTINGS

    method, *options = what.split(":")
    row = QUANTIZERS[method]
    weighting = next((option for option in options if option in WEIGHTINGS), row.weighting)
    factors = next((option for option in options if option.startswith("nf")), row.factors)
    rank = next((int(option) for option in options if option.isdigit()), row.rank)
    prepared, seconds = gradients(weighting)
    form = None if factors is None else normal_float.Format.parse(factors)
    feedback = prepared.feedback and "no-feedback" not in options
    new = {"method": method, "rank": rank, "factors": form, "feedback": feedback}
    return dataclasses.replace(prepared, **new), seconds


def measure(quantizers: Any, judge: dict[str, Any], held_out: Any, case: str) -> dict[str, Any]:
    """Quantizes a model for one case and measures it.

    Args:
      quantizers: function from the part of a case before ``@`` to a `Quantizer` and its seconds.
      judge: second moments of the sites' inputs, by site path.
      held_out: evaluation tokens ``[sequences, length]``.
      case: the case, as in the module's docstring.
    """
    import jax

    from lordjax.evaluate import perplexity
    from lordjax.kernels import normal_float

    what, budget = case.split("@")
    quantizer, seconds = quantizers(what)
    start = time.perf_counter()
    if budget.startswith("nf"):
        plan = quantizer.uniform(normal_float.Format.parse(budget), quantizer.rank)
    elif budget.endswith("B"):
        plan = quantizer.plan(file_bytes=BYTES.convert(budget, None, None))
    else:
        plan = quantizer.plan(bits=float(budget))
    chosen = time.perf_counter()
    result = quantizer.apply(plan)
    done = time.perf_counter()
    weights, outputs = errors(quantizer.source, result.params, judge)
    jax.clear_caches()  # compiled models of all cases would fill the memory
    return {
        "bits": result.report["plan"]["bits_per_weight"],
        "file_bytes": saved_bytes(result),
        "tables": dict(plan.tables),
        "gap": plan.gap,
        "weight_error": weights,
        "output_error": outputs,
        "perplexity": perplexity(result.config, result.params, held_out)["perplexity"],
        "gradient_seconds": seconds,
        "choice_seconds": chosen - start,
        "decomposition_seconds": done - chosen,
        "peak_rss_bytes": result.report["peak_rss_bytes"],
    }


def saved_bytes(result: Any) -> int:
    """Returns the bytes of the files with weights of a model that is saved."""
    from lordjax.storage import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        checkpoint.save(directory, result.config, result.params, hf_config={})
        return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def errors(source: Any, params: Any, judge: dict[str, Any]) -> tuple[float, float]:
    """Relative errors of the weights and of the layers' outputs, over all matrices.

    Args:
      source: the dense model.
      params: parameters of the quantized model.
      judge: second moments ``[in, in]`` of the sites' inputs, by site path.
    """
    import numpy as np

    from lordjax.kernels import trees
    from lordjax.kernels.base import materialize

    sums = np.zeros(4)
    for i in range(source.config.num_layers):
        dense, new = trees.flatten(source.block(i)), trees.flatten(params[layer(i)])
        for path in dense:
            if f"{layer(i)}/{path}" in judge:
                moment = judge[f"{layer(i)}/{path}"]
                kernel = np.asarray(dense[path], np.float32)
                error = kernel - np.asarray(materialize(new[path]), np.float32)
                sums += [
                    np.vdot(error, error),
                    np.vdot(kernel, kernel),
                    np.vdot(error, moment @ error),
                    np.vdot(kernel, moment @ kernel),
                ]
    return math.sqrt(sums[0] / sums[1]), math.sqrt(sums[2] / sums[3])


def markdown(rows: list[dict[str, Any]]) -> str:
    """Formats the results as a Markdown table: a line per domain and case."""
    head = ["domain", "case", "bits all in", "bytes", "weight error"]
    head += ["output error", "perplexity", "s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        seconds = row["choice_seconds"] + row["decomposition_seconds"]
        ppl = row["perplexity"]
        cells = [
            row["domain"],
            f"`{row['case']}`",
            f"{row['bits']:.3f}",
            f"{row['file_bytes']:,}",
            f"{row['weight_error']:.4f}",
            f"{row['output_error']:.4f}",
            f"{ppl:.2f}" if ppl < 1e4 else f"{ppl:.1e}",
            f"{seconds:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
