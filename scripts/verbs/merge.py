"""``lordjax merge``: merges adapters into the matrices beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lordjax.scripts.console import check_output, format_bytes
from lordjax.scripts.opened_model import open_model, tokenizer_writer


def merge_model(model: str, out: str, *, to: str) -> dict[str, Any]:
    """Merges adapters; arguments are the flags. Returns the summary."""
    from lordjax.finetune import adapters
    from lordjax.kernels.base import materialize, nbytes
    from lordjax.kernels.kinds import astype
    from lordjax.storage import checkpoint

    directory = Path(out).expanduser()
    check_output(directory)
    opened = open_model(model)
    params = opened.params()
    new = adapters.merge(params) if to == "factors" else materialize(params)
    new = new if opened.stored_dtype is None else astype(new, opened.stored_dtype)
    checkpoint.save(
        directory,
        opened.config,
        new,
        hf_config=opened.hf_config,
        write_tokenizer=tokenizer_writer(opened),
    )
    return {"output": str(directory), "bytes_before": nbytes(params), "bytes": nbytes(new)}


def show(result: dict[str, Any]) -> None:
    """Prints the summary for people."""
    before, now = format_bytes(result["bytes_before"]), format_bytes(result["bytes"])
    print(f"{result['output']}: {before} before, {now} now")
