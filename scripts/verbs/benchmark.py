"""``lordjax benchmark``: measures how fast models read prompts and generate text.

Models take turns in one process, and medians are compared, because the speed of a machine drifts.
Compilation comes first and is timed separately. A dense model is bound by memory when it decodes
small batches, and by multiplications when it reads a prompt. So the table also has bytes and
operations relative to the first model: their inverses bound the speed-up.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from lordjax.names import layer
from lordjax.runtime import json_files
from lordjax.scripts.benchmarks.protocol import environment
from lordjax.scripts.console import format_bytes, progress_report
from lordjax.scripts.opened_model import open_model
from lordjax.scripts.report.figures import check_picture, save_figure
from lordjax.scripts.token_inputs import read_tokens

CHILD = "import sys; from lordjax.scripts.cli import main; main()"


class Runner(Protocol):
    """A model that generates greedily."""

    name: str

    def run(self, prompts: Any, new: int) -> tuple[float, float]:
        """Returns seconds to the first token and of the others; each row gets ``new`` tokens."""
        ...


class LordjaxRunner:
    """A model that lordjax runs."""

    def __init__(self, name: str):
        from lordjax.kernels.base import nbytes

        self.name, self.opened = name, open_model(name)
        self.config = self.opened.config
        self.params = self.opened.arrays()
        self.bytes = nbytes(self.params)

    def run(self, prompts: Any, new: int) -> tuple[float, float]:
        """See `Runner`."""
        from lordjax.generation.decode import stream

        start = time.perf_counter()
        chunks = stream(self.config, self.params, prompts.tolist(), max_new_tokens=new)
        next(chunks)
        first = time.perf_counter()
        for _ in chunks:
            pass
        return first - start, time.perf_counter() - first


class TransformersRunner:
    """A Hugging Face directory that transformers runs in PyTorch, in float32."""

    def __init__(self, name: str):
        import torch
        from transformers import AutoModelForCausalLM

        self.name = f"{name} (transformers, torch)"
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        known = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"  # before 5.24

    def run(self, prompts: Any, new: int) -> tuple[float, float]:
        """See `Runner`."""
        import torch
        from transformers import DynamicCache

        kept = {self.cache_name: DynamicCache(), "use_cache": True}
        with torch.inference_mode():
            start = time.perf_counter()
            out = self.model(torch.from_numpy(prompts), logits_to_keep=1, **kept)
            token = out.logits[:, -1:].argmax(-1)
            first = time.perf_counter()
            for _ in range(new - 1):
                out = self.model(token, **kept)
                token = out.logits[:, -1:].argmax(-1)
            return first - start, time.perf_counter() - first


def benchmark_model(
    models: tuple[str, ...],
    *,
    prefill: int,
    prompt: int,
    new: int,
    batches: tuple[int, ...],
    repeats: int,
    transformers: str | None,
    tokens: str | None,
    windows: int | None,
    picture: str | None,
) -> dict[str, Any]:
    """Measures models; arguments are the flags. The first model is the baseline."""
    settings = dict(locals())
    if picture is not None and tokens is None:
        raise ValueError("--picture draws perplexities; give --tokens, too")
    if picture is not None:
        check_picture(picture)
    import jax

    jax.config.update("jax_enable_compilation_cache", False)  # compilation is timed
    ours = [LordjaxRunner(name) for name in models]
    runners: list[Runner] = [*ours]
    if transformers is not None:
        runners.append(TransformersRunner(transformers))
    shapes = [(1, prefill, 1), *((batch, prompt, new) for batch in batches)]
    ids = min(runner.config.vocab_size for runner in ours)
    seconds, compiled = time_runners(runners, shapes, ids, repeats)
    rows = [
        median_row(runner.name, shapes, found, compiling)
        for runner, found, compiling in zip(runners, seconds, compiled, strict=True)
    ]
    for row, runner in zip(rows, ours, strict=False):
        row["bytes"] = runner.bytes
        row["operations"] = operations(runner.config, runner.params, 1, prefill)
        row["memory"] = peak_memory(runner.name, new)
        if tokens is not None:
            row["perplexity"] = perplexity_of(runner, tokens, windows)
    result = {"models": rows, "settings": settings, "environment": environment()}
    if picture is not None:
        draw(rows, Path(picture))
    return result


Shape = tuple[int, int, int]  # rows, tokens of a prompt, new tokens


def time_runners(
    runners: list[Runner], shapes: list[Shape], ids: int, repeats: int
) -> tuple[list[list[list[tuple[float, float]]]], list[float]]:
    """Measures every runner on every shape.

    Args:
      runners: models, which take turns.
      shapes: batch size, tokens of the prompt and new tokens.
      ids: token ids are drawn below this number.
      repeats: runs of each measurement.

    Returns:
      seconds to the first token and of the others, ``[runner][shape][repeat]``; and seconds of
      compilation, ``[runner]``.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, ids, (batch, length)) for batch, length, _ in shapes]
    compiled = [
        sum(sum(runner.run(p, new)) for p, (_, _, new) in zip(prompts, shapes, strict=True))
        for runner in runners
    ]
    seconds: list[Any] = [[[] for _ in shapes] for _ in runners]
    for k, (_, _, new) in enumerate(shapes):
        for _ in range(repeats):
            for runner, found in zip(runners, seconds, strict=True):
                found[k].append(runner.run(prompts[k], new))
    usual = [sum(sum(min(runs)) for runs in found) for found in seconds]
    return seconds, [max(0.0, a - b) for a, b in zip(compiled, usual, strict=True)]


