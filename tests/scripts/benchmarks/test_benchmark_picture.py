"""The picture of the README: from a file of numbers, the same bytes every time."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from lordjax.scripts.benchmarks import picture

HEADER = "method,case,bits_per_weight,perplexity,table,commit\n"
ROWS = "dense,,16,29.2,,\nsmall,a,4,40,,\nsmall,b,3,50,,\nwild,a,8,5000,,\n"


def run(*arguments):
    return CliRunner().invoke(picture.main, [str(a) for a in arguments], catch_exceptions=False)


def test_every_method_is_named_and_the_bytes_are_the_same(tmp_path):
    (tmp_path / "data.csv").write_text(HEADER + ROWS)
    for name in ("a.svg", "b.svg", "c.png"):
        done = run("--data", tmp_path / "data.csv", "--out", tmp_path / "pictures" / name)
        assert done.exit_code == 0, done.output
    assert "small" in done.output
    assert "3: 50" in done.output
    text = (tmp_path / "pictures" / "a.svg").read_text()
    assert text == (tmp_path / "pictures" / "b.svg").read_text()
    assert "small" in text
    assert "wild from 5,000" in text  # off the scale, and said so
    assert "perplexity" in text
    assert "bits per weight" in text
    assert (tmp_path / "pictures" / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + "dense,,16,many,,\n", "line 2: expected method"),
        ("method,perplexity\ndense,3\n", "line 2: expected method"),
        (HEADER + "small,a,4,40,,\n", "no row of method 'dense'"),
    ],
)
def test_bad_data_is_named(tmp_path, content, message):
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        picture.read(tmp_path / "data.csv")


def test_the_committed_picture_is_that_of_the_committed_numbers(tmp_path):
    folder = Path(__file__).parents[3] / "docs" / "pages" / "pictures"
    methods = picture.by_method(picture.read(folder / "results.csv"))
    text = (folder / "perplexity.svg").read_text()
    assert {"modegpt", "lord", "auto", "svd-llm", "rom", "svd"} <= methods.keys()
    for name in methods:
        assert name in text
