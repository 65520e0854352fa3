"""Benchmark of forward passes: time of compressed models, relative to the dense model.

Run::

    python -m lordjax.scripts.benchmarks.forward DENSE COMPRESSED [COMPRESSED ...]

It times one float32 forward pass, with logits, over ``--batch`` sequences of ``--length`` tokens.
The speed of a machine drifts, so the models take turns in one process, and medians are compared.
The table also has the operations and the bytes of every model, relative to the dense one.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import click

from lordjax.names import layer


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("dense")
@click.argument("compressed", nargs=-1, required=True)
@click.option(
    "--batch", default=4, show_default=True, help="Number of sequences in a forward pass."
)
@click.option("--length", default=1024, show_default=True, help="Number of tokens in a sequence.")
@click.option(
    "--repeats", default=7, show_default=True, help="Timed forward passes of every model."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(
    dense: str, compressed: tuple[str, ...], batch: int, length: int, repeats: int, as_json: bool
) -> None:
    """Times forward passes of COMPRESSED models and of the DENSE model."""
    from lordjax.scripts.benchmarks.protocol import environment

    rows = measure((dense, *compressed), batch, length, repeats)
    facts = {**environment(), "batch": batch, "length": length, "repeats": repeats}
    if as_json:
        click.echo(json.dumps({"models": rows, "environment": facts}, indent=1))
        return
    click.echo(json.dumps(facts) + "\n")
    click.echo("| model | seconds | of dense | operations of dense | bytes of dense |")
    click.echo("|---|---|---|---|---|")
    for row in rows:
        shares = (row[key] / rows[0][key] for key in ("seconds", "operations", "bytes"))
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        click.echo(f"| {row['model']} | {row['seconds']:.3f} | {cells} |")


def measure(models: tuple[str, ...], batch: int, length: int, repeats: int) -> list[dict[str, Any]]:
    """Median seconds of a forward pass, operations and bytes of every model.

    Args:
      models: directories, files or hub ids of the models.
      batch: number of sequences.
      length: number of tokens in a sequence.
      repeats: timed forward passes of every model.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lordjax.kernels.base import nbytes
    from lordjax.models import Transformer
    from lordjax.scripts.opened_model import open_model

    runs, rows = [], []
    for name in models:
        opened = open_model(name)
        params = jax.tree.map(jnp.asarray, opened.params())
        apply = jax.jit(Transformer(opened.config).apply)
        tokens = np.random.default_rng(0).integers(0, opened.config.vocab_size, (batch, length))
        tokens = jnp.asarray(tokens, jnp.int32)
        jax.block_until_ready(apply({"params": params}, tokens))  # compile
        runs.append((apply, params, tokens))
        total = operations(opened.config, params, batch, length)
        rows.append({"model": name, "operations": total, "bytes": nbytes(params)})
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for times, (apply, params, tokens) in zip(seconds, runs, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(apply({"params": params}, tokens))
            times.append(time.perf_counter() - start)
    for row, times in zip(rows, seconds, strict=True):
        row["seconds"] = statistics.median(times)
    return rows


def operations(config: Any, params: Any, batch: int, length: int) -> float:
    """Number of multiplications and additions of a forward pass.

    It counts all kernels, causal attention and the output head.
    """
    from lordjax.kernels import trees
    from lordjax.kernels.kinds import weights

    flat, total = trees.flatten(params), 0.0
    for path, leaf in flat.items():
        if path.endswith("/kernel"):
            total += 2.0 * weights(leaf)
    if config.tie_embeddings:
        total += 2.0 * config.vocab_size * config.hidden_size
    for i in range(config.num_layers):
        # q @ k.T and weights @ v; causal attention needs half of each square.
        widths = flat[f"{layer(i)}/attention/q/kernel"], flat[f"{layer(i)}/attention/o/kernel"]
        total += length * (widths[0].shape[-1] + widths[1].shape[-2])
    return total * batch * length


if __name__ == "__main__":
    main()
