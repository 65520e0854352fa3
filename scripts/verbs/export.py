"""``lordjax export``: writes a model for another library, and compares logits there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lordjax.scripts.console import check_output, format_bytes, progress_report, say
from lordjax.scripts.flags.options import verifies
from lordjax.scripts.opened_model import directory_bytes, open_model, tokenizer_writer
from lordjax.scripts.token_inputs import read_tokens

WINDOWS, WINDOW = 4, 256  # number and length of the windows of --verify, unless --tokens is given


def export_model(
    model: str,
    out: str,
    *,
    to: str | None,
    keep: float | None,
    shape: str | None,
    gguf_type: str | None,
    verify: bool,
    tokens: str | None,
) -> dict[str, Any]:
    """Exports a model; arguments are the flags. Returns the summary."""
    start = time.perf_counter()
    directory = Path(out).expanduser()
    check_output(directory)
    if tokens is not None and not verify:
        raise ValueError("--tokens is used by --verify only; give both or none")
    if shape is not None and keep is None:
        raise ValueError("--shape is used with --keep, of an elastic MODEL; give both or none")
    if gguf_type is not None and to != "gguf":
        raise ValueError("--type is used with --to gguf only; leave it out")
    from lordjax.conversions.exporters.export import EXPORTS, export

    if to is None:
        if keep is None or verify:
            raise ValueError(f"--to is missing; expected {' or '.join(EXPORTS)}")
        return _cut(model, directory, keep, shape, start)
    opened = open_model(model)
    source = opened.stored
    if keep is not None:
        from lordjax.compression import elastic

        source = elastic.open_cut(opened.path, keep, shape=shape, verify=verifies())
    from lordjax.conversions.exporters import verify as verification
    from lordjax.conversions.exporters.factored import VLLM_RANK, adapter_rank

    ids = None
    if verify:
        verification.check_installed(to)
        length = None if tokens else min(WINDOW, opened.config.max_positions)
        ids, _ = read_tokens(opened, tokens, seq_len=length, samples=WINDOWS, seed=0)
    writer = tokenizer_writer(opened)
    export(source, directory, to, write_tokenizer=writer, gguf_type=gguf_type)
    notes = []
    if to == "peft" and (rank := adapter_rank(directory)) > VLLM_RANK:
        notes.append(f"vLLM needs --max-lora-rank {rank} for this adapter")
    for note in notes:
        say(f"note: {note}")
    verified = None if ids is None else verification.verify(source, directory, to, ids)
    return _summary(directory, to, start) | {"notes": notes, "verify": verified}


def _cut(
    model: str, directory: Path, keep: float, shape: str | None, start: float
) -> dict[str, Any]:
    """Cuts an elastic model to one budget and writes it as a lordjax directory."""
    from lordjax.compression import elastic
    from lordjax.scripts.report.page import add_page

    opened = open_model(model)
    writer = tokenizer_writer(opened)
    with progress_report() as progress:
        elastic.export(
            opened.path,
            directory,
            keep,
            shape=shape,
            write_tokenizer=writer,
            also=add_page,
            progress=progress,
            verify=verifies(),
        )
    return _summary(directory, "lordjax", start)


def _summary(directory: Path, to: str, start: float) -> dict[str, Any]:
    return {
        "output": str(directory),
        "to": to,
        "bytes": directory_bytes(directory),
        "notes": [],
        "verify": None,
        "seconds": time.perf_counter() - start,
    }


def show(result: dict[str, Any]) -> None:
    """Prints the summary for people."""
    seconds = f"{result['seconds']:.0f} s"
    print(f"{result['output']}: {result['to']}, {format_bytes(result['bytes'])}, {seconds}")
    if (found := result["verify"]) is not None:
        print(
            f"opened by {found['target']}: largest difference of logits "
            f"{found['logit_difference']:.2e}, allowed {found['tolerance']:.2e}, on "
            f"{found['windows']} windows"
        )
        if "perplexity" in found:
            change = f"relative difference {found['perplexity_difference']:+.1e}"
            print(f"perplexity {found['perplexity']:.4f}, {change}")
