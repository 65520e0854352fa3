"""Options that several commands have: parsers of values, and decorators that add options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lordjax.runtime.json_files import dumps_measured, non_finite
from lordjax.scripts.console import say
from lordjax.scripts.flags.types import (
    BITS,
    BYTES,
    COUNT,
    LENGTH,
    SHARE,
    InputPath,
    Ranks,
    Real,
    Text,
)


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Keeps a value that `open_model` reads, so that the commands need not hand it on."""
    context.meta[f"lordjax.{parameter.name}"] = value


def _kept(name: str, default: Any) -> Any:
    context = click.get_current_context(silent=True)
    return default if context is None else context.meta.get(f"lordjax.{name}", default)


def ignored_keys() -> tuple[str, ...]:
    """Returns the names that ``--ignore-key`` of the running command gives."""
    return _kept("ignore_key", ())


def verifies() -> bool:
    """Returns whether checksums are checked: unless the running command has ``--no-verify``."""
    return not _kept("no_verify", False)


def options(*each: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a decorator that adds several options, in this order."""

    def add(command: Any) -> Any:
        for option in reversed(each):
            command = option(command)
        return command

    return add


# Of every command that opens a model.
no_verify_option = click.option(
    "--no-verify",
    is_flag=True,
    expose_value=False,
    callback=_keep,
    help="Open a lordjax directory without comparing its tensors and files with their checksums. "
    "Shapes, dtypes and finite values are checked all the same.",
)
ignore_key_option = click.option(
    "--ignore-key",
    multiple=True,
    metavar="NAME",
    type=Text(),
    expose_value=False,
    callback=_keep,
    help="Open the model although its config has the unknown key NAME, because it does not depend "
    "on it. The name is kept in the config of the result. May be given several times.",
)
opening_options = options(ignore_key_option, no_verify_option)
model_argument = options(click.argument("model", type=InputPath()), opening_options)

# Of `compress`, `plan` and `export`.
shape_option = click.option(
    "--shape",
    type=click.Choice(["free", "stock", "per-layer"]),
    help="free: every layer has its own rank or width. stock: one MLP width and one number of "
    "heads for all blocks, or fewer blocks, so that any program that runs MODEL's family runs the "
    "result. per-layer: one MLP width for each block, for export --to nemotron-nas or gguf. The "
    "last two are shapes of method modegpt.  [default: free]",
)

# Method and size of a compression: of `compress` and `plan`.
budget_options = options(
    click.option(
        "--method",
        type=Text(),
        metavar="NAME",
        default="modegpt",
        show_default=True,
        help="Compression method. Low-rank: modegpt, lord, svd and others; quantizing: nf, lq, "
        "auto. An unknown name lists all methods.",
    ),
    shape_option,
    click.option(
        "--multiple",
        type=COUNT,
        metavar="N",
        help="Ranks and widths are multiples of N, in policies that optimize (low-rank methods).  "
        "[default: 8; up to 64 with --shape stock, 256 with per-layer]",
    ),
    click.option(
        "--keep",
        type=SHARE,
        help="Fraction of the block linear weights that is kept, in (0, 1]; both factors of a "
        "low-rank pair count.  [default: 0.8]",
    ),
    click.option(
        "--ranks",
        type=Ranks(),
        metavar="LAYER=RANK,…",
        help="Ranks by layer type, such as mlp/down=2304, instead of --keep. LAYER is a regular "
        "expression; layer_3/mlp/down is one layer. All other layers stay dense.",
    ),
    click.option(
        "--bits",
        type=BITS,
        help="Average bits per block weight (methods nf, lq, auto). nf and lq count the quantized "
        "weights, auto counts everything that is stored for the blocks' matrices.",
    ),
    click.option(
        "--budget-bytes",
        type=BYTES,
        metavar="N",
        help="Bytes of the blocks' matrices, instead of --bits (methods nf, lq, auto).",
    ),
    click.option(
        "--file-bytes",
        type=BYTES,
        metavar="N",
        help="Bytes of all files with weights, everything in them counted, such as 60MB; instead "
        "of --keep or --bits. Methods nf, lq and auto choose the formats of embeddings and head "
        "within it, unless --embeddings names one.",
    ),
    click.option(
        "--format",
        "form",
        type=Text(),
        metavar="NAME",
        help="Format of all quantized matrices, instead of --bits (methods nf, lq): nf4, or "
        "nf3-4-bfloat16-64-256 with bits of weights, bits of scales, dtype of the scales' scales, "
        "weights per scale and scales per scale.",
    ),
)

# How a compression quantizes.
code_options = options(
    click.option(
        "--weighting",
        type=click.Choice(["none", "fisher", "input", "both"]),
        help="Weights of the quantization errors: none, Fisher information, second moments of the "
        "inputs, or both (methods nf, lq, auto).  [default: none; auto: both]",
    ),
    click.option(
        "--feedback/--no-feedback",
        default=None,
        help="Compensate the error of each quantized weight in the following ones (GPTQ).  "
        "[default: on if --weighting is input or both]",
    ),
    click.option(
        "--factors",
        type=Text(),
        metavar="NAME",
        help="Format of low-rank factors, such as nf8. dense: they are stored in --dtype (methods "
        "lq, auto).  [default: not quantized; auto: nf8]",
    ),
)

# Which statistics a compression takes, and how it allocates a budget.
statistics_options = options(
    click.option(
        "--samples",
        type=COUNT,
        help="Largest number of calibration sequences.  [default: enough for the width of the "
        "model's MLPs, at least 65536 tokens]",
    ),
    click.option(
        "--seq-len",
        type=LENGTH,
        help="Tokens of a calibration sequence.  [default: 1024, or the length of the .npy array]",
    ),
    click.option(
        "--allocation",
        type=Text(),
        metavar="NAME",
        help="Policy that allocates the budget: uniform, global, block-influence, last-k and "
        "others; for methods nf, lq and auto bisection or milp. An unknown name lists them.  "
        "[default: the method's]",
    ),
    click.option(
        "--temperature",
        type=Real(1e-6, 1e6),
        help="Temperature of the policy block-influence: a small one compresses few blocks "
        "strongly.  [default: chosen on held-out calibration sequences]",
    ),
    click.option(
        "--prefix",
        type=click.Choice(["dense", "compressed", "corrective"]),
        help="How calibration statistics are taken. dense: from the original model, in one pass. "
        "compressed: block by block, with inputs from the blocks compressed so far. corrective: "
        "the same, fitting the outputs of the original model.  [default: the method's]",
    ),
)

# What a compression stores.
stored_options = options(
    click.option(
        "--embeddings",
        type=Text(),
        metavar="FORMAT",
        help="Format of the embeddings of tokens and positions and of the output head: nf8, nf4, "
        "another name as for --format, or float32, bfloat16 or float16.  [default: as they are; "
        "with --file-bytes and methods nf, lq and auto chosen within it]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Dtype of the stored weights; of quantizing methods, of all weights that are not "
        "quantized.  [default: as in MODEL; with quantizing methods float16; bfloat16 if MODEL is "
        "a quantized GGUF file]",
    ),
    click.option(
        "--elastic",
        is_flag=True,
        default=None,
        help="Store the dense model and factors for all budgets, instead of --keep. The budget is "
        "chosen later with: lordjax export --keep.",
    ),
)

field_option = click.option(
    "--field",
    type=Text(),
    metavar="NAME",
    default="text",
    show_default=True,
    help="Field of the text in the records of .jsonl, .jsonl.gz and .parquet files.",
)

as_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."
)


def output(result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Prints a command's result on stdout, as JSON or for people.

    Args:
      result: what is printed.
      as_json: prints JSON.
      show: prints the result for people.
    """
    if as_json:
        for path, number in non_finite(result).items():
            say(f"note: {path} is {number}; in JSON it is null")
        click.echo(dumps_measured(result, indent=1))
    else:
        show(result)
