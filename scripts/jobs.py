"""Jobs of ``lordjax compress``: what runs for a method and its flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lordjax.scripts.console import KEEP

# What goes with quantisation only, and what it has no use for.
QUANTIZED = ("bits", "budget_bytes", "form", "rank", "weighting", "feedback")


UNQUANTIZED = ("keep", "ranks", "temperature", "prefix", "elastic")


FLAGS = {"form": "--format"}


ELASTIC_BYTES = 5.0  # of an elastic model on disk, in bytes of the block linear weights, at most


Run = Callable[..., Any]  # (source, tokens, mask_token=, progress=) -> Result


def job_of(
    method: str, options: dict[str, Any], stored_dtype: str | None = None
) -> tuple[Run, dict[str, Any], bool, float]:
    """What to run, its settings, whether it needs tokens, and about the share that stays.

    Args:
      method: a key of `METHODS` or `QUANTIZERS`.
      options: the flags.
      stored_dtype: in place of ``--dtype``, if that is not given; see `common.Model`.

    Raises:
      KeyError: if the method, the policy or the weighting is unknown.
      ValueError: if options do not go together.
    """
    from lordjax.allocation.candidates import QUANTIZERS
    from lordjax.methods import METHODS
    from lordjax.names import did_you_mean

    if method not in METHODS and method not in QUANTIZERS:
        hint = did_you_mean(method, [*METHODS, *QUANTIZERS])
        raise KeyError(f"no method {method!r}; {hint}")
    quantized = method in QUANTIZERS
    for name in UNQUANTIZED if quantized else QUANTIZED:
        if options[name] is not None:
            flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
            raise ValueError(f"method {method!r} has no use for {flag}; leave it out")
    job = _elastic_job if options["elastic"] else _quantized_job if quantized else _low_rank_job
    return job(method, options, stored_dtype)


def _low_rank_job(
    method: str, options: dict[str, Any], stored_dtype: str | None
) -> tuple[Run, dict[str, Any], bool, float]:
    from lordjax.allocation.policies import check_policy
    from lordjax.compression.low_rank import compress
    from lordjax.kernels import normal_float
    from lordjax.methods import METHODS

    row = METHODS[method]
    ranks = options["ranks"]
    if ranks is not None and any(options[name] is not None for name in ("keep", "allocation")):
        raise ValueError("--ranks says it all; leave --keep and --allocation out")
    settings = {
        "keep": KEEP if options["keep"] is None else options["keep"],
        "ranks": ranks,
        "allocation": options["allocation"] or row.allocation,
        "temperature": options["temperature"],
        "prefix": options["prefix"] or row.prefix,
        "factors": options["factors"],
        "dtype": options["dtype"] or stored_dtype,
    }
    check_policy(settings["allocation"], settings["temperature"])
    if settings["factors"] is not None:
        normal_float.Format.parse(settings["factors"])

    def run(source: Any, tokens: Any, **given: Any) -> Any:
        return compress(source, tokens, method=method, **given, **settings)

    return run, settings, True, settings["keep"]


def _elastic_job(
    method: str, options: dict[str, Any], stored_dtype: str | None
) -> tuple[Run, dict[str, Any], bool, float]:
    from lordjax.allocation.policies import check_policy
    from lordjax.compression import elastic
    from lordjax.methods import METHODS

    for name in ("keep", "ranks", "factors", "dtype"):
        if options[name] is not None:
            raise ValueError(
                f"--elastic keeps the model as it is, and factors for every budget: leave --{name} "
                "out, here or give it to what makes one budget of it (lordjax export --keep, "
                "lordjax convert --dtype)"
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

    # The dense model is the one that was factored: a budget is cut from it and the factors, and
    # what was rounded before would not be what `compress` makes of the original.
    settings |= {"elastic": True} | ({} if stored_dtype is None else {"cut_dtype": stored_dtype})
    # The model, factor pairs up to break-even, and a triangle for every MLP, in float32.
    return run, settings, True, ELASTIC_BYTES


def _quantized_job(
    method: str, options: dict[str, Any], stored_dtype: str | None
) -> tuple[Run, dict[str, Any], bool, float]:
    from lordjax.compression import quantized as quantization

    settings = {
        "solver": options["allocation"] or "bisection",
        "factors": options["factors"],
        "dtype": options["dtype"] or stored_dtype,
        **{name: options[name] for name in QUANTIZED},
    }
    needs_tokens = quantization.check_settings(method, **settings)

    def run(source: Any, tokens: Any, **given: Any) -> Any:
        return quantization.quantize(source, tokens, method=method, **given, **settings)

    return run, settings, needs_tokens, 0.5
