"""Atomic files: a failed write leaves the old file."""

import os

import pytest

from lordjax.storage.tensor_files import write_json, write_text


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
