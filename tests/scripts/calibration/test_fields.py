"""``--field``, kinds of record files, and windows longer than the model's positions."""

import gzip
import json

import numpy as np
import pytest
from commands import fails, run

WORDS = [f"def f{i}(x):\n    return x + {i * i}\n" for i in range(60)]


@pytest.fixture
def data(tmp_path):
    """The same texts under another name, in a compressed file with a byte order mark."""
    lines = "".join(
        json.dumps({"id": str(i), "body": text}) + "\r\n" for i, text in enumerate(WORDS)
    )
    path = tmp_path / "data.JSONL.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines.encode()))
    return path


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    return path


def test_evaluate_reads_the_field(tiny, data, plain):
    how = ("--seq-len", 32, "--windows", 4, "--json")
    found = json.loads(run("evaluate", tiny, "--tokens", data, "--field", "body", *how).stdout)
    expected = json.loads(run("evaluate", tiny, "--tokens", plain, *how).stdout)
    assert found["perplexity"] == expected["perplexity"]
    fails(
        "it has 'id', 'body'; name the field of the text (--field)",
        "evaluate",
        tiny,
        "--tokens",
        data,
    )


def test_compress_and_finetune_read_the_field(tiny, data, tmp_path):
    out = tmp_path / "small"
    how = ("--calibration", data, "--field", "body", "--samples", 4, "--seq-len", 32)
    found = run("compress", tiny, out, *how, "--method", "svd-llm", "--keep", 0.5)
    assert found.exit_code == 0, found.stderr
    assert not (tmp_path / "no").exists()
    fails('no "nobody" with a text', "compress", tiny, tmp_path / "no", *how[:3], "nobody")
    train = ("--data", data, "--field", "body", "--seq-len", 32, "--steps", 1, "--batch", 2)
    found = run("finetune", out, tmp_path / "tuned", *train)
    assert found.exit_code == 0, found.stderr


@pytest.mark.full
def test_windows_beyond_rotary_positions_are_said(tiny, tmp_path):
    """The tiny model has 64 positions."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(1, 200, (4, 80)))
    note = "note: windows of 80 tokens, but the model's longest sequence is 64"
    found = run("evaluate", tiny, "--tokens", tmp_path / "ids.npy")
    assert found.exit_code == 0 and note in found.stderr
    how = ("--method", "svd-llm", "--keep", 0.5)
    found = run("compress", tiny, tmp_path / "out", "--calibration", tmp_path / "ids.npy", *how)
    assert found.exit_code == 0 and note in found.stderr
    short = run("evaluate", tiny, "--tokens", tmp_path / "ids.npy", "--seq-len", 64)
    assert "longest sequence" not in short.stderr
