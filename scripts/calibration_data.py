"""Calibration data of the commands: files, the standard library, the model's own text, mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lordjax.data.record_files import FIELD
from lordjax.models.config import ModelConfig
from lordjax.scripts.console import CALIBRATION, progress_report, say
from lordjax.scripts.opened_model import Model
from lordjax.scripts.token_inputs import (
    WINDOW,
    check_length,
    read_windows,
    standard_library_name,
)

if TYPE_CHECKING:
    from lordjax.data.mixtures import Part
    from lordjax.data.token_windows import Windows
    from lordjax.finetune.distillation import Distillation, Text

SELF, STANDARD_LIBRARY = "self", "stdlib"  # words that stand for data in --calibration


def read_calibration(
    model: Model,
    calibration: str | None,
    *,
    seq_len: int | None,
    samples: int | None,
    seed: int,
    field: str = FIELD,
) -> tuple[Any, dict[str, Any]]:
    """Reads calibration windows, of one source or of a mixture, see `mixtures`.

    Args:
      model: the model, whose tokenizer is used.
      calibration: a path, ``self``, ``stdlib``, or a mixture of these; None:
        `default_calibration`.
      seq_len: tokens of a window; None: those of a .npy array, else `WINDOW` or the model's longest
        sequence.
      samples: largest number of windows; None: as many as the model needs, see `token_count`.
      seed: seed that draws documents, and the tokens of the model's own text.
      field: name of the text in a record.

    Returns:
      token ids ``[windows, length]``, and facts about them for a report.

    Raises:
      FileNotFoundError: if a path does not exist, or the model has no tokenizer.
      ValueError: if the mixture is wrong, or a part cannot be read; names the part.
    """
    import numpy as np

    from lordjax.data import mixtures, token_count
    from lordjax.data.token_windows import fingerprint

    words = (SELF, STANDARD_LIBRARY)
    parts = mixtures.parse(calibration or default_calibration(model.config), words)
    length = shared_length(parts, seq_len, model.config)
    check_length(length, model.config)
    wanted = samples or token_count.default_windows(model.config, length)
    counts = mixtures.window_counts(parts, wanted)
    how: dict[str, Any] = {"length": length, "seed": seed, "field": field}
    read = [_read_part(model, part, n, **how) for part, n in zip(parts, counts, strict=True)]
    there = [len(windows.tokens) for windows, _ in read]
    _note_short_parts(parts, counts, there)
    order = mixtures.interleaved(there)
    tokens = np.empty((len(order), length), np.int32)
    for i, (windows, _) in enumerate(read):
        tokens[order == i] = windows.tokens
    facts = {
        "source": ", ".join(_name(part) for part in parts),
        "samples": wanted,
        "windows": len(tokens),
        "seq_len": length,
        "tokens_per_neuron": token_count.tokens_per_neuron(model.config, tokens.size),
    }
    facts |= next(({"sequence_ends": ends} for _, ends in read if ends), {})
    facts["tokens_sha256"] = fingerprint(tokens)
    facts["parts"] = [
        _part_facts(part, windows) for part, (windows, _) in zip(parts, read, strict=True)
    ]
    return tokens, facts


def read_with_text(
    model: Model,
    calibration: str | None,
    training: Distillation,
    *,
    seq_len: int | None,
    samples: int | None,
    seed: int,
    field: str = FIELD,
) -> tuple[Any, dict[str, Any], Text]:
    """Reads calibration windows, and the windows that the result is distilled on.

    Both begin with the first window. The last ones are held out from both.

    Args:
      model: as for `read_calibration`, and so are all other arguments but ``training``.
      calibration: see there.
      training: how many tokens the result is distilled on.
      seq_len: see there.
      samples: see there.
      seed: see there.
      field: see there.

    Returns:
      What `read_calibration` returns, and the text.

    Raises:
      FileNotFoundError: as `read_calibration`.
      ValueError: as `read_calibration`, or if the data has too few tokens, or the model does not
        predict the next token.
    """
    from lordjax.data import mixtures, token_count
    from lordjax.data.token_windows import fingerprint
    from lordjax.finetune.distillation import Text, check

    check(model.config)
    parts = mixtures.parse(
        calibration or default_calibration(model.config), (SELF, STANDARD_LIBRARY)
    )
    length = shared_length(parts, seq_len, model.config)
    count, held = training.sequences(length)
    wanted = samples or token_count.default_windows(model.config, length)
    how: dict[str, Any] = {"seq_len": length, "samples": max(wanted, count) + held}
    tokens, facts = read_calibration(model, calibration, seed=seed, field=field, **how)
    if len(tokens) < count + held:
        raise ValueError(
            f"--distill {training.tokens}: {facts['source']} has {len(tokens)} sequences of "
            f"{length} tokens; expected {count} to train on and {held} that are held out: give "
            "fewer tokens, more data (--calibration), or shorter sequences (--seq-len)"
        )
    own = tokens[: min(wanted, len(tokens) - held)]
    facts |= {
        "samples": wanted,
        "windows": len(own),
        "tokens_per_neuron": token_count.tokens_per_neuron(model.config, own.size),
        "tokens_sha256": fingerprint(own),
    }
    return own, facts, Text(tokens[:count], tokens[-held:], facts["source"])


def _part_facts(part: Part, windows: Windows) -> dict[str, Any]:
    from lordjax.data.token_windows import fingerprint

    return {
        "source": _name(part),
        "share": part.share,
        "windows": len(windows.tokens),
        "documents": windows.documents,
        "tokens_sha256": fingerprint(windows.tokens),
    }


def shared_length(parts: Sequence[Part], asked: int | None, config: ModelConfig) -> int:
    """Returns the tokens of a window of all parts.

    Args:
      parts: parts of the calibration data.
      asked: the length that a flag gives, if any.
      config: architecture of the model.

    Raises:
      ValueError: if no length is asked for, and two arrays have different ones.
    """
    from lordjax.data.token_windows import array_length

    if asked is not None:
        return asked
    found = {part.source: array_length(part.source) for part in parts}
    lengths = {name: length for name, length in found.items() if length is not None}
    if not lengths:
        return min(WINDOW, config.max_positions)
    first, own = next(iter(lengths.items()))
    for name, length in lengths.items():
        if length != own:
            raise ValueError(
                f"{name}: rows of {length} ids, but {first} has rows of {own}; expected the same "
                "length, or one for all (--seq-len)"
            )
    return own


def _read_part(
    model: Model, part: Part, count: int, *, length: int, seed: int, field: str
) -> tuple[Windows, list[int]]:
    """Reads the windows of a part; returns them and the special tokens around each."""
    from lordjax.data.token_windows import Windows

    if part.source == SELF:
        from lordjax.scripts.own_windows import own_windows

        with progress_report() as progress:
            tokens = own_windows(model, windows=count, length=length, seed=seed, progress=progress)
        return Windows(tokens, None), []
    path = None if part.source == STANDARD_LIBRARY else part.source
    how: dict[str, Any] = {"length": length, "samples": count, "seed": seed, "field": field}
    return read_windows(model, path, **how, spread=True)


def _name(part: Part) -> str:
    """The part's name in a report."""
    names = {SELF: "the model's own text", STANDARD_LIBRARY: f"the {standard_library_name()}"}
    return names.get(part.source, part.source)


def default_calibration(config: ModelConfig) -> str:
    """Returns what is read if --calibration is not given: for a model that writes, its own text."""
    writes = config.causal and config.head == "causal"
    return CALIBRATION if writes else STANDARD_LIBRARY


def default_name(config: ModelConfig) -> str:
    """Returns what is read if --calibration is not given, for messages."""
    from lordjax.data.mixtures import parse

    parts = parse(default_calibration(config), (SELF, STANDARD_LIBRARY))
    return ", ".join(_name(part) for part in parts)


def _note_short_parts(parts: Sequence[Part], counts: list[int], there: list[int]) -> None:
    """Says which parts of a mixture have fewer windows than their share."""
    from lordjax.runtime import multihost

    for part, wanted, found in zip(parts, counts, there, strict=True):
        if len(parts) > 1 and found < wanted and multihost.is_primary():
            say(
                f"note: {_name(part)} has {found} windows, {wanted} would be its share of the "
                "mixture; the others keep theirs"
            )
