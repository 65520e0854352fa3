"""``lordjax evaluate``: measures the perplexity of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lordjax.scripts.console import progress_report
from lordjax.scripts.opened_model import open_model
from lordjax.scripts.token_inputs import mask_token, read_tokens


def evaluate_model(
    model: str, tokens: str, *, field: str, windows: int | None, seq_len: int | None
) -> dict[str, Any]:
    """Measures the perplexity of a model; arguments are the flags."""
    if not Path(tokens).exists():
        raise FileNotFoundError(f"{tokens}: no such file or directory (--tokens)")
    opened = open_model(model)
    how: dict[str, Any] = {"seq_len": seq_len, "samples": windows, "seed": 0, "field": field}
    ids, facts = read_tokens(opened, tokens, **how)
    from lordjax.evaluate import perplexity

    # The tokenizer of an array is not known.
    name = None if Path(tokens).suffix == ".npy" else model
    with progress_report() as progress:
        result = perplexity(
            opened.config,
            opened.params(),
            ids,
            tokenizer_name=name,
            bos="sequence_ends" in facts,
            mask_token=mask_token(opened),
            progress=progress,
        )
    settings = {
        "model": model,
        "tokens": tokens,
        "windows": facts["windows"],
        "seq_len": facts["seq_len"],
    }
    return {**result, "settings": settings}


def show(result: dict[str, Any]) -> None:
    """Prints the measurement for people."""
    kind = "pseudo-perplexity" if "masked_share" in result["protocol"] else "perplexity"
    print(f"{kind} {result['perplexity']:.4f}")
    print(f"nll        {result['nll_per_token']:.5f} nats per token, {result['tokens']} tokens")
    for name, value in result["protocol"].items():
        print(f"{name:16} {value}")
