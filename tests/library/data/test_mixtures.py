"""Mixtures: what a text means, windows per part, and an order that is even everywhere."""

import numpy as np
import pytest

from lordjax.data.mixtures import Part, interleaved, parse, window_counts

WORDS = ("self", "stdlib")
MIXTURES = [(32, 32), (48, 16), (21, 21, 22), (60, 4), (100, 50, 25, 25), (1, 63), (256, 256)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.txt", [("a.txt", 1)]),
        ("self", [("self", 1)]),
        ("a.txt:1", [("a.txt", 1)]),
        ("a.txt,b/", [("a.txt", 0.5), ("b/", 0.5)]),
        ("a.txt:0.75,self:0.25", [("a.txt", 0.75), ("self", 0.25)]),
        ("a:0.3333333,b:0.3333333,c:0.3333333", [(name, 0.3333333) for name in "abc"]),
        ("http:/x:0.5,stdlib:0.5", [("http:/x", 0.5), ("stdlib", 0.5)]),
    ],
)
def test_parts(text, expected):
    assert parse(text, WORDS) == [Part(*pair) for pair in expected]


def test_what_exists_is_one_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a,b.txt", "c:0.5", "self"):
        (tmp_path / name).write_text("")
    assert parse("a,b.txt", WORDS) == [Part("a,b.txt", 1)]
    assert parse("c:0.5", WORDS) == [Part("c:0.5", 1)]
    assert parse("c:0.5,self", WORDS) == [Part("c:0.5", 0.5), Part("self", 0.5)]
    assert parse("~/a,b.txt", WORDS) == [Part(f"{tmp_path}/a,b.txt", 1)]
    assert parse("x,~/c", WORDS) == [Part("x", 0.5), Part(f"{tmp_path}/c", 0.5)]
    assert len(parse(",".join(f"part{i}" for i in range(999)), WORDS)) == 999  # too long for a name
    assert parse("c:0.5:0.25,x:0.75") == [Part("c:0.5", 0.25), Part("x", 0.75)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,,b", "a part is empty"),
        ("a,", "a part is empty"),
        (":0.5,b:0.5", "expected a path, and a share"),
        ("a:0.5,b", "b has no share, but others have"),
        ("a:0.5,b:0.4", "the shares sum to 0.9; expected 1"),
        ("a:0.5,b:0.50001", "the shares sum to 1.00001; expected 1"),
        ("a:0,b:1", "a:0: share 0 of 'a'"),
        ("a:-1,b:2", "a:-1: share -1 of 'a'"),
        ("a:nan,b:1", "a:nan: share nan of 'a'"),
        ("a:half,b:0.5", "a:half: no such file or directory, and 'half' is no share"),
        ("a:0.5,a:0.5", "a is given twice"),
    ],
)
def test_bad_mixtures(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text, WORDS)


def parts_of(*shares):
    return [Part(str(i), share) for i, share in enumerate(shares)]


@pytest.mark.parametrize(
    ("shares", "samples", "expected"),
    [
        ((1.0,), 7, [7]),
        ((0.5, 0.5), 64, [32, 32]),
        ((0.5, 0.5), 3, [2, 1]),
        ((0.42, 0.35, 0.23), 10, [4, 4, 2]),
        ((0.98, 0.01, 0.01), 10, [8, 1, 1]),
        ((1 / 3, 1 / 3, 1 / 3), 64, [22, 21, 21]),
    ],
)
def test_windows_of_parts_are_rounded_by_largest_remainder(shares, samples, expected):
    assert window_counts(parts_of(*shares), samples) == expected


def test_every_part_needs_a_window():
    with pytest.raises(ValueError, match=r"2 calibration windows for 3 parts.*--samples"):
        window_counts(parts_of(0.5, 0.25, 0.25), 2)


def deviation(order, counts):
    """The largest distance of the parts of any beginning from their shares, in windows."""
    shares = np.array(counts) / sum(counts)
    held = np.cumsum(np.eye(len(counts))[order], axis=0)
    return np.abs(held - shares * np.arange(1, len(order) + 1)[:, None]).max()


@pytest.mark.parametrize("counts", MIXTURES)
def test_any_beginning_holds_the_mixture(counts):
    order = interleaved(counts)
    np.testing.assert_array_equal(np.bincount(order), counts)
    assert deviation(order, counts) <= 2


@pytest.mark.parametrize("counts", MIXTURES)
@pytest.mark.parametrize("step", range(2, 9))
def test_every_kth_window_holds_the_mixture(counts, step):
    order = interleaved(counts)
    for first in range(step):
        assert deviation(order[first::step], counts) <= 4


@pytest.mark.parametrize("counts", MIXTURES)
def test_evenly_spread_windows_hold_the_mixture(counts):
    """On average over their number; an alternating order would be half of the windows off."""
    order, shares = interleaved(counts), np.array(counts) / sum(counts)
    off = []
    for count in range(1, len(order)):
        chosen = order[np.linspace(0, len(order) - 1, count).round().astype(int)]
        held = np.bincount(chosen, minlength=len(counts))
        off.append(np.abs(held - shares * count).max() / len(order))
    assert np.mean(off) < 0.05
