"""Comparison of error weights for the global rank allocation.

The global allocation minimizes Σ weight · error under a budget. This program allocates with
different weights, and with the same factors and budget, and prints the perplexity of each::

    python -m lordjax.scripts.benchmarks.sensitivity MODEL --data DIR --keep 0.8

* uniform     no allocation: the same fraction of every kernel is kept
* absolute    squared output error
* relative    squared output error, divided by the layer's output energy
* gradient    squared output error times the mean squared loss gradient at the output (first-order
              Fisher)
* slope       error scaled to the measured rise of the calibration loss when only this kernel is
              truncated, to half of its break-even rank
* loss metric method ``lord``: the metric is part of the factorization, there are no weights
"""

from __future__ import annotations

from typing import Any

import click

from lordjax.names import layer
from lordjax.scripts.benchmarks.protocol import (
    out_option,
    protocol_tokens,
    token_options,
    write_results,
)

METHOD = "lord-linear"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@token_options(domain="wikitext2", calibration=8, windows=4)
@click.option(
    "--keep", default=0.8, show_default=True, help="Fraction of the block weights to keep."
)
@out_option
def main(
    model: str,
    data: str,
    domain: str,
    keep: float,
    calibration_windows: int,
    windows: int,
    out: str | None,
) -> None:
    """Measures the perplexity of MODEL at one budget with different error weights."""
    from lordjax.compression.low_rank import prepare
    from lordjax.evaluate import perplexity
    from lordjax.scripts.opened_model import open_model

    opened = open_model(model)
    tokens, held_out = protocol_tokens(data, domain, calibration_windows, windows)
    prepared = prepare(opened.source, tokens, method=METHOD)
    energy = {path: float(f.spectrum.sum()) for path, f in prepared.factors.items()}
    plans = {
        "uniform": prepared.plan(keep, "uniform"),
        "absolute": prepared.plan(keep, "global", sensitivity=energy),
        "relative": prepared.plan(keep, "global"),
    }
    squares = _mean_squared_gradients(prepared)
    gradient = {path: energy[path] * squares[path] for path in energy}
    plans["gradient"] = prepared.plan(keep, "global", sensitivity=gradient)
    plans["slope"] = prepared.plan(keep, "global", sensitivity=_slopes(prepared, tokens[:1]))
    rows = {}
    for name, plan in plans.items():
        rows[name] = perplexity(opened.config, prepared.apply(plan).params, held_out)["perplexity"]
        click.echo(f"{name}: {rows[name]:.2f}")
    result = prepare(opened.source, tokens, method="lord").compress(keep)
    rows["loss metric"] = perplexity(result.config, result.params, held_out)["perplexity"]
    lines = ["| weights | perplexity |", "|---|---|"]
    click.echo("\n".join([*lines, *(f"| {name} | {value:.2f} |" for name, value in rows.items())]))
    write_results(out, rows)


def _mean_squared_gradients(prepared: Any) -> dict[str, float]:
    """Mean squared loss gradients at the kernels' outputs, by kernel path."""
    import numpy as np

    from lordjax.calibration.backward_pass import gradient_statistics
    from lordjax.calibration.statistics import merged
    from lordjax.methods import METHODS
    from lordjax.models.sites import LINEAR_SITES, site_path
    from lordjax.runtime.progress import Clock

    folds = gradient_statistics(prepared.source, prepared.calibration, METHODS["lord"], Clock())
    stats = {i: merged(found) for i, found in folds.items()}
    return {
        site_path(i, site): float(
            np.mean(np.diag(stats[i]["gradients"][site.path].second_moment()))
        )
        for i in stats
        for site in LINEAR_SITES
    }


def _slopes(prepared: Any, tokens: Any) -> dict[str, float]:
    """Rise of the calibration loss per unit of relative error, by kernel path.

    Each trial truncates one kernel and materializes it, so that all trials share one compilation.
    """
    import jax
    import jax.numpy as jnp

    from lordjax.evaluate import perplexity
    from lordjax.kernels import trees
    from lordjax.methods import truncate

    config = prepared.source.config
    params = dict(prepared.source.non_block_params())
    params |= {layer(i): prepared.source.block(i) for i in range(config.num_layers)}
    params = jax.tree.map(jnp.asarray, params)
    dense = perplexity(config, params, tokens)["nll_per_token"]
    curves, slopes = prepared.curves(), {}
    for path, factors in prepared.factors.items():
        rank = max(1, int(prepared.sizes[path].limit / 2))
        cut = jnp.asarray(truncate(factors, rank)[0].materialize())
        trial = perplexity(config, trees.update(params, {path: cut}), tokens)["nll_per_token"]
        slopes[path] = max(trial - dense, 1e-6) / float(curves[path].errors[rank])
    return slopes


if __name__ == "__main__":
    main()
