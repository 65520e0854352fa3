"""``lordjax compress``: opens, calibrates and compresses a model, and writes the result."""

from __future__ import annotations

import contextlib
import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lordjax.forecast.predict import check_budget, measured, predict_compression
from lordjax.scripts.calibration_data import default_name, read_calibration, read_with_text
from lordjax.scripts.console import check_output, progress_report, say
from lordjax.scripts.jobs import (
    Run,
    distillation_of,
    distilled,
    job_of,
    open_original,
)
from lordjax.scripts.opened_model import Model, model_checksums, tokenizer_writer
from lordjax.scripts.token_inputs import mask_token

if TYPE_CHECKING:
    from lordjax.compression.result import Result
    from lordjax.compression.resumable_output import Output
    from lordjax.finetune.distillation import Distillation, Text


def compress_model(
    model: str,
    out: str,
    *,
    method: str,
    calibration: str | None,
    samples: int | None,
    seq_len: int | None,
    seed: int,
    field: str,
    **options: Any,
) -> dict[str, Any]:
    """Compresses a model into a directory; arguments are the flags. Returns the summary.

    All arguments are checked before the work begins.
    """
    start = time.perf_counter()
    from lordjax.compression.resumable_output import Output, partial
    from lordjax.runtime import multihost

    directory = Path(out).expanduser()  # complete, if a run was interrupted late: see `Output`
    if multihost.is_primary() and not partial(directory).exists():
        check_output(directory)
    _, settings, needs_tokens, share = job_of(method, options)
    training = distillation_of(options, seed)
    opened = open_original(model, directory, share, settings)
    run, settings = _checked_job(opened, method, options)
    write_tokenizer = tokenizer_writer(opened) if multihost.is_primary() else None
    how = {"samples": samples, "seq_len": seq_len, "seed": seed, "field": field}
    data = _data(opened, method, calibration, how, training, needs_tokens=needs_tokens)
    settings = {
        "model": model,
        "method": method,
        **settings,
        "calibration": None if data.facts is None else data.facts["source"],
        "samples": samples if data.facts is None else data.facts["samples"],
        "seq_len": None if data.facts is None else data.facts["seq_len"],
        "seed": seed,
    }
    with Output(directory, _identity(opened, data, training, settings)) as output:
        if output.resumed and multihost.is_primary():
            say(f"resuming from the finished work in {output.store.directory}")
        if output.finished is not None:
            output.publish()
            return output.finished
        # A resumed run does only a part of the work, so its cost is not predicted.
        predicted = None if output.resumed else _predict(opened, data, settings, directory)
        result = _run(run, opened, data, output, training)
        report = _report(result, data.facts, settings, predicted, output)
        summary = _summary(directory, report, start)
        output.finish(
            result,
            hf_config=opened.hf_config,
            report=report,
            write_tokenizer=write_tokenizer,
            also=functools.partial(_add, output.store, "elastic" in settings),
            summary=summary,
        )
    return summary


def _add(work: Any, is_elastic: bool, directory: Path) -> None:
    """Adds the factors of an elastic model and the page for people to a directory."""
    from lordjax.compression.elastic import keep_entries
    from lordjax.scripts.report.page import add_page
    from lordjax.storage.store import Entries

    if is_elastic:
        keep_entries(work, directory)
    add_page(directory, Entries(work, "factors"))


class Calibration(NamedTuple):
    """Calibration data; all fields are None if the method needs no data.

    Attributes:
      tokens: token ids ``[sequences, length]``.
      facts: where they come from, for the report.
      mask_token: id of the mask token, of a model that predicts masked tokens.
      text: what the result is distilled on, if it is.
    """

    tokens: Any
    facts: dict[str, Any] | None
    mask_token: int | None
    text: Text | None = None


NO_DATA = Calibration(None, None, None)


def _note_calibration(
    opened: Model, method: str, calibration: str | None, *, needs_tokens: bool
) -> None:
    """Says which calibration data is read where that may surprise."""
    from lordjax.runtime import multihost

    if not multihost.is_primary():
        return
    if needs_tokens and calibration is None:
        say(f"calibrating on {default_name(opened.config)} (--calibration to change)")
    if not needs_tokens and calibration is not None:
        say(
            f"note: method {method!r} with these options needs no calibration; {calibration} is "
            "not read"
        )


def _data(
    opened: Model,
    method: str,
    calibration: str | None,
    how: dict[str, Any],
    training: Distillation | None,
    *,
    needs_tokens: bool,
) -> Calibration:
    """Reads what the method and the distillation need."""
    reads = needs_tokens or training is not None
    _note_calibration(opened, method, calibration, needs_tokens=reads)
    if not reads:
        return NO_DATA
    data = _read_calibration(opened, calibration, how, training)
    return data if needs_tokens else NO_DATA._replace(text=data.text)


