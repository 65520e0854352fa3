"""Tokens per second of a dense and a compressed model in the programs that people serve them with.

Run::

    python -m lordjax.scripts.benchmarks.export.speed MODEL SMALL
    python -m lordjax.scripts.benchmarks.export.speed MODEL SMALL --data DIR --type BF16

Both models are exported to ``dense``, which stock transformers opens without remote code, and to
``gguf``, which llama.cpp opens. In each program the two take turns on the same prompts, and medians
are compared, because the speed of a machine drifts.

Beside them are the ratios of bytes that a step of decoding reads and of operations that a prompt
needs: their inverses are the speed-up that is possible, and *gain* is the share of it that was
measured. With ``--data`` the perplexity of the small model's exports is compared with ours.
"""

from __future__ import annotations

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

PROGRAMS = ("transformers", "llama.cpp")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.argument("small")
@click.option("--prefill", default=256, show_default=True, help="Tokens of a prompt that is read.")
@click.option("--prompt", default=32, show_default=True, help="Tokens of a prompt to continue.")
@click.option("--new", default=33, show_default=True, help="Tokens that are generated.")
@click.option("--repeats", default=5, show_default=True, help="Runs of each measurement.")
@click.option("--threads", default=1, show_default=True, help="Threads of each program.")
@click.option(
    "--type",
    "gguf_type",
    type=click.Choice(["F32", "F16", "BF16", "Q8_0"]),
    default="F32",
    show_default=True,
    help="Type of the matrices in the GGUF files.",
)
@token_options(domain="wikitext2", windows=2, required=False)
@out_option
def main(model: str, small: str, data: str | None, out: str | None, **options: Any) -> None:
    """Measures MODEL and SMALL, which was made from it, in transformers and in llama.cpp."""
    from lordjax.scripts.opened_model import open_model, quiet_transformers

    quiet_transformers()
    results: dict[str, Any] = {"environment": environment(), "settings": options, "rows": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opened = {"dense": open_model(model), "small": open_model(small)}
        for key, each in opened.items():
            results[key] = sizes(each, options["prefill"])
            exported(each, folder / key, options["gguf_type"])
        for program in PROGRAMS:
            pair = [run_with(program, folder / key, options["threads"]) for key in opened]
            ids = min(each.config.vocab_size for each in opened.values())
            results["rows"] += measured(program, pair, ids, results, options)
            write_results(out, results, complete=False)
        if data is not None:
            counts = 1, options["windows"]  # no calibration is read, but one window is loaded
            tokens = protocol_tokens(data, options["domain"], *counts)[1]
            results["perplexity"] = perplexities(opened["small"], folder / "small", tokens)
    click.echo(table(results))
    write_results(out, results)


def sizes(opened: Any, prefill: int) -> dict[str, float]:
    """Returns the bytes that a step of decoding reads, and the operations of a prompt."""
    from lordjax.kernels import trees
    from lordjax.kernels.base import nbytes
    from lordjax.scripts.verbs.benchmark import operations

    params = opened.stored.params()
    read = dict(params) if opened.config.tie_embeddings else {**params, "embed": {}}
    return {
        "bytes": nbytes(trees.flatten(read)),
        "operations": operations(opened.config, params, 1, prefill),
    }


def exported(opened: Any, directory: Path, gguf_type: str) -> None:
    """Writes both exports of a model in float32, with its tokenizer."""
    from lordjax.conversions.exporters.export import export
    from lordjax.scripts.opened_model import tokenizer_writer

    writer = tokenizer_writer(opened)
    export(opened.stored, directory / "dense", "dense", dtype="float32", write_tokenizer=writer)
    given = {"dtype": "float32", "write_tokenizer": writer, "gguf_type": gguf_type}
    export(opened.stored, directory / "gguf", "gguf", **given)


class LlamaCppRunner:
    """A GGUF file that llama.cpp runs; see `verbs.benchmark.Runner`."""

    def __init__(self, path: Path, threads: int):
        from lordjax.conversions.exporters.llama_cpp import LlamaCpp

        self.name, self.model, self.threads = str(path), LlamaCpp(path), threads

    def run(self, prompts: Any, new: int) -> tuple[float, float]:
        """Returns seconds to the first token and of the others; one prompt."""
        import time

        from lordjax.conversions.exporters.llama_cpp import Context

        (prompt,) = prompts
        context = Context(self.model, len(prompt) + new, self.threads)
        start = time.perf_counter()
        token = int(context.decode(prompt)[0].argmax())
        first = time.perf_counter()
        for _ in range(new - 1):
            token = int(context.decode([token])[0].argmax())
        end = time.perf_counter()
        context.close()
        return first - start, end - first


def run_with(program: str, directory: Path, threads: int) -> Any:
    """Opens an export with the program that it is for."""
    from lordjax.conversions.exporters.gguf_file import FILE
    from lordjax.scripts.verbs.benchmark import TransformersRunner

    if program == "llama.cpp":
        return LlamaCppRunner(directory / "gguf" / FILE, threads)
    import torch

    torch.set_num_threads(threads)
    return TransformersRunner(str(directory / "dense"))


def measured(
    program: str, pair: list[Any], ids: int, results: dict[str, Any], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns a row for reading a prompt and one for generating, of the dense and the small model.

    Args:
      program: what runs them.
      pair: the two models in it; see `run_with`.
      ids: token ids are drawn below this number.
      results: `sizes` of both.
      options: the flags.
    """
    from lordjax.scripts.verbs.benchmark import median_row, time_runners

    shapes = [(1, options["prefill"], 1), (1, options["prompt"], options["new"])]
    seconds, compiled = time_runners(pair, shapes, ids, options["repeats"])
    found = [
        median_row(program, shapes, each, warm)
        for each, warm in zip(seconds, compiled, strict=True)
    ]
    speeds = {"prefill": [row["prefill"] for row in found]}
    speeds["decode"] = [row["decode"]["1"] for row in found]
    rows = []
    for what, bound in (("prefill", "operations"), ("decode", "bytes")):
        dense, small = speeds[what]
        possible = results["dense"][bound] / results["small"][bound]
        row = {"program": program, "what": what, "dense": dense, "small": small}
        ratio = small / dense
        rows.append(row | {"ratio": ratio, "possible": possible, "gain": ratio / possible})
    return rows


def perplexities(opened: Any, directory: Path, tokens: Any) -> dict[str, dict[str, float]]:
    """Returns perplexity of both exports in their programs, and its relative difference to ours."""
    from lordjax.conversions.exporters.verify import target_of, verify

    found = {}
    for to in ("dense", "gguf"):
        result = verify(opened.stored, directory / to, to, tokens)
        own = result["perplexity"] - result["perplexity_difference"]
        found[target_of(to)] = {
            "perplexity": result["perplexity"],
            "relative": result["perplexity_difference"] / own,
        }
    return found


def table(results: dict[str, Any]) -> str:
    """Formats the results as markdown."""
    lines = ["| program | | dense | small | ratio | possible | gain |", "|" + "---|" * 7]
    for row in results["rows"]:
        numbers = f"{row['dense']:.1f} | {row['small']:.1f} | {row['ratio']:.2f}"
        share = f"{row['possible']:.2f} | {row['gain']:.0%}"
        lines.append(f"| {row['program']} | {row['what']} | {numbers} | {share} |")
    for target, row in results.get("perplexity", {}).items():
        lines.append(f"\n{target}: perplexity {row['perplexity']:.4f} ({row['relative']:+.1e})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
