"""JSON that every program can read."""

import json
import math

import pytest

from lordjax.runtime import json_files

VALUE = {"a": [1.0, {"b": math.inf}, (math.nan,)], "c": -math.inf, "d": None, "e": "NaN"}


def test_what_is_not_finite_is_an_error_that_names_its_place():
    with pytest.raises(ValueError, match=r"a\.1\.b is inf, which JSON cannot hold"):
        json_files.dumps(VALUE)
    with pytest.raises(ValueError, match="the value is nan"):
        json_files.dumps(math.nan)
    assert json.loads(json_files.dumps({"a": [1, 2.5]}, indent=1)) == {"a": [1, 2.5]}


def test_measurements_that_are_not_finite_are_null():
    found = json.loads(json_files.dumps_measured(VALUE))
    assert found == {"a": [1.0, {"b": None}, [None]], "c": None, "d": None, "e": "NaN"}
    assert list(json_files.non_finite(VALUE)) == ["a.1.b", "a.2.0", "c"]


def test_a_value_as_it_is_read_equals_what_a_file_says():
    assert json_files.as_read({1: (2, [3.5]), "a": None}) == {"1": [2, [3.5]], "a": None}
    with pytest.raises(ValueError, match=r"a\.1 is nan"):
        json_files.as_read({"a": [1, math.nan]})
