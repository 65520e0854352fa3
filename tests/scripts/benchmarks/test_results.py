"""Files that benchmarks write: an older one stays until the new one is complete."""

import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from lordjax.scripts.benchmarks import compress
from lordjax.scripts.benchmarks.protocol import protocol_tokens, write_results
from lordjax.scripts.report.figures import save_figure


def test_results_replace_a_file_when_they_are_complete(tmp_path):
    out = tmp_path / "new" / "out.json"
    write_results(str(out), [1])
    write_results(str(out), [1, 2], complete=False)
    assert json.loads(out.read_text()) == [1]
    assert json.loads((tmp_path / "new" / "out.json.partial").read_text()) == [1, 2]
    write_results(str(out), [{"perplexity": math.inf}])
    assert json.loads(out.read_text()) == [{"perplexity": None}]
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]
    write_results(None, [1])


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf"])
def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, name):
    save_figure(Figure(), tmp_path / name)
    old = (tmp_path / name).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=rf"{name}: cannot be written \(.*No space left"):
        save_figure(Figure(figsize=(1, 1)), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == old


def test_token_arrays_come_through_the_door(tmp_path):
    rows = np.arange(12).reshape(3, 4)
    for name in ("calib", "eval"):
        np.save(tmp_path / f"{name}_text.npy", rows)
    first, second = protocol_tokens(tmp_path, "text", 2, 9)
    np.testing.assert_array_equal(first, rows[:2])
    np.testing.assert_array_equal(second, rows)
    np.save(tmp_path / "eval_text.npy", np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"eval_text\.npy: cannot be read"):
        protocol_tokens(tmp_path, "text", 2, 9)
    with pytest.raises(FileNotFoundError, match=r"calib_none\.npy"):
        protocol_tokens(tmp_path, "none", 2, 9)


@pytest.mark.parametrize(
    "text", ["[", "{}", "[{}]", "[]", '[{"perplexity": {"a": "x"}}]', "\ud800"]
)
def test_a_damaged_table_is_named(tmp_path, text):
    (file := tmp_path / "old.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=rf"^{file}: "):
        compress.main(["--table", str(file)], standalone_mode=False)
