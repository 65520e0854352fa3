"""Atomic files: a failed write leaves the old file."""

import json
import math
import os

import numpy as np
import pytest

from lordjax.storage.tensor_files import TensorFile, write_json, write_tensors, write_text


def test_a_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "text"
    write_text(path, "old\n")

    def fails(handle):
        raise OSError("no room")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no room"):
        write_text(path, "new\n")
    assert path.read_text() == "old\n"


def test_json_is_indented_and_ends_with_a_line_break(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  1\n ]\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_json_without_numbers_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json: b\.0 is nan"):
        write_json(tmp_path / "a.json", {"b": [math.nan]})
    assert not list(tmp_path.iterdir())


HEADERS = {
    "a hole": {"data_offsets": [8, 32]},
    "too long": {"shape": [2, 4]},
    "negative": {"shape": [-2, -3]},
    "a text": {"shape": ["2", 3]},
    "huge": {"shape": [2**62, 2**62]},
    "another dtype": {"dtype": "F8_E4M3"},
    "no offsets": {"data_offsets": []},
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, damage):
    file = tmp_path / "x"
    write_tensors(file, {"a": np.ones((2, 3), np.float32)})
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    table["a"] |= HEADERS[damage]
    header = json.dumps(table).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(ValueError, match=r"x: not a safetensors file"):
        TensorFile(file)
    file.write_bytes((2**60).to_bytes(8, "little") + data[8:])
    with pytest.raises(ValueError, match=f"a header of {2**60} bytes in a file of"):
        TensorFile(file)
