"""The commands that make one model from another: finetune, merge, export, convert.

Each command imports its implementation when it runs, so that ``--help`` is instant.
"""

from __future__ import annotations

from typing import Any

import click

from lordjax.scripts.flags.options import (
    as_json_option,
    field_option,
    model_argument,
    output,
    shape_option,
)
from lordjax.scripts.flags.types import (
    BYTES,
    COUNT,
    FRACTION,
    LENGTH,
    POSITIVE,
    PROCESSES,
    RANK,
    SEED,
    SHARE,
    InputPath,
    OutputPath,
    Real,
    Text,
)
from lordjax.scripts.flags.verb import Verb


@click.command(cls=Verb)
@model_argument
@click.argument("out", type=OutputPath())
@click.option(
    "--data",
    type=InputPath(),
    metavar="PATH",
    required=True,
    help="Training data: text or code (a file, a directory, a .jsonl, .jsonl.gz or .parquet file, "
    "see --field, or a .npy array of token ids); instructions (.json, or records as above, "
    "with messages, conversations, instruction and output, prompt and completion, or question and "
    "answer); or labelled sentences (.tsv as in GLUE).",
)
@field_option
@click.option(
    "--recipe",
    type=Text(),
    metavar="NAME",
    default="recovery",
    show_default=True,
    help="What is trained, and how: recovery, distill, factors, lora, qlora, lq-lora or full.",
)
@click.option(
    "--task",
    type=click.Choice(["text", "instructions", "classes"]),
    help="Kind of the training data.  [default: classes for .tsv, instructions for .json, else "
    "text]",
)
@click.option(
    "--steps",
    type=COUNT,
    default=200,
    show_default=True,
    help="Number of training steps.",
)
@click.option(
    "--batch",
    type=COUNT,
    default=8,
    show_default=True,
    help="Examples of a training step.",
)
@click.option(
    "--accumulate",
    type=COUNT,
    help="Micro-batches that a step is computed in, one after the other, to save memory.  "
    "[default: 1; on CPU one for each example]",
)
@click.option(
    "--remat/--no-remat",
    default=True,
    show_default=True,
    help="Recompute blocks in the backward pass (rematerialization): less memory, about a fifth "
    "more time.",
)
@click.option(
    "--seq-len",
    type=LENGTH,
    help="Largest number of tokens of an example.  [default: 1024, or the length of the .npy "
    "array]",
)
@click.option(
    "--learning-rate",
    type=POSITIVE,
    help="Peak of the learning rate.  [default: the recipe's]",
)
@click.option(
    "--schedule",
    type=click.Choice(["constant", "linear", "cosine"]),
    help="Schedule of the learning rate after the warm-up.  [default: the recipe's]",
)
@click.option(
    "--warmup",
    type=FRACTION,
    help="Fraction of the steps in which the learning rate rises to its peak.  [default: the "
    "recipe's]",
)
@click.option(
    "--weight-decay",
    type=Real(0, 1000),
    help="Weight decay of AdamW.  [default: the recipe's]",
)
@click.option(
    "--clip",
    type=POSITIVE,
    help="Largest norm of a gradient; larger gradients are scaled down.  [default: the recipe's]",
)
@click.option(
    "--rank",
    type=RANK,
    help="Rank of new adapters.  [default: the recipe's]",
)
@click.option(
    "--alpha",
    type=POSITIVE,
    help="LoRA's alpha: adapters are scaled by alpha / rank.  [default: not scaled]",
)
@click.option(
    "--teacher",
    type=InputPath(),
    metavar="MODEL",
    help="Distil from this model, usually the original one before compression.",
)
@click.option(
    "--distill",
    type=FRACTION,
    help="Weight of the teacher's predictions in the loss (with --teacher).  [default: 0.5]",
)
@click.option(
    "--validation",
    type=Real(0, 1, below=True),
    default=0.05,
    show_default=True,
    help="Fraction of the documents that is held out for validation; the state with the best "
    "validation loss is written.",
)
@click.option(
    "--every",
    type=COUNT,
    default=50,
    show_default=True,
    help="Steps between two checkpoints.",
)
@click.option(
    "--last",
    type=COUNT,
    default=2,
    show_default=True,
    help="Number of checkpoints that are kept.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Seed of new adapters, of the held-out documents and of the order of the examples.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Dtype of the computation; trained parameters are float32.",
)
@click.option(
    "--devices",
    type=PROCESSES,
    help="Number of devices that batches and weights are split over (FSDP).  [default: 1]",
)
@click.option(
    "--run",
    type=OutputPath(),
    metavar="DIR",
    help="Directory of checkpoints and metrics.  [default: OUT.run]",
)
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint of the same run.")
@click.option(
    "--keep-adapters",
    is_flag=True,
    help="Write adapters beside their matrices instead of merging them.",
)
@as_json_option
def finetune(as_json: bool, **settings: Any) -> None:
    """Train MODEL, its factors or new adapters.

    The trained model is written into OUT. What is trained depends on --recipe.
    """
    from lordjax.scripts.verbs.finetune import finetune_model, show

    output(finetune_model(**settings), as_json, show)


