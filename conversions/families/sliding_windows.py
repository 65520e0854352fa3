"""Readers of the sliding attention window of every layer, the values of `Family.windows`.

Every reader takes the config values and a list that it appends problems to. It returns one window
per layer, in tokens (None for full attention), or None if no layer has a window.
"""

from __future__ import annotations

from lordjax.conversions.families.family import Values, is_positive_int


def no_windows(values: Values, problems: list[str]) -> None:
    """Returns None: no layer has a sliding window."""
    del values, problems


def one_window(values: Values, problems: list[str]) -> tuple[int | None, ...] | None:
    """Reads ``sliding_window``, one window for all layers."""
    window = values["sliding_window"]
    if window is None:
        return None
    if not is_positive_int(window):
        problems.append(f"sliding_window = {window!r}: expected a positive integer or null")
        return None
    return (window,) * values["num_hidden_layers"]


def mixed_windows(values: Values, problems: list[str]) -> tuple[int | None, ...] | None:
    """Reads ``layer_types``; without it, layers from ``max_window_layers`` on have a window."""
    if not values["use_sliding_window"]:
        return None
    first, count = values["max_window_layers"], values["num_hidden_layers"]
    return _windows_of(values, [i >= first for i in range(count)], problems)


def alternating_windows(values: Values, problems: list[str]) -> tuple[int | None, ...] | None:
    """Reads ``layer_types``; without it, every n-th layer has full attention.

    The number n is ``sliding_window_pattern``, by default 2.
    """
    every, count = values.get("sliding_window_pattern", 2), values["num_hidden_layers"]
    if not is_positive_int(every):
        problems.append(f"sliding_window_pattern = {every!r}: expected a positive integer")
        return None
    if values["sliding_window"] is None:
        problems.append("sliding_window = None: expected a positive integer")
    return _windows_of(values, [(i + 1) % every != 0 for i in range(count)], problems)


def _windows_of(
    values: Values, sliding: list[bool], problems: list[str]
) -> tuple[int | None, ...] | None:
    """Reads the windows from ``layer_types``.

    Args:
      values: config values; a null ``layer_types`` means that ``sliding`` decides.
      sliding: for every layer, whether it has a window by default.
      problems: list that problems are appended to.
    """
    window = one_window(values, problems)
    if window is None:
        return None
    names, count = ("full_attention", "sliding_attention"), len(sliding)
    kinds = values["layer_types"] or [names[slides] for slides in sliding]
    if not isinstance(kinds, list) or len(kinds) != count or set(kinds) - set(names):
        problems.append(f"layer_types = {kinds}: expected {count} times {' or '.join(names)}")
        return None
    return tuple(w if kind == names[1] else None for w, kind in zip(window, kinds, strict=True))
