"""Benchmarks this machine in a few seconds: a rate for each kind of operation that is counted.

Each kind has one small program. It runs `RUNS` times, or until it has taken `PATIENCE` seconds. The
rate is the mean, not the best, because that is what a job gets on a machine that others use too.
Eigendecompositions are timed at two sizes: small ones are slower per operation.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.kernels import normal_float
from lordjax.methods.quantized import error_feedback
from lordjax.runtime import flops

RUNS, PATIENCE = 3, 0.25  # most runs of a program; most seconds of all its runs
EIGH_SIZES = (160, 448)  # rows of the matrices
SIZE = {"cpu": 1024}  # backend -> rows of the matrices that are multiplied
LARGE = 4096  # the same on other backends
BYTES = 2**24  # bytes that are read and written

Rates = dict[str, float]  # kind of operation -> operations per second


def measure_rates(directory: str | os.PathLike[str] | None = None) -> Rates:
    """Measures the rates of the default device, of the host and of a disk.

    Args:
      directory: a directory on the disk that the result is written to; None: the directory for
        temporary files.

    Returns:
      kind of operation -> operations per second.

    Raises:
      OSError: if ``directory`` is not writable.
    """
    n = SIZE.get(jax.default_backend(), LARGE)
    ones = jnp.ones((n, n), jnp.float32)
    rates = {"compile": _compile_rate()}
    rates["product float32"] = _rate(jnp.matmul, ones, ones)
    rates["thin float32"] = _rate(jnp.matmul, ones[:, :64], ones[:64])
    if jax.default_backend() == "cpu":  # has one precision only
        rates["product float32 highest"] = rates["product float32"]
        rates["thin float32 highest"] = rates["thin float32"]
    else:
        rates["product float32 highest"] = _rate(_highest, ones, ones)
        rates["thin float32 highest"] = _rate(_highest, ones[:, :64], ones[:64])
    rates["exp"] = _softmax_rate()
    rates |= _quantization_rates()
    with jax.enable_x64(True):
        wide = jnp.ones((min(n, 1024), min(n, 1024)), jnp.float64)
        rates["product float64"] = _rate(jnp.matmul, wide, wide)
        rates["thin float64"] = _rate(jnp.matmul, wide[:, :64], wide[:64])
        definite = jnp.ones((640, 640), jnp.float64) + 640 * jnp.eye(640, dtype=jnp.float64)
        rates["cholesky float64"] = _rate(jnp.linalg.cholesky, definite)
        for size in EIGH_SIZES:
            some = jax.random.normal(jax.random.key(0), (size, size), jnp.float64)
            rates[f"eigh float64 {size}"] = _rate(jnp.linalg.eigh, some + some.T)
    return rates | {"read": _read_rate(), "put": _put_rate(), "write": _write_rate(directory)}


def matmul_rate(size: int = 1024) -> float:
    """Measures FLOPs per second of a float32 matrix product at HIGHEST precision: the best run.

    Args:
      size: rows and columns of both matrices.
    """
    ones = jnp.ones((size, size), jnp.float32)
    return 2.0 * size**3 / min(_time_runs(jax.jit(_highest), ones, ones))


def rate(rates: Rates, kind: str) -> float:
    """Returns the rate of a kind of operation, or of the most similar kind that was measured.

    Args:
      rates: measured rates.
      kind: name of an operation in `OpCounts`. ``eigh`` and ``svd`` end with their size.

    Returns:
      operations per second.

    Raises:
      KeyError: if no similar kind was measured.
    """
    name = {"svd": "eigh"}.get(kind.split()[0], kind.split()[0])
    if name == "eigh":
        size = re.search(r" (\d+)$", kind)
        return _eigh_rate(rates, EIGH_SIZES[1] if size is None else int(size[1]))
    if name == "cholesky":
        return rates["cholesky float64"]
    if kind in rates:
        return rates[kind]
    if name in ("product", "thin"):  # a dtype that was not measured
        return rates[f"{name} float32"]
    raise KeyError(f"no measured rate for {kind!r}; expected one of {', '.join(sorted(rates))}")


def _eigh_rate(rates: Rates, size: int) -> float:
    """The rate of an eigendecomposition, interpolated between both sizes on a log-log scale."""
    (a, b), (rate_a, rate_b) = EIGH_SIZES, (rates[f"eigh float64 {n}"] for n in EIGH_SIZES)
    position = min(max(math.log(size / a) / math.log(b / a), 0.0), 2.0)
    return min(rate_a * (rate_b / rate_a) ** position, rates["product float64"])


def _highest(a: Any, b: Any) -> Any:
    return jnp.matmul(a, b, precision="highest")


def _time_runs(fn: Callable[..., Any], *args: Any) -> list[float]:
    """Seconds of each run of a function, after one run that is not timed."""
    jax.block_until_ready(fn(*args))
    found: list[float] = []
    while not found or (len(found) < RUNS and sum(found) < PATIENCE):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        found.append(time.perf_counter() - start)
    return found


def _rate(fn: Callable[..., Any], *args: Any, kind: str | None = None) -> float:
    """Operations per second of a function: all its FLOPs, or one kind of operation."""
    times, ops = _time_runs(jax.jit(fn), *args), flops.count_ops(fn, *args)
    count = flops.total(ops) if kind is None else ops[kind]
    return count * len(times) / sum(times)


def _softmax_rate() -> float:
    """Elements per second of the masked softmax of attention."""

    def weights(logits: Any) -> Any:
        masked = jnp.where(logits > -1, logits, -jnp.inf)
        found = jnp.exp(masked - jnp.max(masked, axis=-1, keepdims=True))
        return found, jnp.sum(found, axis=-1, keepdims=True)

    logits = jnp.ones((8, 256, 512), jnp.float32)
    times = _time_runs(jax.jit(weights), logits)
    return logits.size * len(times) / sum(times)


def _quantization_rates() -> Rates:
    """Rates of quantization: with few levels, with many levels, and row by row (GPTQ)."""
    numbers = jnp.cos(jnp.arange(2.0**18))
    moment = jnp.eye(512) + 0.1

    def round_trip(form: normal_float.Format) -> Callable[[Any], Any]:
        return lambda x: normal_float.dequantize(normal_float.quantize(x, form), form)

    def row_by_row(rows: Any) -> Any:
        return error_feedback.quantize(
            rows, normal_float.Format.parse("nf2"), error_feedback.make_feedback(moment)
        ).codes

    return {
        "select": _rate(round_trip(normal_float.Format.parse("nf4")), numbers, kind="select"),
        "gather": _rate(round_trip(normal_float.Format.parse("nf8")), numbers, kind="gather"),
        "steps": _rate(row_by_row, numbers[: 16 * 512].reshape(16, 512), kind="steps"),
    }


def _compile_rate() -> float:
    """Jaxpr equations per second of tracing and compiling a program."""

    def layers(x: Any) -> Any:
        for _ in range(4):
            x = jax.nn.silu(x @ x) * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1)
            x = x + jax.nn.softmax(x @ x.T) @ x
        return x

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    start = time.perf_counter()
    jax.jit(layers).lower(x).compile()
    seconds = time.perf_counter() - start
    return flops.count_ops(layers, x)["equations"] / seconds


def _read_rate() -> float:
    """Bytes per second of weights that are copied and checked to be finite."""
    stored = np.ones(BYTES // 4, np.float32)

    def load(a: np.ndarray) -> np.ndarray:
        return np.isfinite(a.copy())

    times = _time_runs(load, stored)
    return stored.nbytes * len(times) / sum(times)


def _put_rate() -> float:
    """Bytes per second of weights that are transposed and put on the device."""
    stored = np.ones((BYTES // 4096, 1024), np.float32)
    times = _time_runs(lambda a: jnp.asarray(a.T), stored)
    return stored.nbytes * len(times) / sum(times)


def _write_rate(directory: str | os.PathLike[str] | None) -> float:
    """Bytes per second that are written to the disk."""
    data = np.random.default_rng(0).bytes(BYTES)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        file = Path(folder) / "file"

        def write() -> None:
            with file.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())

        times = _time_runs(write)
    return len(data) * len(times) / sum(times)
