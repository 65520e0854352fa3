"""``lordjax convert``: writes a model in another format, dtype or number of files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lordjax.scripts.console import check_output, format_bytes
from lordjax.scripts.opened_model import Model, file_bytes, open_model, tokenizer_writer


def convert_model(
    model: str, out: str, *, to: str, dtype: str | None, shard_bytes: int | None
) -> dict[str, Any]:
    """Converts a model; arguments are the flags. Returns the summary."""
    start = time.perf_counter()
    directory = Path(out).expanduser()
    check_output(directory)
    opened = open_model(model)
    dtype = dtype or opened.stored_dtype
    FORMATS[to](opened, directory, dtype, shard_bytes, tokenizer_writer(opened))
    return {
        "output": str(directory),
        "to": to,
        "bytes": file_bytes(directory),
        "seconds": time.perf_counter() - start,
    }


def _native(
    model: Model, directory: Path, dtype: str | None, shard_bytes: int | None, write_tokenizer: Any
) -> None:
    import numpy as np

    from lordjax.kernels.kinds import astype
    from lordjax.storage import checkpoint, saved_model

    params = model.params()
    with np.errstate(over="ignore"):  # overflows are reported below
        params = params if dtype is None else astype(params, dtype)
    _check_finite(params)
    saved = model.source if isinstance(model.source, saved_model.Saved) else None
    checkpoint.save(
        directory,
        model.config,
        params,
        hf_config=model.hf_config,
        plan=None if saved is None else saved.plan(),
        write_tokenizer=write_tokenizer,
        shard_bytes=shard_bytes or checkpoint.SHARD_BYTES,
    )


def _hf(
    model: Model, directory: Path, dtype: str | None, shard_bytes: int | None, write_tokenizer: Any
) -> None:
    from lordjax.conversions.exporters.export import export
    from lordjax.storage.checkpoint import SHARD_BYTES

    export(
        model.source,
        directory,
        "dense",
        dtype=dtype,
        write_tokenizer=write_tokenizer,
        shard_bytes=shard_bytes or SHARD_BYTES,
    )


FORMATS = {"native": _native, "hf": _hf}


def _check_finite(params: Any) -> None:
    """Raises ValueError with the parameter's name if a value is not finite."""
    import jax
    import numpy as np

    from lordjax.kernels import trees

    for path, leaf in trees.flatten(params).items():
        if not all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(leaf)):
            raise ValueError(
                f"{path} is not finite in {leaf.dtype}; if it overflows, choose another --dtype"
            )


def show(result: dict[str, Any]) -> None:
    """Prints the summary for people."""
    seconds = f"{result['seconds']:.0f} s"
    print(f"{result['output']}: {result['to']}, {format_bytes(result['bytes'])}, {seconds}")
