"""The command line as tests call it."""

from click.testing import CliRunner

from lordjax.scripts.cli import cli

WINDOW = 32


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def calibration(path):
    return "--calibration", path, "--samples", 4, "--seq-len", WINDOW


def fails(message, *arguments):
    """Runs a command that must end as one line of error and exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in result.stderr
