"""The command that shows a model; its implementation is imported when it runs."""

from __future__ import annotations

import functools
from typing import Any

import click

from lordjax.scripts.flags.options import as_json_option, model_argument, output
from lordjax.scripts.flags.types import OutputPath
from lordjax.scripts.flags.verb import Verb


@click.command(cls=Verb)
@model_argument
@click.option("--full", is_flag=True, help="List every parameter of every block.")
@click.option(
    "--picture",
    type=OutputPath(file=True),
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
