"""``lordjax compress``: open, calibrate, factor, allocate, write."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lordjax.forecast.predict import happened, of_compression
from lordjax.scripts.console import check_output, format_bytes, progress_report, say
from lordjax.scripts.jobs import Run, job_of
from lordjax.scripts.opened_model import Model, model_checksums, open_model
from lordjax.scripts.token_inputs import mask_token, read_tokens


def compress_model(
    model: str,
    out: str,
    *,
    method: str,
    calibration: str | None,
    samples: int,
    seq_len: int | None,
    seed: int,
    **options: Any,
) -> dict[str, Any]:
    """Compresses a model into a directory; arguments are the flags. Returns the summary.

    Everything that can be wrong with the arguments is found before the work begins.
    """
    start = time.perf_counter()
    from lordjax.compression.elastic import keep_entries
    from lordjax.compression.resumable_output import Output, partial
    from lordjax.models.objective import protocol as objective_protocol
    from lordjax.runtime import multihost

    directory = Path(out).expanduser()
    if (
        multihost.is_primary() and not partial(directory).exists()
    ):  # else it may be complete: see `output`
        check_output(directory)
    _, settings, needs_tokens, share = job_of(method, options)
    opened = _open_original(model, directory, share, settings)
    run, settings, *_ = job_of(method, options, opened.stored_dtype)
    run, settings = _on_mesh(run, settings, options["mesh"])
    write_tokenizer = tokenizer_writer(opened) if multihost.is_primary() else None
    is_elastic = "elastic" in settings
    tokens, facts, masks = None, None, None
    if needs_tokens:
        if calibration is None and multihost.is_primary():
            say("calibrating on the sources of Python's standard library (--calibration to change)")
        masks = mask_token(opened)
        tokens, facts = read_tokens(
            opened, calibration, seq_len=seq_len, samples=samples, seed=seed
        )
        facts |= objective_protocol(opened.config, masks)
    elif calibration is not None and multihost.is_primary():
        say(f"note: method {method!r} as asked for needs no calibration; {calibration} is not read")
    settings = {
        "model": model,
        "method": method,
        **settings,
        "calibration": None if facts is None else facts["source"],
        "samples": samples,
        "seq_len": None if facts is None else facts["seq_len"],
        "seed": seed,
    }
    with Output(directory, _identity(opened, facts, settings)) as output:
        if output.resumed and multihost.is_primary():
            say(f"going on with what is finished in {output.work.directory}")
        summary = output.finished
        if summary is not None:
            output.publish()
            return summary
        # Of a run that goes on, only a part happens here.
        predicted = None if output.resumed else _forecast(opened, tokens, settings, directory)
        with progress_report() if multihost.is_primary() else contextlib.nullcontext() as progress:
            result = run(
                opened.source,
                tokens,
                mask_token=masks,
                progress=progress,
                work=output.store,
                into=output.shards,
            )
        report = {**result.report, "calibration": facts, "settings": settings}
        if predicted is not None:
            report |= {"predicted": predicted, "happened": happened(report, predicted)}
        summary = {
            "output": str(directory),
            **{k: v for k, v in result.report["plan"].items() if k in ("kept", "bits_per_weight")},
            "bytes": result.report["bytes"],
            "seconds": time.perf_counter() - start,
            "predicted": predicted,
            "happened": report.get("happened"),
            "calibration": facts,
            "settings": settings,
        }
        output.finish(
            result,
            hf_config=opened.hf_config,
            report=report,
            write_tokenizer=write_tokenizer,
            also=functools.partial(keep_entries, output.store) if is_elastic else None,
            summary=summary,
        )
    return summary


def _on_mesh(run: Run, settings: dict[str, Any], axes: str | None) -> tuple[Run, dict[str, Any]]:
    """Adds the devices that share the work, if there is more than one."""
    import jax

    from lordjax.runtime import multihost
    from lordjax.runtime.mesh import make_mesh, parse

    if axes is None and multihost.count() > 1:
        axes = f"data={jax.device_count()}"
    if axes is None:
        return run, settings
    mesh = make_mesh(parse(axes))
    return functools.partial(run, mesh=mesh), settings | {"mesh": axes}


def _identity(
    model: Model, facts: dict[str, Any] | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """What decides every bit of the result, apart from where it was read from."""
    import jax

    from lordjax import __version__
    from lordjax.runtime import multihost

    names = ("model", "calibration", "seed", "samples")  # contents count
    processes = {"processes": multihost.count()} if multihost.count() > 1 else {}
    return processes | {
        "lordjax": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "model": model_checksums(model.path),
        "calibration": None if facts is None else {k: v for k, v in facts.items() if k != "source"},
        "settings": {key: value for key, value in settings.items() if key not in names},
    }


def _forecast(
    model: Model, tokens: Any, settings: dict[str, Any], directory: Path
) -> dict[str, Any] | None:
    """What will be paid; None of blocks that are cut into parts: not counted."""
    if "model=" in settings.get("mesh", ""):
        return None
    shape = (0, 0) if tokens is None else tokens.shape
    return of_compression(model.config, model.leaves(), shape, settings, directory)


def _open_original(name: str, directory: Path, keep: float, settings: dict[str, Any]) -> Model:
    """Opens a model that can be compressed, if there is room for the result."""
    from lordjax.storage.atomic_directory import check_room

    model = open_model(name)
    if model.kind == "compressed":
        raise ValueError(f"{name}: is compressed already; give the original model")
    dtype = settings["dtype"]
    if dtype is None and "elastic" not in settings:
        dtype = model.stored_dtype
    check_room(directory, estimated_bytes(model, keep, dtype))
    return model


def tokenizer_writer(model: Model) -> Callable[[Path], None] | None:
    """What writes the tokenizer; None, with a note, if the model has none.

    Tried out at once: a tokenizer that cannot be written must not be found after the work.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.write_tokenizer(Path(folder))
    except FileNotFoundError as error:
        say(f"note: the result will have no tokenizer ({error})")
        return None
    return model.write_tokenizer


