"""Comparison of exported models with their originals: logits, perplexity and start-up time.

Run::

    python -m lordjax.scripts.benchmarks.export.models
    python -m lordjax.scripts.benchmarks.export.models --model MODEL --data DIR

The first table covers every family. Transformers builds tiny random models; `METHODS` compress
them, and every possible export is compared with the compressed model.

With ``--model`` a second table covers a real model. The methods `REAL` compress it, and stock
transformers opens the exports. They are measured on the sequences of ``DIR`` (see
`lordjax.scripts.benchmarks.compress`), and their greedily generated tokens are compared with those
of our model. Last come the seconds from the start of a process to the first logits of the original
model, alternately in lordjax and in transformers. Needs torch and peft.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lordjax.runtime import json_files
from lordjax.scripts.benchmarks.protocol import (
    environment,
    out_option,
    protocol_tokens,
    token_options,
    write_results,
)

TINY = {  # fields of `ModelConfig`
    "vocab_size": 97,
    "hidden_size": 32,
    "mlp_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_positions": 64,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Further config values that some families need.
OTHERS = {
    "opt": {"word_embed_proj_dim": 32, "init_std": 0.15},
    "codegen": {"rotary_dim": 4, "initializer_range": 0.15},
    **{
        kind: {"head_dim": 8, "initializer_range": 0.15}
        for kind in ("qwen3", "gemma2", "gemma3_text")
    },
}
ENCODERS = ("roberta", "bert")
MASK_TOKEN = 3
METHODS = ("lord", "modegpt-cr", "lq")
KINDS = ("dense", "factored", "peft", "orbax")  # the others hold some models; see `matrix`
REAL = ("lord", "modegpt", "lq")
KEEP, BITS, RANK = 0.8, 3.13, 32  # budgets and rank for the real model
GENERATED, PROMPT = 50, 32  # numbers of tokens
# Two programs that do the same. Arguments: a model directory, then token ids.
OURS = """
import sys, jax, jax.numpy as jnp, lordjax
config, params = lordjax.load(sys.argv[1])
tokens = jnp.asarray([[int(i) for i in sys.argv[2].split()]])
params = jax.tree.map(jnp.asarray, params)
print(jax.jit(lordjax.Transformer(config).apply)({"params": params}, tokens)[0, -1, :4])
"""
THEIRS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    print(model(torch.tensor([[int(i) for i in sys.argv[2].split()]])).logits[0, -1, :4])
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--families", help="Model families, separated by commas.  [default: all]")
@click.option("--model", help="Real model to measure after the tiny ones: a directory or hub id.")
@token_options(domain="wikitext2", calibration=16, windows=8, required=False)
@click.option(
    "--methods",
    default=",".join(REAL),
    show_default=True,
    help="Methods that compress the real model, separated by commas.",
)
@click.option("--repeats", default=3, show_default=True, help="Timed starts of each program.")
@out_option
def main(families: str | None, model: str | None, out: str | None, **options: Any) -> None:
    """Compares exported models with the models that they were made from."""
    from lordjax.conversions.families.registry import FAMILIES
    from lordjax.scripts.opened_model import quiet_transformers

    quiet_transformers()
    if model is not None and options["data"] is None:
        raise click.UsageError(
            "--model needs --data: a directory with calib_DOMAIN.npy and eval_DOMAIN.npy"
        )
    results: dict[str, Any] = {"environment": environment(), "tiny": []}

    def keep() -> None:
        write_results(out, results, complete=False)

    for kind in families.split(",") if families else FAMILIES:
        results["tiny"] += tiny(kind)
        keep()
    click.echo(tiny_table(results["tiny"]))
    if model is not None:
        results |= {"real": [], "start": {}}
        real(model, results, keep, **options)
        click.echo(real_table(results["real"]))
        click.echo(json_files.dumps_measured(results["start"]))
    write_results(out, results)


def tiny(kind: str) -> list[dict[str, Any]]:
    """Compresses and exports a tiny model of one family; returns a row per method and export."""
    import numpy as np
    import transformers

    from lordjax.conversions.families.registry import FAMILIES
    from lordjax.conversions.readers.checkpoint import open_checkpoint

    transformers.set_seed(0)
    fields = FAMILIES[kind].fields
    sizes = {fields[field]: size for field, size in TINY.items() if field in fields}
    others = OTHERS.get(kind, {"initializer_range": 0.15})
    config = transformers.AutoConfig.for_model(kind, **sizes, **TOKENS, **others)
    tokens = np.random.default_rng(0).integers(
        MASK_TOKEN + 1, TINY["vocab_size"], (10, 24), np.int32
    )
    auto = "AutoModelForMaskedLM" if kind in ENCODERS else "AutoModelForCausalLM"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original"
        getattr(transformers, auto).from_config(config).save_pretrained(original)
        opened = open_checkpoint(original)
        for method in METHODS:
            result = _tiny_result(opened, method, tokens)
            saved = _saved(Path(folder) / method, opened, result)
            for to in KINDS:
                if to != "peft" or method == "lq":
                    found = _exported(saved, to, tokens[:2])
                    rows.append({"family": kind, "method": method, "to": to, **found})
    return rows


def _tiny_result(opened: Any, method: str, tokens: Any) -> Any:
    from lordjax.allocation.candidates import QUANTIZERS
    from lordjax.compression.low_rank import compress
    from lordjax.compression.quantized import quantize
    from lordjax.kernels import normal_float

    if method not in QUANTIZERS:
        return compress(opened, tokens, method=method, keep=0.5, mask_token=MASK_TOKEN)
    forms = [normal_float.Format(bits, 8, "float32", 64, 256) for bits in (3, 4)]
    return quantize(
        opened, None, method=method, bits=3.8, rank=4, formats=forms, steps=2, dtype="float32"
    )


def _saved(directory: Path, opened: Any, result: Any) -> Any:
    from lordjax.storage import checkpoint, saved_model

    checkpoint.save(directory, result.config, result.params, hf_config=opened.hf_config)
    return saved_model.open_saved(directory)


def _exported(saved: Any, to: str, tokens: Any) -> dict[str, Any]:
    """Exports a saved model into a sibling directory; returns the results of `verify` and sizes."""
    from lordjax.conversions.exporters.export import export
    from lordjax.conversions.exporters.verify import verify
    from lordjax.scripts.opened_model import directory_bytes

    directory = saved.directory.with_name(f"{saved.directory.name}-{to}")
    export(saved, directory, to)
    found = verify(saved, directory, to, tokens)
    sizes = {"bytes": directory, "native_bytes": saved.directory}
    return {**found, **{name: directory_bytes(path) for name, path in sizes.items()}}


def tiny_table(rows: list[dict[str, Any]]) -> str:
    """Formats the largest logit differences: a line per family and method, a column per export."""
    kinds = list(dict.fromkeys(row["to"] for row in rows))
    found = {
        (row["family"], row["method"], row["to"]): f"{row['logit_difference']:.1e}" for row in rows
    }
    lines = ["| family | method | " + " | ".join(kinds) + " |", "|" + "---|" * (2 + len(kinds))]
    for family, method in dict.fromkeys(key[:2] for key in found):
        cells = [found.get((family, method, kind), "") for kind in kinds]
        lines.append(f"| {family} | `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def real(
    model: str,
    results: dict[str, Any],
    keep: Callable[[], None],
    *,
    data: str,
    domain: str,
    methods: str,
    calibration_windows: int,
    windows: int,
    repeats: int,
) -> None:
    """Measures a real model, and puts its rows and start-up times into ``results``.

    Args:
      model: directory or hub id of the model.
      results: dictionary that receives "real" and "start".
      keep: function that stores ``results``; called after every step.
      data: directory of the token arrays.
      domain: domain of the token arrays.
      methods: methods, separated by commas.
      calibration_windows: number of calibration sequences.
      windows: number of evaluation sequences.
      repeats: timed starts of each program.
    """
    from lordjax.allocation.candidates import QUANTIZERS
    from lordjax.compression.low_rank import compress
    from lordjax.compression.quantized import quantize
    from lordjax.scripts.opened_model import open_model

    opened = open_model(model)
    tokens, held_out = protocol_tokens(data, domain, calibration_windows, windows)
    with tempfile.TemporaryDirectory() as folder:
        results["start"] = starts(opened.source, Path(folder), held_out[0, :PROMPT], repeats)
        keep()
        for method in methods.split(","):
            if method in QUANTIZERS:
                result = quantize(opened.source, None, method=method, bits=BITS, rank=RANK)
            else:
                result = compress(opened.source, tokens, method=method, keep=KEEP)
            saved = _saved(Path(folder) / method, opened, result)
            made = {to: _exported(saved, to, held_out) for to in ("dense", "factored")}
            own = greedy(saved, held_out[0, :PROMPT])
            for to, found in made.items():
                text = their_greedy(Path(folder) / f"{method}-{to}", held_out[0, :PROMPT])
                same = sum(a == b for a, b in zip(text, own, strict=True))
                results["real"].append({"method": method, "to": to, "same_tokens": same, **found})
            keep()


def greedy(saved: Any, prompt: Any) -> list[int]:
    """Greedily generates `GENERATED` token ids with our model, without a key-value cache."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from lordjax.models.transformer import Transformer

    @functools.partial(jax.jit, static_argnums=0)
    def likeliest(config: Any, params: Any, tokens: Any) -> Any:
        logits: Any = Transformer(config).apply({"params": params}, tokens)
        return jnp.argmax(logits, axis=-1)

    params = jax.tree.map(jnp.asarray, saved.params())
    tokens = np.zeros((1, len(prompt) + GENERATED), np.int32)
    tokens[0, : len(prompt)] = prompt
    with jax.default_matmul_precision("highest"):
        for i in range(len(prompt), tokens.shape[1]):
            tokens[0, i] = likeliest(saved.config, params, tokens)[0, i - 1]
    return tokens[0, len(prompt) :].tolist()


