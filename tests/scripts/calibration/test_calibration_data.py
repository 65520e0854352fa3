"""``--calibration``: mixtures, what a report says about them, and how many tokens are enough."""

import dataclasses
import json

import numpy as np
import pytest
from commands import WINDOW, fails, run

from lordjax.data.token_count import LEAST_TOKENS
from lordjax.data.token_windows import fingerprint, load_tokens
from lordjax.scripts import calibration_data
from lordjax.scripts.calibration_data import read_calibration
from lordjax.scripts.console import CALIBRATION
from lordjax.scripts.opened_model import open_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tiny):
    return open_model(str(tiny))


@pytest.fixture
def sources(tmp_path):
    """Text files, a directory and an array, each of tokens that no other one has."""
    (tmp_path / "a.txt").write_text("a" * 3000)
    (tmp_path / "b").mkdir()
    for i in range(3):
        (tmp_path / "b" / f"{i}.txt").write_text("b" * 100)
    np.save(tmp_path / "c.npy", np.full((20, WINDOW), 5))
    return tmp_path


def read(model, calibration, samples=16, seq_len=None, seed=0):
    return read_calibration(model, calibration, seq_len=seq_len, samples=samples, seed=seed)


def test_a_mixture_holds_its_parts_in_proportion_everywhere(model, sources):
    names = [str(sources / name) for name in ("a.txt", "b", "c.npy")]
    text = ",".join(f"{name}:{share}" for name, share in zip(names, (0.5, 0.25, 0.25), strict=True))
    tokens, facts = read(model, text, samples=32)
    assert tokens.shape == (32, WINDOW)
    assert [part["windows"] for part in facts["parts"]] == [16, 8, 8]
    assert [part["source"] for part in facts["parts"]] == names
    assert [part["share"] for part in facts["parts"]] == [0.5, 0.25, 0.25]
    assert [part["documents"] for part in facts["parts"]] == [1, 3, None]
    first = tokens[:, 1]  # a window of b may begin with a separator
    kinds = [
        np.isin(first, own)
        for own in (model.tokenizer().encode("a"), model.tokenizer().encode("b"), [5])
    ]
    assert np.sum(kinds) == 32
    for kind, part in zip(kinds, facts["parts"], strict=True):
        assert fingerprint(tokens[kind]) == part["tokens_sha256"]
        for chosen in (kind[:8], kind[:16], kind[::2], kind[1::2], kind[::4]):
            assert abs(chosen.sum() - part["share"] * len(chosen)) <= 2
    assert facts["tokens_sha256"] == fingerprint(tokens)
    assert facts["tokens_per_neuron"] == pytest.approx(32 * WINDOW / 48)
    assert json.loads(json.dumps(facts)) == facts


def test_one_path_is_read_spread_out_and_an_array_as_it_is(model, sources, text):
    tokens, facts = read(model, str(text), samples=4, seq_len=WINDOW)
    given = {"tokenizer": model.tokenizer(), "seq_len": WINDOW, "vocab_size": 257, "samples": 4}
    np.testing.assert_array_equal(tokens, load_tokens(text, **given, spread=True))
    assert facts["source"] == str(text) and len(facts["parts"]) == 1
    array = np.random.default_rng(0).integers(0, 257, (6, 40))
    np.save(sources / "d.npy", array)
    np.testing.assert_array_equal(read(model, str(sources / "d.npy"), samples=4)[0], array[:4])
    shorter, _ = read(model, str(sources / "d.npy"), seq_len=8)
    np.testing.assert_array_equal(shorter, array[:, :8])


def test_own_text_and_the_standard_library_are_parts(model):
    tokens, facts = read(model, "self,stdlib", samples=4, seq_len=WINDOW)
    again, _ = read(model, "self,stdlib", samples=4, seq_len=WINDOW)
    other, _ = read(model, "self,stdlib", samples=4, seq_len=WINDOW, seed=1)
    np.testing.assert_array_equal(tokens, again)
    assert not np.array_equal(tokens, other)
    assert [part["windows"] for part in facts["parts"]] == [2, 2]
    assert "own text" in facts["source"] and "standard library" in facts["source"]


