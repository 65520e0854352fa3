"""A command whose outputs are apart from its inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from lordjax.scripts.flags.types import InputPath, OutputPath


class Verb(click.Command):
    """A command that refuses an output inside one of its inputs or of its other outputs."""

    def invoke(self, ctx: click.Context) -> Any:
        """Checks the paths and runs the command."""
        given = [*_paths(self, ctx)]
        outputs = [(param, path) for param, path in given if isinstance(param.type, OutputPath)]
        for (param, path), (other, second) in itertools.product(outputs, given):
            if param is not other and (path == second or second in path.parents):
                where = "is" if path == second else f"lies inside {second},"
                name = other.get_error_hint(ctx)
                raise click.BadParameter(
                    f"{path} {where} {name}; choose an output apart from it", ctx, param
                )
        return super().invoke(ctx)


def _paths(command: click.Command, ctx: click.Context) -> Iterator[tuple[click.Parameter, Path]]:
    """Yields the parameters that are paths, with their resolved values."""
    for param in command.params:
        if isinstance(param.type, InputPath | OutputPath):
            value = ctx.params.get(param.name or "")
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            for each in values:
                for name in param.type.paths(each):
                    path = Path(name).expanduser()
                    # The name of a model of the hub is no directory that something lies in.
                    if isinstance(param.type, OutputPath) or path.exists():
                        yield param, path.resolve()
