"""Verbs that run a model or look at it.

Imports of what they do are inside them, so that ``--help`` is instant.
"""

from __future__ import annotations

import functools
from typing import Any

import click

from lordjax.scripts.flags.options import as_json_option, counts, output


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0: always the likeliest token.",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the k likeliest only.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Draw from the likeliest that add up to p only.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Above 1: tokens that occurred are less likely.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before it; may be repeated.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--chat", is_flag=True, help="Write turns as the tokenizer's chat template says.")
@click.option("--interactive", is_flag=True, help="Answer lines of the standard input.")
@as_json_option
def generate(as_json: bool, **settings: Any) -> None:
    """Continue PROMPT with MODEL.

    PROMPT may be '-' for the standard input. The text is shown as it comes.
    """
    from lordjax.scripts.verbs.generate import generate_model, show

    output(generate_model(**settings, quiet=as_json), as_json, show)


@click.command()
@click.argument("model")
@click.option("--tokens", metavar="PATH", required=True, help="As --calibration of compress.")
@click.option("--windows", type=click.IntRange(min=1), help="At most so many.  [default: all]")
@click.option(
    "--seq-len",
    type=click.IntRange(min=2),
    help="Tokens per window.  [default: 1024, or the length of the .npy]",
)
@as_json_option
def evaluate(as_json: bool, **settings: Any) -> None:
    """Measure the perplexity of MODEL.

    The protocol is printed with the number. Of a model that predicts masked tokens it is a
    pseudo-perplexity: of a fixed 15 % of every window, masked at once.
    """
    from lordjax.scripts.verbs.evaluate import evaluate_model, show

    output(evaluate_model(**settings), as_json, show)


@click.command()
@click.argument("model", required=False)
@click.option(
    "--problems",
    required=True,
    metavar="PATH",
    help="HumanEval (.jsonl or .jsonl.gz) or MBPP (.jsonl).",
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=1, show_default=True, help="Per problem."
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True))
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Of a program, on the clock and of CPU time.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Programs at a time.  [default: the cores]"
)
@click.option("--first", type=click.IntRange(min=1), help="Only the first problems.")
@click.option(
    "--run-generated-code",
    is_flag=True,
    help="Allow it: programs that a model wrote run on this machine, in a sandbox.",
)
@click.option("--out", metavar="FILE", help="A .jsonl with a line per problem.")
@click.option("--reference", is_flag=True, help="Run the set's own solutions instead of a model's.")
@as_json_option
def evaluate_code(as_json: bool, **settings: Any) -> None:
    """Measure pass@k of the programs that MODEL writes.

    Needs --run-generated-code; best inside a container. Which isolation was in force is printed
    with the result.
    """
    from lordjax.scripts.verbs.evaluate_code import evaluate_code, show

    output(evaluate_code(**settings), as_json, show)


@click.command()
@click.argument("model")
@click.option(
    "--data",
    required=True,
    metavar="PATH",
    help="A .jsonl file of questions, or a directory of such files; see the README.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME",
    help="What the questions are; may be repeated for a directory. A wrong name lists them all.  "
    "[default: as the files' names say]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first questions of each set.")
@click.option(
    "--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Rows read at once."
)
@click.option("--max-length", type=click.IntRange(min=1), help="Tokens.  [default: the model's]")
@click.option("--out", metavar="FILE", help="A .jsonl with a line per question.")
@as_json_option
def evaluate_choices(as_json: bool, **settings: Any) -> None:
    """Measure how often MODEL finds the right one of several choices.

    Prompts and accuracies, without examples, are those of the LM evaluation harness.
    """
    from lordjax.scripts.verbs.evaluate_choices import evaluate_choices, show

    output(evaluate_choices(**settings), as_json, show)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--prefill", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens read."
)
@click.option(
    "--prompt",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens before those that are written.",
)
@click.option(
    "--new",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Tokens written per row.",
)
@click.option(
    "--batches", default="1,8,32", show_default=True, callback=counts, help="Rows written at once."
)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--transformers", metavar="DIR", help="A Hugging Face directory that torch runs beside."
)
@click.option("--tokens", metavar="PATH", help="Measure perplexities, too; as of evaluate.")
@click.option("--windows", type=click.IntRange(min=1), help="Of --tokens, at most.")
@click.option("--picture", metavar="FILE", help="Perplexity against bytes and speed.")
@as_json_option
def benchmark(as_json: bool, **settings: Any) -> None:
    """Measure how fast MODELs read and write, in turn.

    What others are compared with comes first. Prints a markdown table.
    """
    from lordjax.scripts.verbs.benchmark import benchmark_model, show

    output(benchmark_model(**settings), as_json, show)


@click.command()
@click.argument("model")
@click.option("--full", is_flag=True, help="List every parameter of every block.")
@click.option(
    "--picture",
    metavar="FILE",
    help="Draw a map of the layers and matrices, coloured by share kept or bits, and the decay of "
    "their spectra. FILE ends in .png, .svg or .pdf; an existing one is replaced.",
)
@as_json_option
def inspect(as_json: bool, full: bool, **settings: Any) -> None:
    """Show the parameters of MODEL.

    Kinds, shapes, ranks, bytes, and the share of the weights that was kept.
    """
    from lordjax.scripts.verbs.inspect import inspect_model, show

    output(inspect_model(**settings), as_json, functools.partial(show, full=full))
