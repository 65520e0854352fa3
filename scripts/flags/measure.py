"""The commands that run or measure a model.

Each command imports its implementation when it runs, so that ``--help`` is instant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lordjax.scripts.flags.options import (
    as_json_option,
    field_option,
    model_argument,
    opening_options,
    output,
)
from lordjax.scripts.flags.types import (
    COUNT,
    LENGTH,
    PROCESSES,
    SECONDS,
    SEED,
    SHARE,
    InputPath,
    Listed,
    OutputPath,
    Real,
    Temperature,
    Text,
)
from lordjax.scripts.flags.verb import Verb


def lines_option(what: str) -> Callable[[Any], Any]:
    """Returns the option ``--out`` of a command that writes a line for each ``what``."""
    return click.option(
        "--out",
        type=OutputPath(file=True),
        metavar="FILE",
        help=f"Write a new .jsonl file with one line for each {what}.",
    )


@click.command(cls=Verb)
@model_argument
@click.argument("prompt", required=False, type=Text(empty=True))
@click.option(
    "--max-new-tokens",
    type=COUNT,
    default=128,
    show_default=True,
    help="Largest number of generated tokens.",
)
@click.option(
    "--temperature",
    type=Temperature(),
    help="Sampling temperature; 0 always takes the most likely token.  [default: the model's, from "
    "generation_config.json; else 0]",
)
@click.option(
    "--top-k",
    metavar="K",
    type=COUNT,
    help="Sample from the K most likely tokens only.  [default: the model's; else all]",
)
@click.option(
    "--top-p",
    metavar="P",
    type=SHARE,
    help="Sample from the most likely tokens whose probabilities add up to P (nucleus sampling).  "
    "[default: the model's; else 1]",
)
@click.option(
    "--repetition-penalty",
    type=Real(0.01, 100),
    help="A value above 1 makes tokens that occurred before less likely.  [default: the model's; "
    "else 1]",
)
@click.option(
    "--stop",
    type=Text(),
    multiple=True,
    metavar="TEXT",
    help="End before this text. May be given several times.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the sampling.")
@click.option("--chat", is_flag=True, help="Format the turns with the tokenizer's chat template.")
@click.option("--interactive", is_flag=True, help="Answer lines that are read from standard input.")
@as_json_option
def generate(as_json: bool, **settings: Any) -> None:
    """Continue PROMPT with MODEL.

    PROMPT is a text, or '-' to read it from standard input. Text is printed while it is generated.
    """
    from lordjax.scripts.verbs.generate import generate_model, show

    output(generate_model(**settings, quiet=as_json), as_json, show)


@click.command(cls=Verb)
@model_argument
@click.option(
    "--tokens",
    type=InputPath(),
    metavar="PATH",
    required=True,
    help="Evaluation data: a text file, a directory of text or source files, a .jsonl, .jsonl.gz "
    "or .parquet file (see --field), or a .npy array of token ids [windows, length].",
)
@field_option
@click.option(
    "--windows",
    type=COUNT,
    help="Largest number of windows that are evaluated.  [default: all]",
)
@click.option(
    "--seq-len",
    type=LENGTH,
    help="Tokens of a window.  [default: 1024, or the length of the .npy array]",
)
@as_json_option
def evaluate(as_json: bool, **settings: Any) -> None:
    """Measure the perplexity of MODEL.

    The protocol is printed with the number. A model that predicts masked tokens gets a
    pseudo-perplexity: a fixed 15 % of the tokens of every window are masked at once.
    """
    from lordjax.scripts.verbs.evaluate import evaluate_model, show

    output(evaluate_model(**settings), as_json, show)


@click.command(cls=Verb)
@click.argument("model", required=False, type=InputPath())
@opening_options
@click.option(
    "--problems",
    type=InputPath(),
    required=True,
    metavar="PATH",
    help="File of problems: HumanEval (.jsonl or .jsonl.gz) or MBPP (.jsonl).",
)
@click.option(
    "--samples",
    type=COUNT,
    default=1,
    show_default=True,
    help="Programs that are generated for each problem.",
)
@click.option(
    "--temperature",
    type=Temperature(),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 always takes the most likely token.",
)
@click.option(
    "--top-p",
    metavar="P",
    type=SHARE,
    help="Sample from the most likely tokens whose probabilities add up to P (nucleus sampling).",
)
@click.option(
    "--max-new-tokens",
    type=COUNT,
    default=512,
    show_default=True,
    help="Largest number of generated tokens of a program.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the sampling.")
@click.option(
    "--batch",
    type=COUNT,
    default=16,
    show_default=True,
    help="Programs that are generated at a time.",
)
@click.option(
    "--seconds",
    type=SECONDS,
    default=10.0,
    show_default=True,
    help="Time limit of a program, in seconds of wall time and of CPU time.",
)
@click.option(
    "--workers",
    type=PROCESSES,
    help="Programs that run at a time.  [default: the number of cores]",
)
@click.option("--first", type=COUNT, metavar="N", help="Use the first N problems only.")
@click.option(
    "--chat",
    is_flag=True,
    help="Ask with the tokenizer's chat template, and take the program from the answer's code "
    "block.",
)
@click.option(
    "--run-generated-code",
    is_flag=True,
    help="Confirm that programs which a model wrote may run on this machine, in a sandbox.",
)
@click.option(
    "--allow-weak-isolation",
    is_flag=True,
    help="Run them even where a hostile program can leave the sandbox: it may read your files, "
    "reach the network or stop your processes. For machines that hold nothing else.",
)
@lines_option("problem")
@click.option(
    "--reference",
    is_flag=True,
    help="Run the reference solutions of the problems instead of a model's programs.",
)
@as_json_option
def evaluate_code(as_json: bool, **settings: Any) -> None:
    """Measure pass@k of the programs that MODEL writes.

    The programs run only with --run-generated-code; run the command inside a container. The result
    says which isolation was active.
    """
    from lordjax.scripts.verbs.evaluate_code import evaluate_code, show

    output(evaluate_code(**settings), as_json, show)


@click.command(cls=Verb)
@model_argument
@click.option(
    "--data",
    type=InputPath(),
    required=True,
    metavar="PATH",
    help="A .jsonl file of questions in the format of its data set, or a directory of such files.",
)
@click.option(
    "--task",
    "tasks",
    type=Text(),
    multiple=True,
    metavar="NAME",
    help="Task of the questions. May be given several times for a directory. An unknown name lists "
    "all tasks.  [default: the names of the files]",
)
@click.option(
    "--limit",
    type=COUNT,
    metavar="N",
    help="Use the first N questions of each task only.",
)
@click.option(
    "--batch",
    type=COUNT,
    default=16,
    show_default=True,
    help="Choices that are evaluated at a time.",
)
@click.option(
    "--max-length",
    type=COUNT,
    help="Largest number of tokens of a question with a choice.  [default: the model's longest "
    "sequence]",
)
@lines_option("question")
@as_json_option
def evaluate_choices(as_json: bool, **settings: Any) -> None:
    """Measure accuracy on multiple-choice tasks.

    Prompts and accuracies are those of the LM evaluation harness, zero-shot.
    """
    from lordjax.scripts.verbs.evaluate_choices import evaluate_choices, show

    output(evaluate_choices(**settings), as_json, show)


@click.command(cls=Verb)
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", type=InputPath())
@opening_options
@click.option(
    "--prefill",
    type=COUNT,
    default=1024,
    show_default=True,
    help="Tokens of the prompt that measures reading speed.",
)
@click.option(
    "--prompt",
    type=COUNT,
    default=128,
    show_default=True,
    help="Tokens of the prompts that measure decoding speed.",
)
@click.option(
    "--new",
    type=LENGTH,
    default=64,
    show_default=True,
    help="Tokens that are generated for each prompt.",
)
@click.option(
    "--batches",
    type=Listed(COUNT, "1,8,32"),
    default="1,8,32",
    show_default=True,
    help="Batch sizes of decoding, separated by commas.",
)
@click.option(
    "--repeats",
    type=COUNT,
    default=5,
    show_default=True,
    help="Runs of each measurement; the median is printed.",
)
@click.option(
    "--transformers",
    type=InputPath(),
    metavar="DIR",
    help="Also measure this Hugging Face directory with transformers and PyTorch.",
)
@click.option(
    "--tokens",
    type=InputPath(),
    metavar="PATH",
    help="Also measure perplexity on this data: a text file, a directory, a .jsonl file or a .npy "
    "array of token ids.",
)
@click.option(
    "--windows",
    type=COUNT,
    help="Largest number of windows of --tokens.  [default: all]",
)
@click.option(
    "--picture",
    type=OutputPath(file=True),
    metavar="FILE",
    help="Draw perplexity against bytes and speed into this file (with --tokens).",
)
@as_json_option
def benchmark(as_json: bool, **settings: Any) -> None:
    """Measure the speed of one or more MODELs.

    They read prompts and generate text in turn; the first one is the baseline of the others. Prints
    a markdown table.
    """
    from lordjax.scripts.verbs.benchmark import benchmark_model, show

    output(benchmark_model(**settings), as_json, show)
