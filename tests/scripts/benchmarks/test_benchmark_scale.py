"""The benchmark of growth: exponents of known powers, and a run of the smallest sizes."""

import json

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lordjax.scripts.benchmarks import scale
from lordjax.scripts.benchmarks.scale import AXES, cases, exponent, growth, main, markdown


@given(
    st.floats(-1, 4),
    st.floats(1e-3, 1e3),
    st.lists(st.integers(1, 10**6), min_size=2, max_size=6, unique=True),
)
def test_the_exponent_of_a_power_is_found(p, c, sizes):
    x = [float(size) for size in sizes]
    assert exponent(x, [c * size**p for size in x]) == pytest.approx(p, abs=1e-6)


def test_no_exponent_where_there_is_no_power():
    assert exponent([2.0], [1.0]) is None
    assert exponent([1.0, 2.0], [0.0, 1.0]) is None


def test_one_thing_varies_at_a_time():
    along = cases((8, 32, 16), (2, 4), (1,))
    assert along == {
        "width": [(32, 4, 1), (16, 4, 1), (8, 4, 1)],
        "layers": [(16, 2, 1), (16, 4, 1)],
        "tokens": [(16, 4, 1)],
    }


FIRST = {"first_seconds": 1.0, "first_peak_bytes": 500}


def row(width, tokens, seconds):
    facts = {"width": width, "layers": 2, "tokens": tokens, "model_bytes": 5000}
    times = {"factors": width**3.0, "total": width**3.0 + seconds}
    return {**facts, "seconds": times, "peak_bytes": 100 + width**2, **FIRST}


def test_growth_leaves_out_what_a_process_takes_without_work():
    rows = [row(width, 8, 0.0) for width in (4, 8, 16)]
    found = growth(rows, "width", 100)
    assert found["memory"] == pytest.approx([2, 2])
    assert found["factors s"] == found["total s"] == pytest.approx([3, 3])
    table = markdown({"cases": rows, "growth": {"width": found}, "bare_bytes": 100})
    assert "| width | 2.00 / 2.00 | 3.00 / 3.00 | 3.00 / 3.00 |" in table


@pytest.mark.full
@pytest.mark.parametrize("method", ["svd", "nf"])
def test_the_smallest_sizes_run(method):
    """In processes of their own."""
    flags = ["--shrinks", "32", "--depths", "1", "--windows", "2", "--length", "8"]
    flags += ["--vocabulary", "64", "--method", method, "--json"]
    result = CliRunner().invoke(main, flags, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (case,) = found["cases"]
    assert [case[axis] for axis in AXES] == [128, 1, 16]
    assert min(case["first_peak_bytes"], case["peak_bytes"]) > found["bare_bytes"] > 1e7
    assert case["seconds"]["total"] > 0
    assert found["growth"]["width"]["total s"] == [None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "nf4"], "'nf4' is none of svd"),
        (["--shrinks", "3"], "cannot be divided"),
        (["--depths", "2,x"], "is not a list"),
    ],
)
def test_wrong_arguments_end_before_the_work(arguments, message, monkeypatch):
    monkeypatch.setattr(scale, "measure", None)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code != 0 and message in result.output
