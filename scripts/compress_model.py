"""``lordjax compress``: open, calibrate, factor, allocate, write."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lordjax.scripts.common import (
    Model,
    check_output,
    open_model,
    progress_report,
    read_tokens,
    say,
    size,
)
from lordjax.scripts.inspect_model import is_block_linear


def compress_model(
    model: str,
    out: str,
    *,
    method: str,
    keep: float,
    calibration: str | None,
    samples: int,
    seq_len: int | None,
    allocation: str | None,
    temperature: float | None,
    prefix: str | None,
    seed: int,
    dtype: str | None,
) -> dict[str, Any]:
    """Compresses a model into a directory; arguments are the flags. Returns the summary.

    Everything that can be wrong with the arguments is found before the work begins.
    """
    start = time.perf_counter()
    directory = Path(out).expanduser()
    check_output(directory)
    from lordjax.compression import check_method, compress
    from lordjax.methods import METHODS
    from lordjax.prepared import check_policy

    check_method(method)
    allocation = allocation or METHODS[method].allocation
    check_policy(allocation, temperature)
    opened = _open_original(model, directory, keep, dtype)
    write_tokenizer = tokenizer_writer(opened)
    if calibration is None:
        say("calibrating on the sources of Python's standard library (--calibration to change)")
    tokens, facts = read_tokens(opened, calibration, seq_len=seq_len, samples=samples, seed=seed)
    settings = {
        "model": model,
        "method": method,
        "keep": keep,
        "allocation": allocation,
        "temperature": temperature,
        "prefix": prefix or METHODS[method].prefix,
        "calibration": facts["source"],
        "samples": samples,
        "seq_len": facts["seq_len"],
        "seed": seed,
        "dtype": dtype,
    }
    with progress_report() as progress:
        result = compress(
            opened.source,
            tokens,
            method=method,
            keep=keep,
            allocation=allocation,
            temperature=temperature,
            prefix=prefix,
            dtype=dtype,
            progress=progress,
        )
    save_result(directory, opened, result, facts, settings, write_tokenizer)
    return {
        "output": str(directory),
        "kept": result.report["plan"]["kept"],
        "bytes": result.report["bytes"],
        "seconds": time.perf_counter() - start,
        "calibration": facts,
        "settings": settings,
    }


def _open_original(name: str, directory: Path, keep: float, dtype: str | None) -> Model:
    """Opens a model that can be compressed, if there is room for the result."""
    from lordjax.checkpoint import check_room

    model = open_model(name)
    if model.kind == "compressed":
        raise ValueError(f"{name}: is compressed already; give the original model")
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


def save_result(
    directory: Path,
    model: Model,
    result: Any,
    facts: dict[str, Any],
    settings: dict[str, Any],
    write_tokenizer: Callable[[Path], None] | None,
) -> None:
    """Writes a compressed model with its tokenizer and the settings it was made with."""
    from lordjax import checkpoint

    report = {**result.report, "calibration": facts, "settings": settings}
    checkpoint.save(
        directory,
        result.config,
        result.params,
        hf_config=model.hf_config,
        plan=result.plan,
        report=report,
        write_tokenizer=write_tokenizer,
    )


def estimated_bytes(model: Model, keep: float, dtype: str | None) -> int:
    """What the compressed weights will take on disk."""
    import jax.numpy as jnp

    total = 0.0
    for path, leaf in model.leaves().items():
        itemsize = jnp.dtype(dtype or leaf.dtype).itemsize
        total += leaf.size * itemsize * (keep if is_block_linear(path) else 1.0)
    return int(total)


def show(result: dict[str, Any]) -> None:
    """Prints the summary for people."""
    settings, calibration = result["settings"], result["calibration"]
    print(
        f"{result['output']}: {settings['method']}, {result['kept']:.3f} of the block linear "
        f"weights kept, {size(result['bytes'])}, {result['seconds']:.0f} s"
    )
    print(
        f"calibrated on {calibration['windows']} windows of {calibration['seq_len']} tokens: "
        f"{calibration['source']}"
    )
    print(f"next: lordjax inspect {result['output']}")
    print(f"      lordjax evaluate {result['output']} --tokens PATH")