def median_row(
    name: str, shapes: list[Shape], found: list[list[tuple[float, float]]], compiling: float
) -> dict[str, Any]:
    """Returns a model's row of the table: median tokens per second, and seconds."""
    medians = [tuple(map(statistics.median, zip(*runs, strict=True))) for runs in found]
    pairs = list(zip(shapes, medians, strict=True))
    (_, prefill, _), (first, _) = pairs[0]
    return {
        "model": name,
        "prefill": prefill / first,
        "first": pairs[1][1][0],
        "decode": {str(rows): rows * (new - 1) / rest for (rows, _, new), (_, rest) in pairs[1:]},
        "compile": compiling,
    }


def operations(config: Any, params: Any, batch: int, length: int) -> float:
    """Counts FLOPs of a forward pass that reads a prompt and predicts the next token.

    Counts all kernels, causal attention, and the head at the last position.

    Args:
      config: architecture of the model.
      params: its parameters.
      batch: number of prompts.
      length: tokens of a prompt.
    """
    from lordjax.kernels import trees
    from lordjax.kernels.kinds import weights

    flat, total = trees.flatten(params), 0.0
    for path, leaf in flat.items():
        if path.endswith("/kernel") and not path.startswith("head"):
            total += 2.0 * weights(leaf)
    for i in range(config.num_layers):
        # Attention needs half of the square of q @ k.T and of weights @ v.
        widths = flat[f"{layer(i)}/attention/q/kernel"], flat[f"{layer(i)}/attention/o/kernel"]
        total += length * (widths[0].shape[-1] + widths[1].shape[-2])
    return (total * length + 2.0 * config.vocab_size * config.hidden_size) * batch


def peak_memory(model: str, new: int) -> int:
    """Returns the peak resident bytes of a process that opens a model and generates."""
    command = [sys.executable, "-c", CHILD, "generate", model, "def", "--json"]
    command += ["--max-new-tokens", str(new)]
    # Without the cache, so that the memory of compilation is counted.
    environ = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if found.returncode:
        raise RuntimeError(
            f"{model}: `lordjax generate` failed in a process of its own: {found.stderr.strip()}"
        )
    return json.loads(found.stdout)["peak_rss"]


def perplexity_of(runner: LordjaxRunner, tokens: str, windows: int | None) -> float:
    """Returns the perplexity of a model on windows of a path."""
    from lordjax.evaluate import perplexity

    ids, _ = read_tokens(runner.opened, tokens, seq_len=None, samples=windows, seed=0)
    with progress_report() as progress:
        return perplexity(runner.config, runner.params, ids, progress=progress)["perplexity"]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws perplexity against bytes, and against tokens per second at the first batch size."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "perplexity" in row]
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    batch = next(iter(rows[0]["decode"]))
    for row, marker in zip(rows, itertools.cycle("os^vD<>Pph*X"), strict=False):
        name = Path(row["model"]).name
        for axes, x in ((left, row["bytes"] / 1e6), (right, row["decode"][batch])):
            axes.scatter(x, row["perplexity"], label=name, marker=marker, s=60)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.margins(0.1)
    left.set(xlabel="weights (MB)", ylabel="perplexity")
    right.set(xlabel=f"decoding speed (tokens per second, batch {batch})")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save_figure(figure, path)


def show(result: dict[str, Any]) -> None:
    """Prints a markdown table."""
    rows, first = result["models"], result["models"][0]
    batches = list(first["decode"])
    speeds = ["prefill", *(f"decode, batch {batch}" for batch in batches)]
    columns = ["model", *speeds, "first token", "compile", "bytes", "operations", "memory"]
    columns += ["perplexity"] if "perplexity" in first else []
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for row in rows:
        cells = [Path(row["model"]).name, _speed(row["prefill"], first["prefill"])]
        cells += [_speed(row["decode"][b], first["decode"][b]) for b in batches]
        cells += [f"{row['first'] * 1e3:.0f} ms", f"{row['compile']:.1f} s"]
        if "bytes" in row:
            shares = (row[name] / first[name] for name in ("bytes", "operations"))
            cells += [f"{share:.1%}" for share in shares]
            cells += [format_bytes(row["memory"])]
            cells += [f"{row['perplexity']:.2f}"] if "perplexity" in row else []
        print("| " + " | ".join([*cells, *[""] * (len(columns) - len(cells))]) + " |")
    shown = {k: result["settings"][k] for k in ("prefill", "prompt", "new", "repeats")}
    print(
        "\nTokens per second, and the ratio to the first model. " + json_files.dumps_measured(shown)
    )
    print(json_files.dumps_measured(result["environment"]))


def _speed(value: float, first: float) -> str:
    return f"{value:.0f} ({value / first:.2f} x)"
