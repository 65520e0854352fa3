"""The matrix of methods and exports: every model is opened in its target and compared with ours.

Run::

    python -m lordjax.scripts.benchmarks.export.matrix
    python -m lordjax.scripts.benchmarks.export.matrix --model MODEL --data DIR

The first command compresses a tiny random Llama by each method of `METHODS`, and writes every
export. A cell is the largest difference of a logit, divided by the logits' standard deviation.

With ``--model`` a real model is compressed on sequences of ``DIR`` (see
`lordjax.scripts.benchmarks.compress`), and a cell is the relative difference of perplexities.

A letter stands for a refusal, whose line is below the table. ``vllm`` is left out: it has the
tensors of ``factored``, and vLLM is not run here. Needs torch and peft; GGUF files are
opened by llama.cpp where that is installed.
"""

from __future__ import annotations

import string
import tempfile
from pathlib import Path
from typing import Any

import click

from lordjax.scripts.benchmarks.protocol import (
    environment,
    out_option,
    protocol_tokens,
    token_options,
    write_results,
)

METHODS = (
    *("modegpt", "modegpt-stock", "modegpt-per-layer", "modegpt-cr", "lord", "lord-affine"),
    *("nf", "lq"),
)
# A Llama whose MLPs have four widths that are multiples of 256.
TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KEEP, BITS, RANK = 0.7, 3.5, 8  # budgets and rank


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--methods",
    default=",".join(METHODS),
    show_default=True,
    help="Methods, separated by commas.",
)
@click.option("--model", help="Real model: a directory, a GGUF file or a hub id.  [default: tiny]")
@token_options(domain="wikitext2", calibration=16, windows=2, required=False)
@out_option
def main(
    methods: str, model: str | None, data: str | None, out: str | None, **options: Any
) -> None:
    """Prints which export holds which method's models, and how exactly."""
    from lordjax.scripts.opened_model import open_model, quiet_transformers

    quiet_transformers()
    if (model is None) != (data is None):
        raise click.UsageError("--model and --data go together; give both or none")
    results: dict[str, Any] = {"environment": environment(), "model": model, "cells": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is None or data is None:
            opened, tokens, held_out = _tiny(folder)
        else:
            opened = open_model(model).source
            domain, *counts = (options[k] for k in ("domain", "calibration_windows", "windows"))
            tokens, held_out = protocol_tokens(data, domain, *counts)
        for method in methods.split(","):
            results["cells"] += cells(folder, opened, method, tokens, held_out)
            write_results(out, results, complete=False)
    click.echo(table(results["cells"], "logits" if model is None else "perplexity"))
    write_results(out, results)


def _tiny(folder: Path) -> tuple[Any, Any, Any]:
    """Returns a tiny random model, and sequences to compress it on and to compare it on."""
    import numpy as np
    import transformers

    from lordjax.conversions.readers.checkpoint import open_checkpoint

    transformers.set_seed(0)
    config = transformers.AutoConfig.for_model("llama", **TINY)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "original")
    tokens = np.random.default_rng(0).integers(3, TINY["vocab_size"], (10, 24), np.int32)
    return open_checkpoint(folder / "original"), tokens[:8], tokens[8:]


def compressed(folder: Path, opened: Any, method: str, tokens: Any) -> Any:
    """Compresses a model into a directory, and opens that."""
    from lordjax.allocation.candidates import QUANTIZERS
    from lordjax.compression.low_rank import compress
    from lordjax.compression.quantized import quantize
    from lordjax.compression.resumable_output import described
    from lordjax.storage import checkpoint, saved_model

    result: Any
    if method in QUANTIZERS:
        rank = None if QUANTIZERS[method].rank is None else RANK
        result = quantize(opened, None, method=method, bits=BITS, rank=rank)
    else:
        result = compress(opened, tokens, method=method, keep=KEEP)
    hf_config = described(result, opened.hf_config)
    checkpoint.save(folder / method, result.config, result.params, hf_config=hf_config)
    return saved_model.open_saved(folder / method)


def cells(
    folder: Path, opened: Any, method: str, tokens: Any, held_out: Any
) -> list[dict[str, Any]]:
    """Returns what every export of a method's model gives: its comparison, or why it is refused.

    Args:
      folder: directory to write into.
      opened: the original model.
      method: a key of `METHODS` of lordjax, or of `QUANTIZERS`.
      tokens: sequences that the model is compressed on.
      held_out: sequences that it is compared on.
    """
    import numpy as np

    from lordjax.conversions.exporters.export import export
    from lordjax.conversions.exporters.verify import RELOAD, our_logits, target_of, verify

    saved, found = compressed(folder, opened, method, tokens), []
    spread = float(np.mean([our_logits(saved)(window[None]).std() for window in held_out]))
    for to in RELOAD:
        cell: dict[str, Any] = {"method": method, "to": to, "target": target_of(to)}
        directory = folder / f"{method}-{to}"
        try:
            export(saved, directory, to)
        except ValueError as error:
            found.append(cell | {"refused": str(error)})
            continue
        result = verify(saved, directory, to, held_out)
        own = result["perplexity"] - result["perplexity_difference"]
        cell |= {
            "logits": result["logit_difference"] / spread,
            "perplexity": result["perplexity_difference"] / own,
            "passed": result["passed"],
        }
        found.append(cell)
    return found


def table(rows: list[dict[str, Any]], what: str) -> str:
    """Formats a line per method and a column per export, and the lines of the refusals.

    Args:
      rows: what `cells` found.
      what: key of the number: ``logits`` or ``perplexity``.
    """
    columns = {row["to"]: row["target"] for row in rows}
    lines = ["| method | " + " | ".join(f"`{to}`" for to in columns) + " |"]
    lines.append("|" + "---|" * (1 + len(columns)))
    lines.append("| opened by | " + " | ".join(columns.values()) + " |")
    refused: dict[str, str] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["to"]: row for row in rows if row["method"] == method}
        texts = []
        for to in columns:
            if (reason := own[to].get("refused")) is None:
                texts.append(f"{own[to][what]:.1e}" + ("" if own[to]["passed"] else " (differs)"))
            else:
                texts.append(refused.setdefault(reason, string.ascii_letters[len(refused)]))
        lines.append(f"| `{method}` | " + " | ".join(texts) + " |")
    reasons = [f"- {letter}: {reason}" for reason, letter in refused.items()]
    return "\n".join([*lines, "", *reasons])


if __name__ == "__main__":
    main()
