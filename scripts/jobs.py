"""Jobs of ``lordjax compress``: the function that runs for a method, and its settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lordjax.scripts.console import KEEP

# Options of quantizing methods only, and of low-rank methods only.
QUANTIZED = ("bits", "budget_bytes", "form", "rank", "weighting", "feedback")
WHOLE_FILE = ("embeddings", "file_bytes")  # of all methods
UNQUANTIZED = ("keep", "ranks", "temperature", "prefix", "elastic", "shape", "multiple")
FLAGS = {"form": "--format"}  # option -> flag, where their names differ
# What to do instead of giving an option together with --elastic.
ELASTIC_HINTS = {
    "keep": "choose the budget later with `lordjax export --keep`",
    "ranks": "leave --ranks out, or compress without --elastic",
    "factors": "leave --factors out, or compress without --elastic",
    "dtype": "choose the dtype later with `lordjax convert --dtype`",
    "embeddings": "leave --embeddings out, or compress without --elastic",
    "file_bytes": "leave --file-bytes out, or compress without --elastic",
}
ELASTIC_BYTES = 5.0  # bytes of an elastic model on disk, at most, per byte of block linear weights

Run = Callable[..., Any]  # (source, tokens, mask_token=, progress=) -> Result


def job_of(
    method: str, options: dict[str, Any], stored_dtype: str | None = None
) -> tuple[Run, dict[str, Any], bool, float]:
    """Returns the job of a method and its options.

    Args:
      method: a key of `METHODS` or `QUANTIZERS`.
      options: the flags of the command.
      stored_dtype: dtype that is stored if ``--dtype`` is not given, see `Model`; None: as in the
        model.

    Returns:
      the function to run; its settings; whether it needs calibration data; and about which fraction
      of the block linear weights, in bytes, is stored.

    Raises:
      KeyError: if the method, the policy or the weighting is unknown.
      ValueError: if options do not go together.
    """
    from lordjax.allocation.candidates import QUANTIZERS
    from lordjax.methods import METHODS, SHAPES, method_of_shape
    from lordjax.names import did_you_mean

    if method not in METHODS and method not in QUANTIZERS:
        hint = did_you_mean(method, [*METHODS, *QUANTIZERS])
        raise KeyError(f"no method {method!r}; {hint}")
    quantized = method in QUANTIZERS
    for name in UNQUANTIZED if quantized else QUANTIZED:
        if options[name] is not None:
            flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
            kind = "quantizing" if name in QUANTIZED else "low-rank"
            raise ValueError(
                f"method {method!r} does not take {flag}, which is for {kind} methods; leave it out"
            )
    if quantized:
        return _quantized_job(method, options, stored_dtype)
    method = method_of_shape(method, options["shape"] or SHAPES[0])
    job = _elastic_job if options["elastic"] else _low_rank_job
    run, settings, needs_tokens, share = job(method, options, stored_dtype)
    if (multiple := options["multiple"]) is not None:
        run, settings = functools.partial(run, multiple=multiple), settings | {"multiple": multiple}
    return run, settings | {"method": method}, needs_tokens, share


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `WHOLE_FILE` that are given; older reports do not name them."""
    return {name: options[name] for name in WHOLE_FILE if options[name] is not None}


def _low_rank_job(
    method: str, options: dict[str, Any], stored_dtype: str | None
) -> tuple[Run, dict[str, Any], bool, float]:
    from lordjax.allocation.policies import check_policy
    from lordjax.compression.low_rank import compress
    from lordjax.compression.whole_file.budget import check_stored
    from lordjax.methods import METHODS

    definition = METHODS[method]
    ranks = options["ranks"]
    if ranks is not None and any(options[name] is not None for name in ("keep", "allocation")):
        raise ValueError("--ranks gives every rank; leave --keep and --allocation out")
    if options["file_bytes"] is not None and options["keep"] is not None:
        raise ValueError("give one of --keep and --file-bytes; both are budgets")
    settings = {
        "keep": KEEP if options["keep"] is None else options["keep"],
        "ranks": ranks,
        "allocation": options["allocation"] or definition.allocation,
        "temperature": options["temperature"],
        "prefix": options["prefix"] or definition.prefix,
        "factors": options["factors"],
        "dtype": options["dtype"] or stored_dtype,
        **_given(options),
    }
    check_policy(settings["allocation"], settings["temperature"])
    given = (options["embeddings"], options["file_bytes"])
    check_stored(settings["keep"], settings["factors"], *given, ranks)

    def run(source: Any, tokens: Any, **given: Any) -> Any:
        return compress(source, tokens, method=method, **given, **settings)

    return run, settings, True, settings["keep"]


def _elastic_job(
    method: str, options: dict[str, Any], stored_dtype: str | None
) -> tuple[Run, dict[str, Any], bool, float]:
    from lordjax.allocation.policies import check_policy
    from lordjax.compression import elastic
    from lordjax.methods import METHODS

    for name in ELASTIC_HINTS:
        if options[name] is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} cannot be combined with --elastic: an elastic model stores the dense "
                f"model and factors for all budgets; {ELASTIC_HINTS[name]}"
            )
    elastic.check_settings(method, options["prefix"])
    settings = {
        "keep": None,
        "ranks": None,
        "allocation": options["allocation"] or METHODS[method].allocation,
        "temperature": options["temperature"],
        "prefix": "dense",
        "factors": None,
        "dtype": None,
    }
    check_policy(settings["allocation"], settings["temperature"])
    chosen = {name: settings[name] for name in ("allocation", "temperature")}
    chosen |= {"cut_dtype": stored_dtype}

    def run(source: Any, tokens: Any, **given: Any) -> Any:
        return elastic.compress(source, tokens, method=method, **given, **chosen)

    # The dense model is stored as it was factorized: a budget that is cut from rounded weights
    # would differ from what `compress` makes of the original.
    settings |= {"elastic": True} | ({} if stored_dtype is None else {"cut_dtype": stored_dtype})
    # It stores the model, pairs up to break-even and a triangle for every MLP, in float32.
    return run, settings, True, ELASTIC_BYTES


def _quantized_job(
    method: str, options: dict[str, Any], stored_dtype: str | None
) -> tuple[Run, dict[str, Any], bool, float]:
    from lordjax.compression import quantized

    settings = {
        "solver": options["allocation"] or "bisection",
        "factors": options["factors"],
        "dtype": options["dtype"] or stored_dtype,
        **{name: options[name] for name in QUANTIZED},
        **_given(options),
    }
    needs_tokens = quantized.check_settings(method, **settings)

    def run(source: Any, tokens: Any, **given: Any) -> Any:
        return quantized.quantize(source, tokens, method=method, **given, **settings)

    return run, settings, needs_tokens, 0.5
