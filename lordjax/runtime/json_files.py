"""JSON that every program can read: without NaN and Infinity, which are no JSON.

This is the only module that makes JSON; `input_files` reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """Returns a value as JSON; a NaN or an infinite number is an error.

    Args:
      value: what JSON can hold.
      **options: arguments of ``json.dumps``.

    Raises:
      ValueError: if a number is not finite; names its place.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError as error:
        for path, number in _non_finite(value, ""):
            raise ValueError(
                f"{path or 'the value'} is {number}, which JSON cannot hold; expected a finite "
                "number"
            ) from error
        raise


def dumps_measured(value: Any, **options: Any) -> str:
    """Returns measurements as JSON; what is not finite is null, because it has no number.

    Args:
      value: what JSON can hold, such as the result of a command or a report.
      **options: arguments of ``json.dumps``.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def as_read(value: Any) -> Any:
    """Returns a value as it is after it was written and read: tuples are lists, keys are texts.

    Args:
      value: what JSON can hold.

    Raises:
      ValueError: if a number is not finite; names its place.
    """
    return json.loads(dumps(value))


def non_finite(value: Any) -> dict[str, float]:
    """Returns path -> number of every NaN and infinite number in a JSON value."""
    return dict(_non_finite(value, ""))


def _non_finite(value: Any, path: str) -> list[tuple[str, float]]:
    if isinstance(value, float):
        return [] if math.isfinite(value) else [(path, value)]
    if isinstance(value, Mapping):
        items: Any = value.items()
    else:
        items = enumerate(value) if isinstance(value, list | tuple) else ()
    inner = (_non_finite(each, f"{path}.{key}" if path else str(key)) for key, each in items)
    return [row for rows in inner for row in rows]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
