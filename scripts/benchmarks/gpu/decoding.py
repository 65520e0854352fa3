"""Decoding of a whole model, and a fine-tuning step, as lines of the benchmark of a GPU."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.allocation.candidates import Candidate
from lordjax.data.examples import Examples
from lordjax.finetune import step
from lordjax.finetune.recipes import named
from lordjax.forecast.compiled.whole_models import begun_shapes
from lordjax.forecast.shapes import dense_shapes, outline, plan_by_shapes, quantized_outline, stored
from lordjax.generation import decode
from lordjax.generation.sampling import GREEDY
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import nbytes
from lordjax.models.config import ModelConfig
from lordjax.models.sites import LINEAR_SITES, site_path
from lordjax.scripts.benchmarks.gpu import kernels
from lordjax.scripts.benchmarks.gpu.lines import Line, Row, row
from lordjax.scripts.benchmarks.gpu.sizes import Sizes, random_arrays

CHUNKS = 5  # timed chunks of tokens
POSITION = 1024  # tokens that the cache holds before


def variants(sizes: Sizes) -> dict[str, Any]:
    """Returns what is decoded: name -> shapes of the parameters, in bfloat16."""
    config = sizes.llama
    source = stored(config, trees.flatten(dense_shapes(config).params), jnp.bfloat16)
    plan = plan_by_shapes(config, "lord", 0.7, "uniform")

    def quantized(rank: int | None) -> Any:
        candidate = Candidate(normal_float.Format.parse("nf4"), rank)
        candidates = {
            site_path(i, site): candidate for i in range(config.num_layers) for site in LINEAR_SITES
        }
        return quantized_outline(config, candidates, source, "bfloat16", None)

    return {
        "dense": source.params,
        "keep 0.7": outline(config, plan, source),
        "NF4": quantized(None),
        f"NF4 + rank {sizes.rank}": quantized(sizes.rank),
    }


def decoding(sizes: Sizes, name: str, batch: int) -> Line:
    """Returns the line that decodes with one of the `variants`.

    Args:
      sizes: the shapes.
      name: which variant.
      batch: rows that are decoded together.
    """

    def run(seconds: float) -> list[Row]:
        speed = kernels.bandwidth(sizes.copied)
        shapes = variants(sizes)[name]
        params, config = random_arrays(shapes, 0), sizes.llama
        took, cache = decoding_seconds(config, params, batch, min(POSITION, sizes.length // 2))
        # Of the embeddings a token reads one row.
        read = nbytes({k: v for k, v in params.items() if k != "embed"}) + cache
        note = f"{read / took / speed:.0%} of the bandwidth, {read / 1e9:.2f} GB per step"
        return [row("tokens per second", batch / took, "1/s", note)]

    return Line(f"decoding, {name}, batch {batch}", 60, run)


def decoding_seconds(
    config: ModelConfig, params: Any, batch: int, position: int
) -> tuple[float, int]:
    """Returns the median seconds of a decoding step, and the bytes of the cache that it reads.

    Args:
      config: the architecture.
      params: parameters of the model.
      batch: rows that are decoded together.
      position: tokens that the cache holds; twice as many fit.
    """
    state, settings = begun(config, params, batch, position)
    steps, same = jnp.asarray(decode.CHUNK, jnp.int32), {"config": config, "kind": GREEDY.kind}
    found = []
    for _ in range(1 + CHUNKS):  # the first one compiles
        start = time.perf_counter()
        state, out = decode.decode(params, state, settings, steps, **same)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - start) / decode.CHUNK)
    return statistics.median(found[1:]), nbytes(state.cache) // 2


def begun(
    config: ModelConfig, params: Any, batch: int, position: int
) -> tuple[decode.State, decode.RunSettings]:
    """Returns a state of decoding with a cache of zeros, without reading a prompt.

    Args:
      config: the architecture.
      params: parameters of the model.
      batch: number of rows.
      position: tokens that the cache holds; twice as many fit.
    """
    shapes, _ = begun_shapes(config, params, batch, 2 * position)
    keys, limit = jax.random.split(jax.random.key(0), batch), jnp.asarray(config.max_positions)
    settings = decode.RunSettings(GREEDY.values, jnp.full(4, decode.NOTHING), keys, limit)
    state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return state._replace(position=jnp.full(batch, position, jnp.int32)), settings


def fine_tuning(sizes: Sizes) -> Line:
    """Returns the line of a QLoRA step: adapters on an NF4 base, in bfloat16, batch 1."""

    def run(seconds: float) -> list[Row]:
        config = dataclasses.replace(sizes.llama, num_layers=sizes.blocks)
        shapes = variants(dataclasses.replace(sizes, llama=config))[f"NF4 + rank {sizes.rank}"]
        settings = step.Settings(2 + CHUNKS, 1, 1, dtype="bfloat16")
        setup = step.prepare_training(config, random_arrays(shapes, 0), named("lq-lora"), settings)
        tokens = np.zeros((1, 1, sizes.length), np.int32)
        update, found = step.make_step(config, setup.optimizer, dtype="bfloat16"), []
        state = setup.state
        for _ in range(1 + CHUNKS):
            start = time.perf_counter()
            state, metrics = update(state, setup.frozen, Examples(tokens, tokens))
            jax.block_until_ready(metrics["loss"])
            found.append(time.perf_counter() - start)
        whole, took = sizes.llama.num_layers, statistics.median(found[1:])
        note = f"{sizes.length} tokens, {sizes.blocks} of {whole} blocks"
        if sizes.blocks == whole:
            return [row("a step", took, "s", note)]
        extrapolated = row("a step", took * whole / sizes.blocks, "s", f"{note}; extrapolated")
        return [extrapolated]

    return Line("QLoRA step, Llama-2-7B", 60, run)
