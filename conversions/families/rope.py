"""The rotary embedding of a Hugging Face config, in the spellings of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lordjax.models.config import Rope

Values = Mapping[str, Any]

# Keys that hold the rotary embedding. transformers 4 writes the first two, transformers 5 the
# third; the original length at top level is the habit of some converters.
ROPE_KEYS = frozenset(
    ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
)
# Kind of scaling -> keys that must be there, keys that may. The original length is accepted and
# dropped where transformers takes no notice of it.
_LENGTH = "original_max_position_embeddings"
_STRETCHES = {"short_factor", "long_factor"}  # a number per rotary pair
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
    """Positions are not rotary."""
    del hf_config, values, problems


def half_split(head_size: int, rotary_size: int | None, *, neighbours: bool = True) -> np.ndarray:
    """Order of a head's columns in which the members of every pair are half a head apart.

    Before, the first ``rotary_size`` columns (None: all) turn in pairs of neighbours, or of columns
    half of ``rotary_size`` apart; the others, which stand still, become pairs too.
    """
    size = rotary_size or head_size
    turning = np.arange(size).reshape(-1, 2) if neighbours else np.arange(size).reshape(2, -1).T
    still = np.arange(size, head_size).reshape(2, -1).T
    return np.concatenate([turning, still]).T.reshape(-1)


def take_share(hf_config: Values, share: float) -> tuple[dict[str, Any], float]:
    """The config without the share of a head that turns, and that share, else ``share``.

    transformers 5 writes it among the rotary keys.
    """
    plain = dict(hf_config)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(part := hf_config.get(key), Mapping):
            plain[key] = dict(part)
            share = plain[key].pop("partial_rotary_factor", share)
    return plain, share


def rotary_size(key: str, share: float, values: Values, problems: list[str]) -> int:
    """Columns of a head that turn; ``key`` is what holds their share."""
    heads = values["num_attention_heads"]
    width = values["hidden_size"] // heads if heads else 0
    size = int(width * share)
    if not (0 < size <= width and size % 2 == 0):
        problems.append(
            f"{key} = {share!r}: expected an even number of the {width} columns of a head"
        )
    return size


def read_rope(hf_config: Values, values: Values, problems: list[str]) -> Rope:
    """The rotary embedding, with the precedence of transformers."""
    scaling, parameters = hf_config.get("rope_scaling"), hf_config.get("rope_parameters")
    if scaling and parameters and scaling != parameters:
        problems.append("rope_scaling and rope_parameters are both given and differ")
    chosen = scaling or parameters or {}
    if not isinstance(chosen, Mapping):
        problems.append(f"rope_scaling = {chosen!r}: expected an object")
        return Rope()
    given = {key: value for key, value in chosen.items() if value is not None}
    outer = hf_config.get("rope_theta")
    theta = given.pop("rope_theta", 10_000.0 if outer is None else outer)
    if outer is not None and outer != theta:
        problems.append(f"rope_theta = {outer!r}, but {theta!r} in rope_parameters")
    # Both spellings may be there; rope_type is the newer one and wins.
    kind = given.pop("type", "default")
    kind = given.pop("rope_type", kind)
    if kind not in _SCALINGS:
        problems.append(f"rope type {kind!r}: supported: {', '.join(_SCALINGS)}")
        return Rope()
    if given.pop("partial_rotary_factor", 1) != 1:
        problems.append("rope: a partial_rotary_factor other than 1 is not supported")
    if hf_config.get(_LENGTH) is not None:
        given[_LENGTH] = hf_config[_LENGTH]
    found = _rope_problems(kind, {"rope_theta": theta} | given)
    problems += found
    return Rope() if found else _build_rope(kind, float(theta), given, values)


def _rope_problems(kind: str, given: Values) -> list[str]:
    required, optional = _SCALINGS[kind]
    problems = [f"rope type {kind}: {key} is missing" for key in sorted(required - set(given))]
    for key, value in given.items():
        if key not in required | optional | {"rope_theta"}:
            problems.append(f"rope type {kind}: unknown key {key} = {value!r}")
        elif key == "truncate" and type(value) is not bool:
            problems.append(f"rope type {kind}: {key} = {value!r}: expected a bool")
        elif key in _STRETCHES:
            if not (isinstance(value, list) and value and all(map(_is_factor, value))):
                problems.append(f"rope type {kind}: {key}: expected a list of numbers above 0")
        elif key != "truncate" and not _is_factor(value):
            problems.append(f"rope type {kind}: {key} = {value!r}: expected a number above 0")
    return problems


def _is_factor(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _build_rope(kind: str, theta: float, given: Values, values: Values) -> Rope:
    if kind in ("default", "linear", "dynamic"):
        return Rope(theta, kind, given["factor"] if kind != "default" else 1.0)
    rest = dict(given)
    longest = values["max_position_embeddings"]
    original = rest.pop(_LENGTH, longest)
    factor = rest.pop("factor", longest / original)  # yarn and longrope may leave it out
    rest |= {key: tuple(rest[key]) for key in _STRETCHES & set(rest)}
    return Rope(theta, kind, factor, original, **rest)
