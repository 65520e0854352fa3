"""Ablation of MoDeGPT: perplexity of the published method with one change at a time.

Run::

    python -m lordjax.scripts.benchmarks.modules MODEL --data DIR --domain pystdlib

``DIR`` holds token arrays, as for `lordjax.scripts.benchmarks.compress`. All variants keep the same
fraction of every module: they differ in their computation, not in the allocation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from lordjax.runtime import json_files
from lordjax.scripts.benchmarks.protocol import (
    environment,
    out_option,
    protocol_tokens,
    token_options,
    write_results,
)


def variants() -> dict[str, Any]:
    """Variants of MoDeGPT: `Method` by name."""
    from lordjax.methods import METHODS
    from lordjax.methods.modular.mlp import mlp_module
    from lordjax.methods.modular.value_output import value_output_module

    base = METHODS["modegpt-published"]

    def change(**modules: Any) -> Any:
        return dataclasses.replace(base, modules={**base.modules, **modules}, allocation="uniform")

    neurons = {
        "random neurons, no refit": {"score": "random", "fit": False},
        "neurons of most energy, no refit": {"score": "energy", "fit": False},
        "neurons of most energy, refit": {"score": "energy"},
        "neurons by elimination": {"score": "elimination"},
        "a bias in the refit": {"score": "leverage", "intercept": True},
    }
    moments = ("moments",)
    values = {
        "values in the context of the attention": {"fit": False},
        "and the output projection fitted to all heads": {"fit": True},
    }
    return {
        "as published": change(),
        **{name: change(mlp=mlp_module(moments, **row)) for name, row in neurons.items()},
        **{name: change(vo=value_output_module(moments, **row)) for name, row in values.items()},
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@token_options(domain="pystdlib", calibration=16, windows=4)
@click.option(
    "--keeps",
    default="0.8,0.6",
    show_default=True,
    help="Fractions of the block weights to keep, separated by commas.",
)
@out_option
def main(
    model: str,
    data: str,
    domain: str,
    keeps: str,
    calibration_windows: int,
    windows: int,
    out: str | None,
) -> None:
    """Measures the perplexity of MODEL, compressed by every variant."""
    import jax

    from lordjax import prepare
    from lordjax.evaluate import perplexity
    from lordjax.methods import METHODS
    from lordjax.scripts.opened_model import open_model

    protocol = {"domain": domain, "calibration": calibration_windows, "windows": windows}
    click.echo(json_files.dumps_measured({**environment(), **protocol}) + "\n")
    opened = open_model(model)
    tokens, held_out = protocol_tokens(data, domain, calibration_windows, windows)
    budgets = [float(keep) for keep in keeps.split(",")]
    rows: dict[str, list[float]] = {}
    click.echo("| variant | " + " | ".join(f"keep {keep}" for keep in budgets) + " |")
    click.echo("|" + "---|" * (len(budgets) + 1))
    for name, method in variants().items():
        METHODS[name] = method
        prepared = prepare(opened.source, tokens, method=name)
        rows[name] = []
        for keep in budgets:
            params = prepared.compress(keep).params
            rows[name].append(perplexity(opened.config, params, held_out)["perplexity"])
        jax.clear_caches()  # compiled models of all variants would fill the memory
        click.echo(f"| {name} | " + " | ".join(f"{value:.2f}" for value in rows[name]) + " |")
        write_results(out, rows, complete=False)
    write_results(out, rows)


if __name__ == "__main__":
    main()
