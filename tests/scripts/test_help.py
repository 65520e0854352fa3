"""Help texts: every one is there and can be read alone."""

import click
import pytest

from lordjax.scripts.cli import cli

OPTIONS = [
    pytest.param(option, id=f"{name} {option.opts[0]}")
    for name, command in cli.commands.items()
    for option in command.params
    if isinstance(option, click.Option)
]


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_explains_itself(option):
    text = (option.help or "").split("  [default")[0]
    assert text.endswith(".")
    assert not text.startswith(("As ", "Of ", "That "))
    assert len(text.split()) >= 4


@pytest.mark.parametrize("name", cli.commands)
def test_the_list_of_commands_shows_whole_sentences(name):
    command = cli.commands[name]
    assert command.get_short_help_str(58) == command.help.splitlines()[0]
    assert command.help.splitlines()[0].endswith(".")


@pytest.mark.parametrize("word", ["MODEL", "OUT", "PATH"])
def test_the_group_says_what_arguments_are(word):
    assert f" {word} is " in cli.help
