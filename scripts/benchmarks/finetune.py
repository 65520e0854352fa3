"""Benchmarks of fine-tuning: speed compared with PEFT, recovered perplexity, memory of a step.

Run::

    python -m lordjax.scripts.benchmarks.finetune speed MODEL --data DIR
    python -m lordjax.scripts.benchmarks.finetune recovery MODEL --data DIR --cases CASES
    python -m lordjax.scripts.benchmarks.finetune memory CONFIG

``DIR`` holds ``calib_<domain>.npy`` and ``eval_<domain>.npy`` (see
`lordjax.scripts.benchmarks.compress`).

*speed*: seconds of a step of LoRA on the linear layers of all blocks, in float32. lordjax and PEFT
(in PyTorch) take turns in one process. lordjax also runs with rematerialization, and over NF4
weights.

*recovery*: loss on the evaluation sequences before and after training on the calibration sequences.
A case is ``MODEL:RECIPE``. MODEL is ``dense``, a method with the kept fraction (``modegpt@0.7``) or
the bits (``auto@2.75``), a directory that ``compress`` wrote, or weights quantized to 3 bits:
``nf3``, ``lq3`` (data-free, rank 32) or ``loftq3`` (like ``lq3``, with one alternation). With the
recipe ``distill`` the training is that of ``compress --distill``.

*memory*: bytes of a compiled QLoRA step over NF4, and the prediction of
`lordjax.finetune.memory.predict`. Both are computed from shapes, for the dense model and after LoRD
with the rank of its strongest compression of StarCoder. No array is allocated.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
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

BITS3 = "nf3"
RANK = 32


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measures speed, recovered perplexity and memory of fine-tuning."""


