"""The command ``lordjax``: its list of commands, and how errors are printed.

A mistake of the user is printed as one line ``error: …`` on stderr, with exit code 2. With
``LORDJAX_TRACEBACK=1`` in the environment it is a traceback. All other exceptions are bugs.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

import click

from lordjax.runtime.interruption import interruption, signals_end
from lordjax.scripts.console import printable_streams
from lordjax.scripts.flags.compress import compress, demo, plan
from lordjax.scripts.flags.measure import (
    benchmark,
    evaluate,
    evaluate_choices,
    evaluate_code,
    generate,
)
from lordjax.scripts.flags.show import inspect
from lordjax.scripts.flags.write import convert, export, finetune, merge
from lordjax.scripts.program_cache import keep_programs

VERBS = (
    compress,
    plan,
    demo,
    finetune,
    merge,
    export,
    convert,
    generate,
    evaluate,
    evaluate_code,
    evaluate_choices,
    benchmark,
    inspect,
)

LESS = "choose smaller batches, fewer tokens, or a machine with more memory"
USER_ERRORS = (ValueError, OSError, KeyError, ImportError, click.ClickException)


class Group(click.Group):
    """A command group that prints errors as one line."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Runs a command; turns exceptions into exit codes unless ``standalone_mode`` is off."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.Abort as error:  # where `main` has installed no handler
            notes = getattr(error.__cause__, "__notes__", [])
            click.echo(interruption(signal.SIGINT, notes, ["lordjax", *sys.argv[1:]]), err=True)
            sys.exit(128 + signal.SIGINT)
        except MemoryError as error:
            _fail(f"out of memory ({one_line(error)}); {LESS}", error)
        except USER_ERRORS as error:
            if is_bug(error):
                raise
            _fail(one_line(error), error)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):  # XLA's word
                raise
            _fail(f"out of memory ({one_line(error).split(';')[0]}); {LESS}", error)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(text: str, error: BaseException) -> NoReturn:
    """Prints an error as one line and exits; raises it if a traceback is asked for."""
    if os.environ.get("LORDJAX_TRACEBACK"):
        raise error
    click.echo(f"error: {text}", err=True)
    sys.exit(2)


def is_bug(error: BaseException) -> bool:
    """Returns whether Python raised the error; errors of our checks contain a sentence."""
    if isinstance(error, ImportError):
        return error.name is not None
    return isinstance(error, KeyError) and " " not in str(error.args[0] if error.args else "")


def one_line(error: BaseException) -> str:
    """Returns an exception's message without line breaks and without ``KeyError``'s quotes."""
    if isinstance(error, click.ClickException):
        text = error.format_message()
    elif isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    else:
        text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ") or type(error).__name__


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lordjax")
def cli() -> None:
    """Compress pretrained transformers by matrix decomposition.

    MODEL is a Hugging Face directory or hub id, a GGUF file, or a directory that a lordjax command
    wrote.

    OUT is the directory that a command writes a model into. It must be new or empty.

    PATH is data: a text file, a directory of text or source files, a .jsonl file, or a .npy array
    of token ids.

    "lordjax COMMAND --help" lists the options of a command.
    """


for verb in VERBS:
    cli.add_command(verb)


def main() -> None:
    """Entry point of the command."""
    with signals_end(["lordjax", *sys.argv[1:]]):
        printable_streams()
        keep_programs()
        cli.main(prog_name="lordjax")
