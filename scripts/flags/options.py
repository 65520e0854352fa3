"""Options that verbs share: how values are read, and decorators that add several at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click


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


def bit_widths(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, ...]:
    """Reads positive numbers of bits that are separated by commas; none of an empty text."""
    del context
    try:
        numbers = [float(part) for part in value.split(",") if value]
    except ValueError:
        numbers = [0.0]
    if not all(0 < number < float("inf") for number in numbers):
        raise click.BadParameter(f"{value!r} is not a list like 4.1,3.1", param=parameter)
    return tuple(numbers)


def counts(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Reads positive integers that are separated by commas."""
    del context
    parts = value.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise click.BadParameter(f"{value!r} is not a list like 1,8,32", param=parameter)
    return tuple(int(part) for part in parts)


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


def options(*each: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One decorator that adds several options, in this order."""

    def add(command: Any) -> Any:
        for option in reversed(each):
            command = option(command)
        return command

    return add


# Method and size of a compression: of `compress` and `plan`.
budget_options = options(
    click.option(
        "--method", default="modegpt", show_default=True, help="A wrong name lists them all."
    ),
    click.option(
        "--keep",
        type=float,
        callback=share,
        help="Share of the block linear weights that stays, in (0, 1]; factor pairs count in "
        "full.  [default: 0.8]",
    ),
    click.option(
        "--ranks",
        callback=ranks,
        metavar="LAYER=RANK,…",
        help="Instead of --keep: ranks by layer type, such as mlp/down=2304 (regular expressions; "
        "layer_3/mlp/down is one layer). All others stay dense.",
    ),
    click.option(
        "--bits",
        type=click.FloatRange(min=0, min_open=True),
        help="Of nf and lq: average bits per block weight of the codes. Of auto: of all that is "
        "stored for the blocks' matrices.",
    ),
    click.option(
        "--budget-bytes",
        type=click.IntRange(min=1),
        metavar="N",
        help="Instead of --bits: bytes of the blocks' matrices.",
    ),
    click.option(
        "--format",
        "form",
        metavar="NAME",
        help="Instead of --bits: the codes of all matrices, such as nf4 or nf3-4-bfloat16-64-256 "
        "(bits, bits of scales, dtype of their scales, weights per scale, scales per scale).",
    ),
)

# How a compression makes codes.
code_options = options(
    click.option(
        "--weighting",
        type=click.Choice(["none", "fisher", "input", "both"]),
        help="What errors of a matrix cost: see the README.  [default: none; auto: both]",
    ),
    click.option(
        "--feedback/--no-feedback",
        default=None,
        help="Codes make up for each other's errors (GPTQ).  [default: where --weighting is "
        "input or both]",
    ),
    click.option(
        "--factors",
        metavar="NAME",
        help="Format of factor pairs, such as nf8; 'dense' for lq and auto: --dtype.  [default: "
        "--dtype; auto: nf8]",
    ),
)

# What a compression collects, and how it shares a budget out.
statistics_options = options(
    click.option(
        "--samples",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        help="Calibration windows, at most.",
    ),
    click.option(
        "--seq-len",
        type=click.IntRange(min=2),
        help="Tokens per window.  [default: 1024, or the length of the .npy]",
    ),
    click.option(
        "--allocation",
        help="How a budget is shared out; of nf, lq and auto: bisection or milp.  [default: the "
        "method's own]",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0, min_open=True),
        help="Of block-influence: small takes from few blocks.  [default: chosen on held-out "
        "calibration windows]",
    ),
    click.option(
        "--prefix",
        type=click.Choice(["dense", "compressed", "corrective"]),
        help="Statistics from the untouched model in one pass, or block after block from the model "
        "compressed so far, fitting its own or the untouched outputs.  [default: the method's own]",
    ),
)

# What a compression stores.
stored_options = options(
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Dtype of the stored weights; with codes, of the other matrices.  [default: as in "
        "MODEL, with codes float16; of a quantised GGUF file bfloat16]",
    ),
    click.option(
        "--elastic",
        is_flag=True,
        default=None,
        help="Instead of --keep: the dense model with the factors beside it; export --keep cuts it "
        "to any budget.",
    ),
)

as_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."
)


def output(result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Prints a verb's result on stdout: as JSON, or for people."""
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        show(result)