@main.command()
@click.argument("model")
@token_options(domain="wikitext2")
@click.option("--batch", default=4, show_default=True, help="Number of sequences in a step.")
@click.option("--seq-len", default=512, show_default=True, help="Number of tokens in a sequence.")
@click.option("--repeats", default=5, show_default=True, help="Timed steps of every variant.")
@click.option("--rank", default=RANK, show_default=True, help="Rank of the LoRA adapters.")
def speed(
    model: str, data: str, domain: str, batch: int, seq_len: int, repeats: int, rank: int
) -> None:
    """Times a LoRA step on MODEL, in lordjax and in PEFT."""
    from lordjax.scripts.opened_model import open_model

    opened = open_model(model)
    tokens = protocol_tokens(data, domain, batch, 1)[0][:, :seq_len]
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "ours": _our_steps(opened, tokens, "lora", rank, remat=False),
            "ours, remat": _our_steps(opened, tokens, "lora", rank, remat=True),
            "ours over NF4": _our_steps(opened, tokens, "qlora", rank, remat=False),
            "peft": _their_steps(opened, tokens, rank, Path(folder) / "dense"),
        }
        first, seconds = {}, {name: [] for name in runs}
        for name, run in runs.items():
            start = time.perf_counter()
            next(run)
            first[name] = time.perf_counter() - start
        for _ in range(repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                next(run)
                seconds[name].append(time.perf_counter() - start)
    found = {name: statistics.median(times) for name, times in seconds.items()}
    click.echo("| step | first s | s | tokens/s | of PEFT's |\n|---|---|---|---|---|")
    for name, took in found.items():
        rate, ratio = tokens.size / took, found["peft"] / took
        click.echo(f"| {name} | {first[name]:.1f} | {took:.2f} | {rate:.0f} | {ratio:.2f} |")
    settings = {"batch": batch, "seq_len": seq_len, "rank": rank}
    click.echo(json_files.dumps_measured(environment() | settings))


def _our_steps(opened: Any, tokens: Any, recipe: str, rank: int, *, remat: bool) -> Any:
    from lordjax.data.examples import Examples, next_tokens
    from lordjax.finetune import recipes, step

    settings = step.Settings(10_000, len(tokens), remat=remat)
    row = recipes.changed(recipes.named(recipe), rank=rank)
    setup = step.prepare_training(opened.config, opened.params(), row, settings)
    examples = Examples(tokens, next_tokens(tokens, np.ones(tokens.shape, bool)))
    start = (setup.state, setup.frozen, examples, setup.optimizer, settings)
    return step.run(opened.config, *start)


def _their_steps(opened: Any, tokens: Any, rank: int, directory: Path) -> Any:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from lordjax.conversions.exporters.export import export

    export(opened.source, directory, "dense", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    model = peft.get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    ids = torch.as_tensor(tokens).long()
    while True:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad()
        yield loss.item()


@main.command()
@click.argument("model")
@token_options(domain="pystdlib", calibration=16, windows=4)
@click.option(
    "--cases",
    required=True,
    help="Cases MODEL:RECIPE, separated by commas, such as dense:lora or modegpt@0.7:lora.",
)
@click.option("--steps", default=50, show_default=True, help="Number of training steps.")
@click.option("--batch", default=8, show_default=True, help="Number of sequences in a step.")
@click.option("--seq-len", default=512, show_default=True, help="Number of tokens in a sequence.")
@click.option("--learning-rate", type=float, help="Learning rate.  [default: the recipe's]")
@click.option("--other", help="Domain that the loss is measured in as well.")
@click.option(
    "--distill",
    default=0.0,
    show_default=True,
    help="Weight of the distillation loss, with the original model as teacher; 0: none.",
)
@out_option
def recovery(
    model: str,
    data: str,
    domain: str,
    cases: str,
    calibration_windows: int,
    windows: int,
    out: str | None,
    other: str | None,
    **options: Any,
) -> None:
    """Measures the loss of MODEL, compressed in each case, before and after training."""
    from lordjax.evaluate import perplexity
    from lordjax.runtime.progress import peak_rss
    from lordjax.scripts.opened_model import open_model

    opened = open_model(model)
    tokens = protocol_tokens(data, domain, 10**6, windows)[0]
    sets = {name: protocol_tokens(data, name, 1, windows)[1] for name in (domain, other) if name}

    def nats(params: Any) -> dict[str, float]:
        found = {name: perplexity(opened.config, params, ids) for name, ids in sets.items()}
        return {name: row["nll_per_token"] for name, row in found.items()}

    results: dict[str, Any] = {"environment": environment(), "settings": options, "rows": []}
    dense = results["dense"] = nats(opened.params())
    click.echo(
        "| case | MB | trained on | domain | perplexity before, after | over dense | s | peak |"
    )
    click.echo("|---|---|---|---|---|---|---|---|")
    for case in cases.split(","):
        what, recipe = case.split(":")
        params = _compressed(opened, what, tokens[:calibration_windows])
        row, *pair = _recovered(opened, params, recipe, tokens, **options)
        row |= {"before": nats(pair[0]), "after": nats(pair[1]), "peak_rss_bytes": peak_rss()}
        results["rows"].append({"case": case, **row})
        for name in sets:
            losses = [row[key][name] for key in ("before", "after")]
            cells = [", ".join(f"{np.exp(x):.2f}" for x in losses)]
            cells.append(", ".join(f"{x - dense[name]:.3f}" for x in losses))
            click.echo(
                f"| {case} | {row['bytes'] / 1e6:.0f} | {row['tokens']} | {name} | {cells[0]} | "
                f"{cells[1]} | {row['seconds']:.0f} | {(row['peak_rss_bytes'] or 0) / 1e9:.1f} GB |"
            )
        write_results(out, results, complete=False)
    write_results(out, results)


def _compressed(opened: Any, what: str, tokens: Any) -> Any:
    from lordjax.allocation.candidates import QUANTIZERS
    from lordjax.compression.low_rank import compress
    from lordjax.compression.quantized import quantize
    from lordjax.kernels.convert import encode
    from lordjax.scripts.opened_model import open_model

    if Path(what).is_dir():
        return open_model(what).params()
    if what == "dense":
        return opened.params()
    if what == "nf3":
        return encode(opened.params(), BITS3, where=r"layer_\d+/.*/kernel$")
    if what in ("lq3", "loftq3"):
        steps = 1 if what == "loftq3" else 10
        made = quantize(opened.source, None, method="lq", form=BITS3, rank=RANK, steps=steps)
        return made.params
    method, _, budget = what.partition("@")
    if method in QUANTIZERS:
        return quantize(opened.source, tokens, method=method, bits=float(budget)).params
    return compress(opened.source, tokens, method=method, keep=float(budget)).params


def _recovered(
    opened: Any,
    params: Any,
    recipe: str,
    tokens: Any,
    *,
    steps: int,
    batch: int,
    seq_len: int,
    learning_rate: float | None,
    distill: float,
) -> tuple[dict[str, Any], Any, Any]:
    """Returns facts about the training, and the parameters before and after it."""
    from lordjax.data.examples import Examples, next_tokens
    from lordjax.finetune import adapters, recipes, step
    from lordjax.kernels import trained_scales
    from lordjax.kernels.base import nbytes
    from lordjax.kernels.kinds import astype

    start = time.perf_counter()
    config, params = opened.config, astype(params, "float32")
    rows = tokens[:, : tokens.shape[1] // seq_len * seq_len].reshape(-1, seq_len)
    if recipe == "distill":
        return _distilled(opened, params, rows, steps * batch * seq_len, learning_rate)
    examples = Examples(rows, next_tokens(rows, np.ones(rows.shape, bool)))
    settings = step.Settings(steps, batch, distill=distill)
    row = recipes.changed(recipes.named(recipe), learning_rate=learning_rate)
    teacher = opened.params() if distill else None
    setup = step.prepare_training(config, params, row, settings)
    given = (setup.state, setup.frozen, examples, setup.optimizer, settings)
    state, losses = setup.state, []
    for state, metrics in step.run(config, *given, teacher=teacher):  # noqa: B007
        losses.append(metrics["nll"])
    after = step.with_trained(state.params, setup.params, setup.paths)
    after = adapters.merge(trained_scales.packed(after, params))
    facts = {
        "bytes": nbytes(after),
        "tokens": steps * batch * seq_len,
        "losses": losses,
        "recipe": dataclasses.asdict(row),
        "seconds": time.perf_counter() - start,
    }
    return facts, setup.params, after


def _distilled(opened: Any, params: Any, rows: Any, tokens: int, rate: float | None) -> Any:
    """Distills a model as ``compress --distill`` does; returns what `_recovered` does."""
    from lordjax.finetune.distillation import Distillation, Text, distill
    from lordjax.kernels.base import nbytes
    from lordjax.storage.store import MemoryStore

    how = Distillation(tokens, rate)
    count, held = how.sequences(rows.shape[1])
    if len(rows) < count + held:
        raise click.ClickException(f"{len(rows)} sequences; expected {count} and {held} held out")
    text = Text(rows[:count], rows[-held:])
    with tempfile.TemporaryDirectory() as folder:
        where: dict[str, Any] = {"store": MemoryStore(), "directory": Path(folder) / "run"}
        new, facts = distill(opened.source, opened.config, params, text, how, **where)
    return {**facts, "bytes": nbytes(new)}, params, new


@main.command()
@click.argument("config")
@click.option("--batch", default=2, show_default=True, help="Number of sequences in a step.")
@click.option("--seq-len", default=512, show_default=True, help="Number of tokens in a sequence.")
@click.option("--rank", default=16, show_default=True, help="Rank of the LoRA adapters.")
@click.option(
    "--dtype",
    default="bfloat16",
    show_default=True,
    help="Dtype of the computation and of unquantized frozen weights.",
)
@click.option(
    "--ranks",
    default="mlp/up=2304",
    show_default=True,
    help="Ranks of the compressed model as LAYER=RANK, separated by commas.",
)
def memory(config: str, batch: int, seq_len: int, rank: int, dtype: str, ranks: str) -> None:
    """Compares the memory of a QLoRA step before and after compression.

    CONFIG is a model directory or a config.json.
    """
    import jax

    from lordjax.allocation import policies
    from lordjax.allocation.plan import Plan
    from lordjax.compression.site_factors import site_sizes
    from lordjax.conversions.readers.checkpoint import read_config
    from lordjax.finetune import memory as sizes
    from lordjax.finetune import recipes
    from lordjax.finetune.step import Settings
    from lordjax.forecast.shapes import dense_shapes, outline
    from lordjax.kernels.kinds import astype

    model = read_config(config)[1]
    cut = {name: int(r) for name, r in (part.split("=") for part in ranks.split(","))}
    chosen = policies.ranks_by_pattern(site_sizes(dense_shapes(model), "lord"), cut)
    plans = {"dense": dict.fromkeys(chosen), "LoRD": chosen}
    recipe = recipes.changed(recipes.named("qlora"), rank=rank)
    settings = Settings(1, batch, dtype=dtype)
    click.echo("| model | base | trained | predicted | compiled | arguments | temporaries |")
    click.echo("|---|---|---|---|---|---|---|")
    totals = []
    for name, planned in plans.items():
        shapes = outline(model, Plan("lord", planned, None, policies.GIVEN))
        shapes = jax.eval_shape(lambda tree: astype(tree, dtype), shapes)
        said = sizes.predict(model, shapes, recipe, settings, seq_len)
        found = sizes.compiled_bytes(model, shapes, recipe, settings, seq_len)
        totals.append((said, found))
        cells = [said["base"], said["trained"], said["total"], found["total"]]
        cells += [found["arguments"], found["temporaries"]]
        click.echo(f"| {name} | " + " | ".join(f"{c / 1e9:.3f} GB" for c in cells) + " |")
    both = [(said["base"], found["total"]) for said, found in totals]
    saved = [1 - after / before for before, after in zip(*both, strict=True)]
    click.echo(f"saved: {saved[0]:.1%} of the base, {saved[1]:.1%} of the compiled step")
    asked = {"batch": batch, "seq_len": seq_len, "rank": rank}
    click.echo(json_files.dumps_measured(environment() | asked))


if __name__ == "__main__":
    main()
