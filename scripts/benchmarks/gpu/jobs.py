"""Whole compressions, as lines of the benchmark of a GPU.

A job runs twice on a few blocks. The first run compiles every program. The seconds of each stage of
the second run are multiplied by the number of blocks of the model over those that ran; such rows
are marked. Where no time is left for a second run, the first one counts, and its rows say so.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lordjax.models.config import ModelConfig
from lordjax.scripts.benchmarks.gpu.lines import Line, Row, row
from lordjax.scripts.benchmarks.gpu.sizes import RandomSource, Sizes

BLOCKS = 2  # that are compressed
Job = Callable[[RandomSource, np.ndarray, Any], Any]  # (source, tokens, progress) -> Result


class OutOfTimeError(Exception):
    """A job is not finished, and the time of the benchmark is over."""


def job(name: str, config: ModelConfig, sizes: Sizes, run_job: Job, needs: float) -> Line:
    """Returns the line of a compression.

    Args:
      name: name of the line.
      config: architecture of the model.
      sizes: number and length of the calibration sequences.
      run_job: runs the compression.
      needs: seconds of the line.
    """
    few = dataclasses.replace(config, num_layers=min(BLOCKS, config.num_layers))

    def run(seconds: float) -> list[Row]:
        start, generator = time.monotonic(), np.random.default_rng(0)
        shape = sizes.sequences, min(sizes.length, config.max_positions)
        tokens = generator.integers(0, config.vocab_size, shape, np.int32)

        def progress(stage: str, done: int, total: int) -> None:
            if time.monotonic() - start > seconds:
                raise OutOfTimeError(f"stage {stage}, {done} of {total}, after {seconds:.0f} s")

        first = run_job(RandomSource(few), tokens, progress).report["seconds"]
        try:
            found = run_job(RandomSource(few), tokens, progress).report["seconds"]
        except OutOfTimeError:
            return _rows(first, few.num_layers, config.num_layers, "; compilation included")
        return _rows(found, few.num_layers, config.num_layers)

    return Line(name, needs, run)


def _rows(found: dict[str, float], blocks: int, layers: int, note: str = "") -> list[Row]:
    """Returns the seconds of every stage, and of all of them, of the whole model."""
    note = f"{blocks} of {layers} blocks{'; extrapolated' if blocks < layers else ''}{note}"
    # Seconds of factors are part of those of "statistics and factors".
    parts = ("factors",) if "statistics and factors" in found else ()
    total = sum(seconds for stage, seconds in found.items() if stage not in parts)
    every = {**found, "all stages": total}
    return [row(stage, n * layers / blocks, "s", note) for stage, n in every.items()]


def low_rank(method: str, **settings: Any) -> Job:
    """Returns a low-rank compression, with bfloat16 results."""

    def run(source: RandomSource, tokens: np.ndarray, progress: Any) -> Any:
        from lordjax.compression.low_rank import compress

        given = {"method": method, "dtype": "bfloat16", "progress": progress}
        return compress(source, tokens, **given, **settings)

    return run


def quantized(**settings: Any) -> Job:
    """Returns a quantization: a table of predicted errors, then a decomposition."""

    def run(source: RandomSource, tokens: np.ndarray, progress: Any) -> Any:
        from lordjax.compression.quantized import quantize

        return quantize(source, tokens, dtype="bfloat16", progress=progress, **settings)

    return run


def jobs(sizes: Sizes) -> list[Line]:
    """Returns the compressions that are measured, the most valuable first."""
    some = dataclasses.replace(sizes, sequences=min(sizes.sequences, 32))
    count = f"{sizes.sequences} x {sizes.length} tokens"
    return [
        job("LoRD, StarCoder-16B", sizes.starcoder, some, low_rank("lord", keep=0.7), 80),
        job(f"MoDeGPT, Llama-2-7B, {count}", sizes.llama, sizes, low_rank("modegpt", keep=0.7), 90),
        job("LQ, Llama-2-7B", sizes.llama, some, quantized(method="lq", bits=3.1), 60),
    ]