def test_the_default_is_one_constant(model, monkeypatch, sources):
    expected, _ = read(model, CALIBRATION, samples=2)
    np.testing.assert_array_equal(read(model, None, samples=2)[0], expected)
    monkeypatch.setattr(calibration_data, "CALIBRATION", f"{sources / 'a.txt'},{sources / 'b'}")
    tokens, facts = read(model, None, samples=2, seq_len=WINDOW)
    assert len(facts["parts"]) == 2 and len(tokens) == 2
    assert calibration_data.default_name(model.config) == facts["source"]


def test_a_part_with_too_little_text_is_named(model, sources, capsys):
    (sources / "short.txt").write_text("x" * 70)
    _, facts = read(model, f"{sources / 'a.txt'},{sources / 'short.txt'}", seq_len=WINDOW)
    assert [part["windows"] for part in facts["parts"]] == [8, 2]
    assert f"note: {sources / 'short.txt'} has 2 windows, 8 would be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("{a}:0.5,{b}:0.4", "the shares sum to 0.9; expected 1"),
        ("{a}:0.5,nothing.txt:0.5", "nothing.txt: no such file or directory"),
        ("{a},{empty}", "empty.txt: no text"),
        ("{c},{wide}", "wide.npy: rows of 40 ids, but"),
        ("{a},{b},self,stdlib,{c}", "4 calibration windows for 5 parts"),
        ("self:1.5", "expected a path, and a share in (0, 1]"),
    ],
)
def test_bad_mixtures_are_one_error(tiny, sources, tmp_path, calibration, message):
    (sources / "empty.txt").write_text("")
    np.save(sources / "wide.npy", np.zeros((4, 40), int))
    places = {"a": "a.txt", "b": "b", "c": "c.npy", "empty": "empty.txt", "wide": "wide.npy"}
    text = calibration.format(**{name: sources / file for name, file in places.items()})
    given = ("--calibration", text, "--samples", 4, "--method", "svd")
    fails(message, "compress", tiny, tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


def test_compress_reports_the_mixture_and_warns_of_few_tokens(tiny, sources, tmp_path):
    given = ("--samples", 4, "--seq-len", WINDOW, "--method", "svd", "--json")
    text = f"{sources / 'a.txt'}:0.75,self:0.25"
    made = run("compress", tiny, tmp_path / "out", "--calibration", text, *given)
    assert made.exit_code == 0, made.stderr
    facts = json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]
    assert [part["windows"] for part in facts["parts"]] == [3, 1]
    assert facts["tokens_per_neuron"] == pytest.approx(4 * WINDOW / 48)
    assert "own text: 1/1" in made.stderr
    warnings = [line for line in made.stderr.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "128 calibration tokens" in warnings[0]
    planned = run("plan", tiny, "--no-measure", *given)
    assert [s for s in planned.stderr.splitlines() if s.startswith("warning")] == warnings


def test_enough_is_the_default_of_plan_and_compress(tiny, model):
    planned = run("plan", tiny, "--no-measure", "--json")
    assert planned.exit_code == 0 and planned.stderr == ""
    settings = json.loads(planned.stdout)["settings"]
    assert settings["samples"] * settings["seq_len"] == LEAST_TOKENS
    tokens, facts = read(model, "stdlib", samples=None)
    assert tokens.shape == (settings["samples"], settings["seq_len"])
    assert facts["parts"][0]["documents"] > 200


def test_models_that_write_no_text(tmp_path, model):
    encoder = dataclasses.replace(model, config=dataclasses.replace(model.config, head="masked"))
    with pytest.raises(ValueError, match=r"self: .* has head 'masked' and writes no text"):
        read(encoder, "self")
    assert calibration_data.default_calibration(encoder.config) == "stdlib"
