"""Reads the rotary embedding of a Hugging Face config, as transformers 4 and 5 write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lordjax.conversions.families.config.key_names import (
    HARMLESS,
    ruled_out_keys,
    says_nothing,
    unknown_key,
)
from lordjax.models.config import ModelConfig, Rope

Values = Mapping[str, Any]

# Keys of the rotary embedding. transformers 4 writes the first two, transformers 5 the third; some
# converters write the original length at the top level.
ROPE_KEYS = frozenset(
    ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
)
# Kind of scaling -> required keys, optional keys. Where transformers ignores the original length,
# it is accepted and dropped.
_LENGTH = "original_max_position_embeddings"
_STRETCHES = {"short_factor", "long_factor"}  # lists of one number per rotary pair
_SCALINGS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), {"factor", _LENGTH}),
    "linear": ({"factor"}, {_LENGTH}),
    "dynamic": ({"factor"}, {_LENGTH}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {_LENGTH}),
    "yarn": (
        set(),
        {"factor", _LENGTH, "attention_factor", "beta_fast", "beta_slow"}
        | {"mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": (_STRETCHES, {"factor", _LENGTH, "attention_factor"}),
}


def no_rope(hf_config: Values, values: Values, problems: list[str]) -> None:
    """Returns None: the family has no rotary positions."""
    del hf_config, values, problems


def half_split(head_size: int, rotary_size: int | None, *, neighbours: bool = True) -> np.ndarray:
    """Returns the column order of a head that puts the two columns of a pair half a head apart.

    Columns that are not rotated are paired, too.

    Args:
      head_size: number of columns of a head.
      rotary_size: number of rotated columns, the first ones; None means all.
      neighbours: whether a stored pair is two neighbours; otherwise its columns are half of
        ``rotary_size`` apart.

    Returns:
      Indices of the stored columns, ``[head_size]``.
    """
    size = rotary_size or head_size
    turning = np.arange(size).reshape(-1, 2) if neighbours else np.arange(size).reshape(2, -1).T
    still = np.arange(size, head_size).reshape(2, -1).T
    return np.concatenate([turning, still]).T.reshape(-1)


def take_share(hf_config: Values, share: Any) -> tuple[dict[str, Any], Any]:
    """Takes the rotated fraction of a head out of the rotary keys, where transformers 5 writes it.

    Args:
      hf_config: content of ``config.json``.
      share: fraction to return if the rotary keys do not hold one.

    Returns:
      The config without ``partial_rotary_factor`` in the rotary keys, and the fraction.
    """
    plain = dict(hf_config)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(part := hf_config.get(key), Mapping):
            plain[key] = dict(part)
            share = plain[key].pop("partial_rotary_factor", share)
    return plain, share


def rotary_size(key: str, share: Any, values: Values, problems: list[str]) -> int:
    """Returns the number of rotated columns of a head.

    Args:
      key: config key of the fraction, for error messages.
      share: rotated fraction of the columns.
      values: config values.
      problems: list that problems are appended to.
    """
    width = values["hidden_size"] // values["num_attention_heads"]
    size = int(width * share) if is_factor(share) else 0
    if not (0 < size <= width and size % 2 == 0):
        problems.append(
            f"{key} = {share!r}: expected an even number of the {width} columns of a head"
        )
    return size


def partly_rotary(hf_config: Values, values: Values, problems: list[str]) -> Rope:
    """Reads the rotary embedding of the first columns of a head, a fraction of them.

    The fraction is ``partial_rotary_factor``, at the top level or in the rotary keys.
    """
    plain, share = take_share(hf_config, values["partial_rotary_factor"])
    size = rotary_size("partial_rotary_factor", share, values, problems)
    rope = read_rope(plain, values, problems)
    whole = values["hidden_size"] // values["num_attention_heads"]
    return rope if size == whole else dataclasses.replace(rope, size=size)


def turned(columns: slice, config: ModelConfig) -> slice | np.ndarray:
    """Returns outputs of queries or keys in another order: rotary pairs half a head apart.

    In the file the columns of a rotary pair are half of the rotary part apart.

    Args:
      columns: outputs of the stored layer that belong to the queries or keys, head by head.
      config: architecture of the model.
    """
    if config.rope is None or config.rope.size is None:
        return columns
    heads = np.arange(columns.start, columns.stop).reshape(-1, config.head_size)
    return heads[:, half_split(config.head_size, config.rope.size, neighbours=False)].reshape(-1)


def read_rope(hf_config: Values, values: Values, problems: list[str]) -> Rope:
    """Reads the rotary embedding, with transformers' order of precedence.

    Args:
      hf_config: content of ``config.json``.
      values: config values with defaults.
      problems: list that problems are appended to.

    Returns:
      The rotary embedding; a default one if there are problems.
    """
    scaling, parameters = hf_config.get("rope_scaling"), hf_config.get("rope_parameters")
    if scaling and parameters and scaling != parameters:
        problems.append("rope_scaling and rope_parameters differ; keep one")
    chosen = scaling or parameters or {}
    if not isinstance(chosen, Mapping):
        problems.append(f"rope_scaling = {chosen!r}: expected an object")
        return Rope()
    given = {key: value for key, value in chosen.items() if value is not None}
    outer = hf_config.get("rope_theta")
    theta = given.pop("rope_theta", values.get("rope_theta", 10_000.0) if outer is None else outer)
    if outer is not None and outer != theta:
        problems.append(f"rope_theta = {outer!r}, but {theta!r} in rope_parameters")
    # A config may have both keys; the newer one, rope_type, takes precedence.
    kind = given.pop("type", "default")
    kind = given.pop("rope_type", kind)
    if not isinstance(kind, str) or kind not in _SCALINGS:
        problems.append(f"rope type {kind!r}: supported: {', '.join(_SCALINGS)}")
        return Rope()
    if given.pop("partial_rotary_factor", 1) != 1:
        problems.append("rope: partial_rotary_factor: only 1 is supported in this family")
    if hf_config.get(_LENGTH) is not None:
        given[_LENGTH] = hf_config[_LENGTH]
    given = {key: given[key] for key in given.keys() - set(ruled_out_keys(hf_config))}
    found = _rope_problems(kind, {"rope_theta": theta} | given)
    problems += found
    return Rope() if found else _build_rope(kind, float(theta), given, values)


def _rope_problems(kind: str, given: Values) -> list[str]:
    required, optional = _SCALINGS[kind]
    problems = [f"rope type {kind}: {key} is missing" for key in sorted(required - set(given))]
    for key, value in given.items():
        if key not in required | optional | {"rope_theta"}:
            if not (says_nothing(value) or HARMLESS.fullmatch(key)):
                problems.append(unknown_key(key, value, f"rope type {kind}"))
        elif key == "truncate" and type(value) is not bool:
            problems.append(f"rope type {kind}: {key} = {value!r}: expected a bool")
        elif key in _STRETCHES:
            if not (isinstance(value, list) and value and all(map(is_factor, value))):
                problems.append(f"rope type {kind}: {key}: expected a list of numbers above 0")
        elif key != "truncate" and not is_factor(value):
            problems.append(f"rope type {kind}: {key} = {value!r}: expected a number above 0")
    if not problems and kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        problems.append("rope type llama3: high_freq_factor: expected more than low_freq_factor")
    if not problems and kind == "yarn" and given["rope_theta"] <= 1:
        problems.append(f"rope_theta = {given['rope_theta']!r}: expected a number above 1")
    return problems


def is_factor(value: Any) -> bool:
    """Returns whether a value is a finite number above 0."""
    return type(value) in (int, float) and 0 < value < 1e300


def _build_rope(kind: str, theta: float, given: Values, values: Values) -> Rope:
    if kind in ("default", "linear", "dynamic"):
        return Rope(theta, kind, given["factor"] if kind != "default" else 1.0)
    rest = {key: given[key] for key in set().union(*_SCALINGS[kind]) & given.keys()}
    longest = values["max_position_embeddings"]
    original = rest.pop(_LENGTH, longest)
    factor = rest.pop("factor", longest / original)  # optional for yarn and longrope
    rest |= {key: tuple(rest[key]) for key in _STRETCHES & set(rest)}
    return Rope(theta, kind, factor, original, **rest)
