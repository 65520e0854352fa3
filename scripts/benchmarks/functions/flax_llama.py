"""Benchmark of compressing a model of another library: FlaxLlama of transformers, real weights.

Run, in an environment with the extra ``interop``::

    python -m lordjax.scripts.benchmarks.functions.flax_llama MODEL --data DIR

``MODEL`` is a Llama that lordjax opens, such as SmolLM2's GGUF file. Its weights are put into
transformers' Flax model, which is compressed as any function is: `lordjax.collect`,
`lordjax.compress_params`, `lordjax.compressed`. Beside it, lordjax's own model gets the same
budgets and the same tokens. ``DIR`` holds ``calib_<domain>.npy`` and ``eval_<domain>.npy``, token
ids ``[sequences, length]``.

A case is ``METHOD@BUDGET``: ``lord@0.8`` keeps 80 % of the block weights, ``auto@3.6bits`` takes
3.6 bits per block weight. The table has both perplexities and their ratio.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from lordjax.scripts.benchmarks.protocol import (
    environment,
    out_option,
    protocol_tokens,
    token_options,
)

CASES = "lord@0.8,modegpt@0.8,auto@3.6bits"
BLOCKS = "layers/"  # in the paths of the blocks' parameters


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@token_options(domain="wikitext2", calibration=64, windows=8)
@click.option(
    "--cases",
    default=CASES,
    show_default=True,
    help="Cases METHOD@BUDGET, separated by commas. BUDGET is a fraction of the block weights, or "
    "a number of bits per block weight, such as 3.6bits.",
)
@click.option("--no-own", is_flag=True, help="Leave lordjax's own model out.")
@out_option
def main(
    model: str,
    data: str,
    domain: str,
    cases: str,
    calibration_windows: int,
    windows: int,
    no_own: bool,
    out: str | None,
) -> None:
    """Compresses MODEL as transformers' FlaxLlama and as lordjax's own model."""
    from lordjax.scripts.opened_model import open_model

    opened = open_model(model)
    tokens, held_out = protocol_tokens(data, domain, calibration_windows, windows)
    rows: list[dict[str, Any]] = []
    with rotary_base(opened.hf_config["rope_theta"]):
        foreign = Foreign(opened, tokens, held_out)
        rows.append(foreign.dense())
        for case in cases.split(","):
            rows.append({"case": case, **foreign.measure(case)})
            if not no_own:
                rows[-1] |= measure_own(opened, tokens, held_out, case)
            click.echo(json.dumps(rows[-1]))
            if out is not None:
                found = [{**row, "environment": environment()} for row in rows]
                Path(out).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    click.echo(markdown(rows))


@contextlib.contextmanager
def rotary_base(theta: float) -> Iterator[None]:
    """Gives transformers' FlaxLlama the model's own rotary base; it has 10000 for every model."""
    import jax.numpy as jnp
    import numpy as np
    from transformers.models.llama import modeling_flax_llama as module

    def table(positions: int, dim: int) -> Any:
        frequencies = 1.0 / theta ** (np.arange(0, dim, 2) / dim)
        angles = np.outer(np.arange(positions), np.concatenate([frequencies] * 2))
        both = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
        return jnp.asarray(both[:, None], jnp.float32)

    own = module.create_sinusoidal_positions
    module.create_sinusoidal_positions = table
    try:
        yield
    finally:
        module.create_sinusoidal_positions = own


def flax_llama(opened: Any, length: int) -> tuple[Any, dict[str, Any]]:
    """Returns transformers' Flax model, and its parameters with the weights of an opened model.

    Args:
      opened: a Llama, as `lordjax.scripts.opened_model.open_model` returns it.
      length: number of positions.
    """
    import transformers

    from lordjax.conversions.families.registry import tensor_table
    from lordjax.kernels import trees

    config = transformers.LlamaConfig(**{**opened.hf_config, "max_position_embeddings": length})
    model = transformers.FlaxLlamaForCausalLM(config, _do_init=False)
    flat = trees.flatten(opened.arrays())
    table = tensor_table(opened.hf_config)
    params = {flax_path(source.name): flat[path] for path, source in table.items()}
    # The Flax model has no tied embeddings: its head is a matrix of its own.
    params.setdefault("lm_head/kernel", params["model/embed_tokens/embedding"].T)
    return model, trees.unflatten(params)


def flax_path(name: str) -> str:
    """Returns the path in the Flax model of a tensor of the PyTorch model."""
    *module, kind = name.split(".")
    last = "embedding" if "embed_tokens" in module else kind if "norm" in module[-1] else "kernel"
    return "/".join([*module, last])


class Foreign:
    """FlaxLlama with its statistics, which all cases share.

    Args:
      opened: the model.
      tokens: calibration tokens ``[sequences, length]``.
      held_out: evaluation tokens ``[sequences, length]``.
    """

    def __init__(self, opened: Any, tokens: Any, held_out: Any) -> None:
        import jax

        self.model, self.params = flax_llama(opened, tokens.shape[1])
        self.held_out = held_out
        self.seconds = time.perf_counter()
        with jax.default_matmul_precision("highest"):
            self.stats = collect(self.apply, self.params, tokens)
        self.seconds = time.perf_counter() - self.seconds

    def apply(self, params: Any, ids: Any) -> Any:
        """Returns the logits ``[batch, length, words]``."""
        return self.model(ids, params=params).logits

    def dense(self) -> dict[str, Any]:
        """Measures the model as it is."""
        return {"case": "dense", "perplexity": perplexity(self.apply, self.params, self.held_out)}

    def measure(self, case: str) -> dict[str, Any]:
        """Compresses the model for a case and measures it."""
        import jax

        import lordjax

        method, budget = split(case)
        start = time.perf_counter()
        small, plan = lordjax.compress_params(
            self.params, self.stats, method=method, where=BLOCKS, **budget
        )
        seconds = time.perf_counter() - start
        jax.clear_caches()  # compiled models of all cases would fill the memory
        return {
            "perplexity": perplexity(lordjax.compressed(self.apply), small, self.held_out),
            "bytes": lordjax.nbytes(small),
            "collect_seconds": self.seconds,
            "compress_seconds": seconds,
            "plan": dataclasses.asdict(plan),
        }


def collect(apply: Any, params: Any, tokens: Any) -> Any:
    """Returns the statistics of all blocks, one sequence per step."""
    import lordjax

    batches = [tokens[i : i + 1] for i in range(len(tokens))]
    return lordjax.collect(apply, params, batches, loss=losses, where=BLOCKS)


def losses(logits: Any, ids: Any) -> Any:
    """Returns the negative log-likelihood of every next token, ``[batch, length - 1]``."""
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])


def split(case: str) -> tuple[str, dict[str, float]]:
    """Returns the method and the budget of a case."""
    method, budget = case.split("@")
    if budget.endswith("bits"):
        return method, {"bits": float(budget.removesuffix("bits"))}
    return method, {"keep": float(budget)}


def perplexity(apply: Any, params: Any, windows: Any) -> float:
    """Returns the perplexity on windows of tokens, each read alone from its first token."""
    import jax
    import numpy as np

    total = jax.jit(lambda params, ids: losses(apply(params, ids), ids).sum())
    with jax.default_matmul_precision("highest"):
        sums = [float(total(params, windows[i : i + 1])) for i in range(len(windows))]
    return float(np.exp(sum(sums) / windows[:, 1:].size))


def measure_own(opened: Any, tokens: Any, held_out: Any, case: str) -> dict[str, Any]:
    """Compresses lordjax's own model for a case and measures it."""
    import jax

    import lordjax

    method, budget = split(case)
    jax.clear_caches()
    start = time.perf_counter()
    run = lordjax.quantize if "bits" in budget else lordjax.compress
    result = run(opened.source, tokens, method=method, **budget)
    seconds = time.perf_counter() - start
    jax.clear_caches()
    measured = lordjax.perplexity(result.config, result.params, held_out)["perplexity"]
    return {
        "own_perplexity": measured,
        "own_bytes": lordjax.nbytes(result.params),
        "own_seconds": seconds,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Formats the results as a Markdown table: a line per case."""
    head = ["case", "FlaxLlama", "own model", "ratio", "collect s", "compress s", "own s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        own = row.get("own_perplexity")
        cells = [
            f"`{row['case']}`",
            f"{row['perplexity']:.3f}",
            "-" if own is None else f"{own:.3f}",
            "-" if own is None else f"{row['perplexity'] / own:.4f}",
            *(
                f"{row[name]:.0f}" if name in row else "-"
                for name in ("collect_seconds", "compress_seconds", "own_seconds")
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
