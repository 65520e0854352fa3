"""Jobs of ``lordjax compress``: the function that runs for a method, and its settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lordjax.scripts.console import KEEP

if TYPE_CHECKING:
    from lordjax.compression.result import Result
    from lordjax.compression.resumable_output import Output
    from lordjax.finetune.distillation import Distillation, Text
    from lordjax.runtime.progress import Progress
    from lordjax.scripts.opened_model import Model

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


def open_original(name: str, directory: Path, keep: float, settings: dict[str, Any]) -> Model:
    """Opens a model that can be compressed, if there is room for the result on disk.

    Quantizing methods also take a model with fewer ranks or neurons.

    Args:
      name: the model.
      directory: where the result goes.
      keep: about which fraction of the block linear weights, in bytes, is stored.
      settings: settings of the job, see `job_of`.

    Raises:
      OSError: if the disk has not enough room.
      ValueError: if the model is compressed already, in a way that the method cannot start from.
    """
    from lordjax.scripts.opened_model import open_model
    from lordjax.storage.room import check_room

    model = open_model(name)
    if model.kind == "compressed":
        _check_plain(model, "weighting" in settings)
    dtype = settings["dtype"]
    if dtype is None and "elastic" not in settings:
        dtype = model.stored_dtype
    check_room(directory, estimated_bytes(model, keep, dtype))
    return model


def _check_plain(model: Model, quantizes: bool) -> None:
    """Raises ValueError if a compressed model cannot be compressed again by this kind of method."""
    from lordjax.compression.kept_pairs import is_plain_pair
    from lordjax.kernels.base import is_kernel

    if not quantizes:
        raise ValueError(
            f"{model.name}: is compressed already; give the original model, or quantize it with "
            "method nf, lq or auto"
        )
    for path, leaf in model.leaves().items():
        if is_kernel(leaf) and not is_plain_pair(leaf):
            raise ValueError(
                f"{model.name}: is quantized already ({path}); give the model as it was before"
            )


def estimated_bytes(model: Model, keep: float, dtype: str | None) -> int:
    """Estimates the bytes of a compressed model on disk.

    Args:
      model: the model that is compressed.
      keep: fraction of the block linear weights that is stored.
      dtype: dtype that is stored; None: as in the model.
    """
    import jax.numpy as jnp

    from lordjax.kernels.kinds import weights
    from lordjax.names import is_block_linear

    total = 0.0
    for path, leaf in model.leaves().items():
        itemsize = jnp.dtype(dtype or leaf.dtype).itemsize
        total += weights(leaf) * itemsize * (keep if is_block_linear(path) else 1.0)
    return int(total)


def distillation_of(options: dict[str, Any], seed: int) -> Distillation | None:
    """Returns how the result is distilled; None without ``--distill``.

    Raises:
      ValueError: if options do not go together.
    """
    from lordjax.finetune.distillation import Distillation
    from lordjax.runtime import multihost

    tokens, rate, dtype = (options.get(f"distill{name}") for name in ("", "_rate", "_dtype"))
    if tokens is None:
        for name, value in (("rate", rate), ("dtype", dtype)):
            if value is not None:
                raise ValueError(f"--distill-{name} needs --distill; say how many tokens")
        return None
    if options["elastic"]:
        raise ValueError(
            "--distill cannot be combined with --elastic: an elastic model stores factors for all "
            "budgets, and one budget is trained; leave --elastic out, and choose --keep"
        )
    if options["mesh"] is not None or multihost.process_count() > 1:
        raise ValueError(
            "--distill trains on one device of one process; leave --mesh and --coordinator out, or "
            "train the result with: lordjax finetune --recipe distill --teacher MODEL --devices N"
        )
    return Distillation(tokens, rate, dtype or "float32", seed)


def distilled(
    result: Result,
    opened: Model,
    text: Text,
    training: Distillation,
    output: Output,
    progress: Progress | None,
) -> Result:
    """Distills a compressed model, and writes its parts.

    Args:
      result: the model, whose parts are in the draft of ``output``.
      opened: the original model.
      text: what it is trained and judged on.
      training: how it is trained.
      output: where the parts go.
      progress: called with the stage, the work done, and all of it.

    Returns:
      The result, with facts about the training in its report.
    """
    from lordjax.finetune import distillation
    from lordjax.runtime.progress import peak_rss
    from lordjax.storage.shards import join_blocks, names, split_blocks

    key, config = "distilled", result.config
    params = join_blocks({name: result.params[name] for name in names(config)})
    if key in output.store and not output.store[key]["kept"]:
        new = params
    else:
        new, facts = distillation.distill(
            opened.source,
            config,
            params,
            text,
            training,
            store=output.store,
            directory=output.training,
            progress=progress,
        )
        if key not in output.store:
            output.store[key] = facts | {"peak_rss_bytes": peak_rss()}
    for name, tree in split_blocks(new).items():
        if name not in output.shards:
            output.shards[name] = tree
    report = {**result.report, "distillation": output.store[key]}
    return dataclasses.replace(result, params=output.shards, report=report)


def distillation_line(facts: dict[str, Any]) -> str:
    """Returns a sentence about what distillation did.

    Args:
      facts: see `finetune.distillation.distill`.
    """
    before, after = facts["before"], facts["after"]
    text = (
        f"divergence {before['divergence']:.4f} -> {after['divergence']:.4f} and loss "
        f"{before['nats']:.4f} -> {after['nats']:.4f} nats on {facts['held_out_tokens']} held-out "
        f"tokens, {facts['seconds']:.0f} s"
    )
    if facts["kept"]:
        return f"distilled on {facts['tokens']} tokens: {text}"
    text = facts["error"] or text
    return f"distillation did not help, so the weights before it are kept: {text}"
