"""``lordjax export``: a model in a form that others open, and a look whether it is the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lordjax.scripts.common import check_output, directory_bytes, open_model, read_tokens, say, size
from lordjax.scripts.compress_model import tokenizer_writer

WINDOWS, WINDOW = 4, 256  # tokens that an export is verified on, unless others are given


def export_model(
    model: str, out: str, *, to: str, verify: bool, tokens: str | None
) -> dict[str, Any]:
    """Exports a model; arguments are the flags. Returns the summary."""
    start = time.perf_counter()
    directory = Path(out).expanduser()
    check_output(directory)
    if tokens is not None and not verify:
        raise ValueError("--tokens are for --verify; give both or none")
    opened = open_model(model)
    from lordjax.conversions import verify as verification
    from lordjax.conversions.export import export
    from lordjax.conversions.export_factored import VLLM_RANK, adapter_rank

    ids = None
    if verify:
        verification.check_installed(to)
        length = None if tokens else min(WINDOW, opened.config.max_positions)
        ids, _ = read_tokens(opened, tokens, seq_len=length, samples=WINDOWS, seed=0)
    export(opened.source, directory, to, write_tokenizer=tokenizer_writer(opened))
    notes = []
    if to == "peft" and (rank := adapter_rank(directory)) > VLLM_RANK:
        notes.append(f"vLLM takes adapters of this rank with --max-lora-rank {rank} only")
    for note in notes:
        say(f"note: {note}")
    return {
        "output": str(directory),
        "to": to,
        "bytes": directory_bytes(directory),
        "notes": notes,
        "verify": None if ids is None else verification.verify(opened.source, directory, to, ids),
        "seconds": time.perf_counter() - start,
    }


def show(result: dict[str, Any]) -> None:
    """Prints the summary for people."""
    seconds = f"{result['seconds']:.0f} s"
    print(f"{result['output']}: {result['to']}, {size(result['bytes'])}, {seconds}")
    if (found := result["verify"]) is not None:
        print(
            f"largest difference of logits {found['logit_difference']:.2e}, allowed "
            f"{found['tolerance']:.2e}, on {found['windows']} windows"
        )
        if "perplexity" in found:
            change = f"{found['perplexity_difference']:+.1e} of ours"
            print(f"perplexity {found['perplexity']:.4f}, {change}")