def their_greedy(directory: Path, prompt: Any) -> list[int]:
    """Greedily generates `GENERATED` token ids with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32
    ).eval()
    ids = torch.as_tensor(prompt)[None].long()
    mask, count = torch.ones_like(ids), GENERATED
    found = model.generate(
        ids, attention_mask=mask, do_sample=False, min_new_tokens=count, max_new_tokens=count
    )
    return found[0, len(prompt) :].tolist()


def starts(source: Any, folder: Path, prompt: Any, repeats: int) -> dict[str, Any]:
    """Times new processes from their start to the first logits of a model in float32.

    Returns:
      Median seconds of lordjax and of transformers, and under "all" the single times. The medians
      leave out the first start.
    """
    import time

    from lordjax.conversions.exporters.export import export
    from lordjax.kernels.kinds import astype
    from lordjax.storage import checkpoint

    params = astype(source.params(), "float32")
    checkpoint.save(folder / "ours", source.config, params, hf_config=source.hf_config)
    export(source, folder / "theirs", "dense", dtype="float32")
    text = " ".join(map(str, prompt))
    commands = {
        name: [sys.executable, "-c", code, str(folder / name), text]
        for name, code in {"ours": OURS, "theirs": THEIRS}.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats + 1):  # the first start fills the file cache
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    found = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {**found, "all": seconds}


def real_table(rows: list[dict[str, Any]]) -> str:
    """Formats the results of the real model: a line per method and export."""
    head = ["method", "export", "MB", "MB of ours", "perplexity", "of ours"]
    head += ["logits", "same tokens"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            f"`{row['method']}`",
            row["to"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['native_bytes'] / 1e6:.1f}",
            f"{row['perplexity']:.4f}",
            f"{row['perplexity_difference']:+.1e}",
            f"{row['logit_difference']:.1e}",
            f"{row['same_tokens']} of {GENERATED}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