def _read_calibration(
    opened: Model, calibration: str | None, how: dict[str, Any], training: Distillation | None
) -> Calibration:
    """Reads the calibration sequences; says on stderr if they are too few for the model."""
    from lordjax.data.token_count import shortage
    from lordjax.models.objective import protocol
    from lordjax.runtime import multihost

    mask = mask_token(opened)
    if training is None:
        tokens, facts, text = *read_calibration(opened, calibration, **how), None
    else:
        tokens, facts, text = read_with_text(opened, calibration, training, **how)
    warning = shortage(opened.config, tokens.size)
    if warning is not None and multihost.is_primary():
        say(warning)
    return Calibration(tokens, facts | protocol(opened.config, mask), mask, text)


def _run(
    run: Run, opened: Model, data: Calibration, output: Output, training: Distillation | None
) -> Result:
    """Runs the job, with progress on stderr of the first process."""
    from lordjax.runtime import multihost

    with progress_report() if multihost.is_primary() else contextlib.nullcontext() as progress:
        result = run(
            opened.source,
            data.tokens,
            mask_token=data.mask_token,
            progress=progress,
            work=output.store,
            into=output.shards if training is None else output.draft(),
        )
        if training is None or data.text is None:
            return result
        return distilled(result, opened, data.text, training, output, progress)


def _report(
    result: Result,
    facts: dict[str, Any] | None,
    settings: dict[str, Any],
    predicted: dict[str, Any] | None,
    output: Output,
) -> dict[str, Any]:
    """The content of ``report.json``."""
    report = {**result.report, "calibration": facts, "settings": settings}
    report["file_bytes"] = output.file_bytes()
    if result.plan.tables:
        report["plan"] = {**report["plan"], "tables": dict(result.plan.tables)}
    if predicted is not None:
        report |= {"predicted": predicted, "happened": measured(report, predicted)}
    return report


def _summary(directory: Path, report: dict[str, Any], start: float) -> dict[str, Any]:
    """What the command prints, from the report."""
    return {
        "output": str(directory),
        **{k: v for k, v in report["plan"].items() if k in ("kept", "bits_per_weight")},
        "bytes": report["bytes"],
        "file_bytes": report["file_bytes"],
        "tables": report["plan"].get("tables", {}),
        "seconds": time.perf_counter() - start,
        "predicted": report.get("predicted"),
        "happened": report.get("happened"),
        "distillation": report.get("distillation"),
        "loss": report["plan"].get("predicted_nats"),
        "held_out_check": report.get("held_out_check"),
        "calibration": report["calibration"],
        "settings": report["settings"],
    }


def _checked_job(opened: Model, method: str, options: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """Returns the job and its settings; raises ValueError if the model's shapes forbid it."""
    run, settings, *_ = job_of(method, options, opened.stored_dtype)
    if opened.kind != "compressed":  # whose shapes differ from those of its config
        check_budget(opened.config, opened.leaves(), {**settings, "method": method})
    return _on_mesh(run, settings, options["mesh"])


def _on_mesh(run: Run, settings: dict[str, Any], axes: str | None) -> tuple[Run, dict[str, Any]]:
    """Adds the device mesh of ``--mesh``; several processes use all devices by default."""
    import jax

    from lordjax.runtime import multihost
    from lordjax.runtime.mesh import make_mesh, parse

    if axes is None and multihost.process_count() > 1:
        axes = f"data={jax.device_count()}"
    if axes is None:
        return run, settings
    mesh = make_mesh(parse(axes))
    return functools.partial(run, mesh=mesh), settings | {"mesh": axes}


def _identity(
    model: Model, data: Calibration, training: Distillation | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything that the bits of the result depend on; files count by content, not by path."""
    import jax

    from lordjax import __version__
    from lordjax.runtime import multihost

    by_content = ("model", "calibration", "seed", "samples")
    facts, extra = data.facts, {}
    if multihost.process_count() > 1:
        extra["processes"] = multihost.process_count()
    if training is not None and data.text is not None:
        extra["distillation"] = training.identity(data.text)
    return extra | {
        "lordjax": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "model": model_checksums(model),
        "calibration": None if facts is None else _without_sources(facts),
        "settings": {key: value for key, value in settings.items() if key not in by_content},
    }


def _without_sources(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts about calibration data without the names of its files, and what was asked for."""
    parts = [{k: v for k, v in part.items() if k != "source"} for part in facts["parts"]]
    return {k: v for k, v in facts.items() if k not in ("source", "samples")} | {"parts": parts}


def _predict(
    model: Model, data: Calibration, settings: dict[str, Any], directory: Path
) -> dict[str, Any] | None:
    """The predicted cost, if the disk has room for it.

    None with a mesh axis ``model``, whose cost cannot be predicted, and for a model that was
    compressed before.
    """
    from lordjax.storage.room import check_room

    if "model=" in settings.get("mesh", "") or model.kind == "compressed":
        return None
    shape = (0, 0) if data.tokens is None else data.tokens.shape
    found = predict_compression(model.config, model.leaves(), shape, settings, directory)
    check_room(directory, found["memory"]["with a work directory"]["disk"])
    return found
