"""The door for files: one kind of error that names the file, and no way out of a directory."""

import json
import math
import os

import pytest

from lordjax.runtime.input_files import (
    DEEPEST_JSON,
    check_no_links,
    inside,
    parse_json,
    read_json,
    reading,
)


class PanicException(BaseException):  # as Rust raises it
    __module__ = "pyo3_runtime"


ERRORS = (
    *(TypeError("x"), KeyError("x"), RecursionError(), MemoryError(), OverflowError("x")),
    *(EOFError(), ValueError("of the library"), UnicodeError("\ud800"), PanicException("x")),
    OSError("of the library"),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_a_library_raises_names_the_file(tmp_path, error):
    with (
        pytest.raises(ValueError, match=f"^{tmp_path}: not a plan \\(.+\\); write it") as caught,
        reading(tmp_path, "not a plan", "write it again"),
    ):
        raise error
    assert str(caught.value).encode() and caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), ImportError("x"), GeneratorExit()]
)
def test_what_is_no_damage_passes(tmp_path, error):
    with pytest.raises(type(error)) as caught, reading(tmp_path, "not a plan"):
        raise error
    assert caught.value is error


def test_our_errors_and_those_of_the_system_pass(tmp_path):
    with (
        pytest.raises(ValueError, match=r"^[^:]+/a: no rank$"),
        reading(tmp_path, "not a plan"),
    ):
        raise ValueError(f"{tmp_path}/a: no rank")
    with pytest.raises(IsADirectoryError), reading(tmp_path / "x", "not a plan"):
        tmp_path.open()
    with (
        pytest.raises(ValueError, match=r"x: not a plan .*No such file"),
        reading(tmp_path / "x", "not a plan"),
    ):
        (tmp_path / "x").open()


WRONG = {
    "nothing": b"",
    "cut": b'{"a": [1, 2',
    "a list": b"[1]",
    "binary": b"\xff\xfe{",
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "too deep": b"[" * (DEEPEST_JSON + 1) + b"]" * (DEEPEST_JSON + 1),
    "half a character": b'{"a": "\\ud800"}',
    "half a key": b'{"\\uDFFF": 1}',
    "not a number": b'{"a": NaN}',
    "infinite": b'{"a": -Infinity}',
    "too large": b'{"a": 1e999}',
    "many digits": b'{"a": 1' + b"0" * 5000 + b"}",
    "overflows": b'{"a": 1' + b"0" * 39 + b"}",
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_json(tmp_path, name):
    (tmp_path / "a.json").write_bytes(WRONG[name])
    with pytest.raises(ValueError, match=r"a\.json: (not JSON|expected a JSON object).*complete"):
        read_json(tmp_path / "a.json")


def test_json_that_is_right(tmp_path):
    value = {"a": [1.5, -3, 10**30, None, "\U0001f600"], "\u00e4": {"b": []}}
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(value), "utf-8")
    assert read_json(tmp_path / "a.json") == value
    nested = "[" * DEEPEST_JSON + "]" * DEEPEST_JSON
    assert parse_json(nested, "x") == json.loads(nested)
    assert math.isnan(parse_json("NaN", "x"))  # records of data sets have such


def test_json_is_bounded_by_the_length_of_the_file(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"a\.json: 1,099,511,627,776 bytes; expected JSON of at"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a/../../b", "..", "", ".", "C:\\a", "a\\..\\b", "a\0", 3, None]
)
def test_names_stay_inside(tmp_path, name):
    with pytest.raises(ValueError, match=r"^index: file name .*expected the name of a file"):
        inside(tmp_path, name, "index")


def test_links_stay_inside_or_lead_to_the_cache_of_the_hub(tmp_path):
    (tmp_path / "victim").write_text("x")
    hub = tmp_path / "models--owner--name"
    snapshot, blobs = hub / "snapshots" / "0123abc", hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "deadbeef").write_text("x")
    (snapshot / "a.safetensors").symlink_to("../../blobs/deadbeef")
    (snapshot / "b.safetensors").symlink_to("a.safetensors")
    (snapshot / "c.safetensors").symlink_to(tmp_path / "victim")
    (snapshot / "folder").symlink_to(tmp_path)
    for name in ("a.safetensors", "b.safetensors", "not/there"):
        assert inside(snapshot, name, "index") == snapshot / name
    for name in ("c.safetensors", "folder/victim"):
        with pytest.raises(ValueError, match=r"index: .* is a link to .*victim, outside of"):
            inside(snapshot, name, "index")


def test_directories_that_are_written_have_no_links(tmp_path):
    (tmp_path / "run" / "entries").mkdir(parents=True)
    check_no_links(tmp_path / "run", "remove it")
    os.symlink(tmp_path, tmp_path / "run" / "entries" / "x")
    with pytest.raises(ValueError, match=r"entries.x: a symbolic link.*; remove it"):
        check_no_links(tmp_path / "run", "remove it")
