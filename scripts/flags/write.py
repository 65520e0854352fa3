"""Verbs that make another model of one: finetune, merge, export, convert.

Imports of what they do are inside them, so that ``--help`` is instant.
"""

from __future__ import annotations

from typing import Any

import click

from lordjax.scripts.flags.options import as_json_option, output


@click.command()
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
    from lordjax.scripts.verbs.finetune import finetune_model, show

    output(finetune_model(**settings), as_json, show)


@click.command()
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
    from lordjax.scripts.verbs.finetune import merge_model, show_merged

    output(merge_model(**settings), as_json, show_merged)


@click.command()
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
    from lordjax.scripts.verbs.export import export_model, show

    result = export_model(**settings)
    output(result, as_json, show)
    if result["verify"] is not None and not result["verify"]["passed"]:
        click.echo(f"error: {settings['out']}: not the model that it was made from", err=True)
        click.get_current_context().exit(1)


@click.command()
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
    help="Dtype of all arrays but codes.  [default: as in MODEL; of a quantised GGUF file "
    "bfloat16]",
)
@click.option(
    "--shard-bytes", type=click.IntRange(min=1), metavar="N", help="Per file.  [default: 2 GiB]"
)
@as_json_option
def convert(as_json: bool, **settings: Any) -> None:
    """Write MODEL in another format, dtype or number of files.

    OUT is a directory that must be new or empty.
    """
    from lordjax.scripts.verbs.convert import convert_model, show

    output(convert_model(**settings), as_json, show)