def estimated_bytes(model: Model, keep: float, dtype: str | None) -> int:
    """What the compressed weights will take on disk."""
    import jax.numpy as jnp

    from lordjax.names import is_block_linear

    total = 0.0
    for path, leaf in model.leaves().items():
        itemsize = jnp.dtype(dtype or leaf.dtype).itemsize
        total += leaf.size * itemsize * (keep if is_block_linear(path) else 1.0)
    return int(total)


def show(result: dict[str, Any]) -> None:
    """Prints the summary for people."""
    calibration = result["calibration"]
    what = (
        f"{result['kept']:.3f} of the block linear weights kept"
        if "kept" in result
        else f"{result['bits_per_weight']:.3f} bits per block linear weight"
    )
    method, size = result["settings"]["method"], format_bytes(result["bytes"])
    print(f"{result['output']}: {method}, {what}, {size}, {result['seconds']:.0f} s")
    if result["predicted"] is not None:
        _show_forecast(result["predicted"], result["happened"])
    if calibration is not None:
        print(
            f"calibrated on {calibration['windows']} windows of {calibration['seq_len']} tokens: "
            f"{calibration['source']}"
        )
    if "elastic" in result["settings"]:
        print(f"next: lordjax export {result['output']} small --keep 0.7")
        return
    print(f"next: lordjax inspect {result['output']}")
    print(f"      lordjax evaluate {result['output']} --tokens PATH")


def _show_forecast(predicted: dict[str, Any], happened: dict[str, Any]) -> None:
    """A line on what was expected and what came."""
    memory = predicted["memory"]["with a work directory"]["host"]
    line = (
        f"peak memory {format_bytes(happened['peak_rss_bytes'])} (expected {format_bytes(memory)})"
    )
    if "seconds" in predicted:
        expected = predicted["seconds"]["total"] - predicted["seconds"].get("write", 0.0)
        line += f", {happened['seconds']['total']:.0f} s (expected {expected:.0f} s)"
    print(line)
    for name, row in happened.get("devices", {}).items():
        each = ", ".join(f"{share:.2f}" for share in row["shares"])
        print(f"{name}: {row['seconds']:.1f} s; of its operations each device did {each}")
