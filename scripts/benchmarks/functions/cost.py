"""Benchmark of compressing a function: what `collect` and `compressed` cost beside the original.

Run::

    python -m lordjax.scripts.benchmarks.functions.cost

The function is a plain transformer, with layers that are unrolled or scanned. Each ratio is that of
medians of one process, in which both programs take turns.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import jax
import jax.numpy as jnp

from lordjax.functions.collecting import Collection
from lordjax.functions.equations.tracing import open_call
from lordjax.functions.finding import find_sites
from lordjax.functions.running import compressed
from lordjax.functions.site_statistics import needs_of
from lordjax.kernels.base import nbytes
from lordjax.kernels.low_rank import LowRank, break_even
from lordjax.runtime import flops

VOCAB, HEAD = 4096, 64


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--width", default=576, show_default=True, help="Width of the model.")
@click.option("--hidden", default=1536, show_default=True, help="Width of its MLPs.")
@click.option("--layers", default=30, show_default=True, help="Number of blocks.")
@click.option("--timed-layers", default=4, show_default=True, help="Blocks of what is timed.")
@click.option("--batch", default=2, show_default=True, help="Sequences of a batch.")
@click.option("--length", default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--keep", default=0.7, show_default=True, help="Fraction of the weights to keep.")
@click.option("--repeats", default=5, show_default=True, help="Timed runs of every program.")
def main(
    width: int,
    hidden: int,
    layers: int,
    timed_layers: int,
    batch: int,
    length: int,
    keep: float,
    repeats: int,
) -> None:
    """Times collect, compressed functions, tracing and compiling; prints JSON."""
    from lordjax.scripts.benchmarks.protocol import environment

    params = make_params(width, hidden, timed_layers)
    ids = jax.random.randint(jax.random.key(0), (batch, length), 0, VOCAB)
    found: dict[str, Any] = {"environment": environment()}
    found["collect"] = collect_ratios(params, ids, repeats)
    found["compressed"] = {
        "prefill": compressed_ratios(params, ids, keep, repeats),
        "decoding": compressed_ratios(params, ids[:1, :1], keep, 10 * repeats),
    }
    shapes = jax.eval_shape(lambda: make_params(width, hidden, layers))
    found["seconds"] = compile_seconds(shapes, jax.ShapeDtypeStruct(ids.shape, ids.dtype))
    click.echo(json.dumps(found, indent=1))


def make_params(width: int, hidden: int, layers: int) -> dict[str, Any]:
    """Returns random parameters; every leaf of a block is stacked over the blocks."""
    sizes = dict.fromkeys(("q", "k", "v", "o"), (width, width))
    sizes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    keys = jax.random.split(jax.random.key(1), len(sizes) + 2)
    blocks = {
        name: size[0] ** -0.5 * jax.random.normal(key, (layers, *size))
        for key, (name, size) in zip(keys, sizes.items(), strict=False)
    }
    embed = jax.random.normal(keys[-1], (VOCAB, width))
    return {"embed": embed, "blocks": blocks, "head": width**-0.5 * embed.T}


def block(p: Any, x: Any) -> Any:
    """Returns the outputs of one block."""

    def norm(x: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    h = norm(x)
    q, k, v = ((h @ p[name]).reshape(*h.shape[:2], -1, HEAD) for name in ("q", "k", "v"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ p["o"]
    h = norm(x)
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def scanned(params: Any, ids: Any) -> Any:
    """The model with its blocks in a scan."""
    x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), params["embed"][ids], params["blocks"])
    return x @ params["head"]


def unrolled(params: Any, ids: Any) -> Any:
    """The model with its blocks one after the other, as a list of trees."""
    x = params["embed"][ids]
    for p in params["blocks"]:
        x = block(p, x)
    return x @ params["head"]


def as_list(params: Any) -> dict[str, Any]:
    """Returns parameters with a list of blocks in place of stacked leaves."""
    layers = len(params["blocks"]["q"])
    blocks = [jax.tree.map(lambda a, i=i: a[i], params["blocks"]) for i in range(layers)]
    return params | {"blocks": blocks}


def loss(logits: Any, ids: Any) -> Any:
    """Returns the loss of every next token."""
    logs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logs, ids[:, 1:, None], axis=-1)[..., 0]


def medians(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Returns the median seconds of programs that take turns."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for run in programs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def collect_ratios(params: Any, ids: Any, repeats: int) -> dict[str, Any]:
    """Returns what a pass of `collect` takes, relative to the plain function.

    Args:
      params: parameters of `scanned`.
      ids: a batch.
      repeats: timed runs.
    """
    call = open_call(params, (ids,), {}, kernels=False)
    runs = {
        "activations": Collection(scanned, params, (ids,), needs_of(None, loss=False)),
        "activations and gradients": Collection(
            scanned, params, (ids,), needs_of(["lord"], loss=True), loss=loss
        ),
    }
    total = lambda p, ids: loss(scanned(p, ids), ids).sum()  # noqa: E731
    plain = {"forward": jax.jit(scanned), "forward and backward": jax.jit(jax.grad(total))}

    def collected(run: Collection) -> Any:
        run.add((ids,))
        return run.folds

    programs: dict[str, Callable[[], Any]] = {
        name: functools.partial(collected, run) for name, run in runs.items()
    }
    programs |= {name: functools.partial(fn, params, ids) for name, fn in plain.items()}
    seconds = medians(programs, repeats)
    counts = {name: flops.total(flops.count_ops(fn, params, ids)) for name, fn in plain.items()}
    for name, run in runs.items():
        given = run.folds[0], run.leaves, call.inputs, run.bases
        counts[name] = flops.total(flops.count_ops(run.program(call), *given))
    return {
        name: {
            "of": base,
            "seconds": seconds[name] / seconds[base],
            "operations": counts[name] / counts[base],
        }
        for name, base in zip(runs, plain, strict=True)
    }


def shrunk(params: Any, keep: float) -> dict[str, Any]:
    """Returns parameters whose blocks have pairs of factors at a fraction of the weights."""

    def pair(a: Any) -> LowRank:
        rank = int(keep * break_even(*a.shape[-2:]))
        left = jnp.ones((*a.shape[:-1], rank), a.dtype)
        return LowRank(left, jnp.ones((*a.shape[:-2], rank, a.shape[-1]), a.dtype))

    return params | {"blocks": jax.tree.map(pair, params["blocks"])}


def compressed_ratios(params: Any, ids: Any, keep: float, repeats: int) -> dict[str, float]:
    """Returns what a compressed function takes, relative to the dense one.

    Args:
      params: parameters of `scanned`.
      ids: a batch.
      keep: fraction of the weights of the blocks.
      repeats: timed runs.
    """
    small, run = shrunk(params, keep), jax.jit(compressed(scanned))
    dense = jax.jit(scanned)
    both = {"dense": lambda: dense(params, ids), "small": lambda: run(small, ids)}
    seconds = medians(both, repeats)
    counts = [
        flops.total(flops.count_ops(fn, tree, ids)) for fn, tree in ((run, small), (dense, params))
    ]
    read = [nbytes(tree["blocks"]) + nbytes(tree["head"]) for tree in (small, params)]
    return {
        "seconds": seconds["small"] / seconds["dense"],
        "operations": counts[0] / counts[1],
        "bytes": read[0] / read[1],
    }


def compile_seconds(shapes: Any, ids: Any) -> dict[str, dict[str, float]]:
    """Returns seconds to trace and to compile dense and compressed functions, from shapes.

    Args:
      shapes: shapes of the parameters of `scanned`.
      ids: shape of a batch.
    """
    found = {}
    for name, fn, tree in (
        ("scanned", scanned, shapes),
        ("unrolled", unrolled, jax.eval_shape(as_list, shapes)),
    ):
        small = jax.eval_shape(lambda tree: shrunk(tree, 0.7), tree)
        start = time.perf_counter()
        find_sites(fn, tree, ids)
        found[f"{name}: find_sites"] = {"seconds": time.perf_counter() - start}
        for what, run, own in (("dense", fn, tree), ("compressed", compressed(fn), small)):
            start = time.perf_counter()
            lowered = jax.jit(run).lower(own, ids)
            middle = time.perf_counter()
            lowered.compile()
            seconds = {"trace": middle - start, "compile": time.perf_counter() - middle}
            found[f"{name}: {what}"] = seconds
    return found


if __name__ == "__main__":
    main()