@click.command(cls=Verb)
@model_argument
@click.argument("out", type=OutputPath())
@click.option(
    "--to",
    type=click.Choice(["factors", "dense"]),
    default="factors",
    show_default=True,
    help="factors: adapters are merged into dense matrices and low-rank pairs; those beside "
    "quantized matrices stay. dense: all matrices become dense.",
)
@as_json_option
def merge(as_json: bool, **settings: Any) -> None:
    """Merge adapters of MODEL into its matrices.

    The result is written into OUT.
    """
    from lordjax.scripts.verbs.merge import merge_model, show

    output(merge_model(**settings), as_json, show)


@click.command(cls=Verb)
@model_argument
@click.argument("out", type=OutputPath())
@click.option(
    "--to",
    type=click.Choice(["dense", "factored", "peft", "nemotron-nas", "vllm", "gguf", "orbax"]),
    help="dense: all matrices dense, for stock transformers. factored: low-rank factors and "
    "quantized weights as they are, with remote code. peft: quantized weights, with the low-rank "
    "terms as a PEFT adapter. nemotron-nas: an MLP width for each block, of models that compress "
    "--shape per-layer made, for vLLM, TensorRT-LLM and SGLang. vllm: as factored, for vLLM with "
    "lordjax's plugin. gguf: a file for llama.cpp, of models that compress --shape stock or "
    "per-layer made. orbax: arrays.  [default: with --keep a lordjax directory; else required]",
)
@click.option(
    "--keep",
    type=SHARE,
    metavar="SHARE",
    help="Fraction of the block linear weights that is kept (for a MODEL that compress --elastic "
    "wrote).",
)
@shape_option
@click.option(
    "--type",
    "gguf_type",
    type=click.Choice(["F32", "F16", "BF16", "Q8_0"]),
    help="Type of the matrices in a GGUF file.  [default: as in MODEL]",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Open the result in its target and compare logits; exit code 1 if they differ. Needs "
    "torch; of gguf llama.cpp where that is installed, else lordjax's own reader opens it.",
)
@click.option(
    "--tokens",
    type=InputPath(),
    metavar="PATH",
    help="Data that --verify compares logits on: a text file, a directory, a .jsonl file or a .npy "
    "array of token ids.  [default: the sources of Python's standard library]",
)
@as_json_option
def export(as_json: bool, **settings: Any) -> None:
    """Write MODEL for transformers, PEFT, llama.cpp or Orbax.

    The result is written into OUT. With --keep an elastic MODEL is first cut to a budget.
    """
    from lordjax.scripts.verbs.export import export_model, show

    result = export_model(**settings)
    output(result, as_json, show)
    if result["verify"] is not None and not result["verify"]["passed"]:
        click.echo(
            f"error: {settings['out']}: its logits differ from those of {settings['model']}",
            err=True,
        )
        click.get_current_context().exit(1)


@click.command(cls=Verb)
@model_argument
@click.argument("out", type=OutputPath())
@click.option(
    "--to",
    type=click.Choice(["native", "hf"]),
    default="native",
    show_default=True,
    help="native: a lordjax directory. hf: a Hugging Face directory with dense matrices.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Dtype of all arrays that are not quantized.  [default: as in MODEL; bfloat16 if MODEL is "
    "a quantized GGUF file]",
)
@click.option(
    "--shard-bytes",
    type=BYTES,
    metavar="N",
    help="Largest number of bytes of a file.  [default: 2 GiB]",
)
@as_json_option
def convert(as_json: bool, **settings: Any) -> None:
    """Write MODEL in another format or dtype.

    The result is written into OUT.
    """
    from lordjax.scripts.verbs.convert import convert_model, show

    output(convert_model(**settings), as_json, show)
