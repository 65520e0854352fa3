"""How fast this machine is, now, at each kind of work that `flops` counts: a few seconds.

Every kind is one small program, run until it has taken `PATIENCE` seconds or `RUNS` times, and its
mean is taken: what a job gets on a machine that others use as well. Eigendecompositions are
measured at two sizes, since small ones are slower per operation.
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

RUNS, PATIENCE = 3, 0.25  # of a program; seconds
EIGH = (160, 448)  # sizes
SIZE = {"cpu": 1024}  # of products by backend
LARGE = 4096  # elsewhere
BYTES = 2**24  # that are read and written

Rates = dict[str, float]  # kind of work -> operations per second


def measure_rates(directory: str | os.PathLike[str] | None = None) -> Rates:
    """Rates of the default device; ``directory``: of the disk that is written to.

    Raises:
      OSError: if nothing can be written there.
    """
    n = SIZE.get(jax.default_backend(), LARGE)
    ones = jnp.ones((n, n), jnp.float32)
    rates = {"compile": _compiling()}
    rates["product float32"] = _rate(jnp.matmul, ones, ones)
    rates["thin float32"] = _rate(jnp.matmul, ones[:, :64], ones[:64])
    if jax.default_backend() == "cpu":  # knows one precision only
        rates["product float32 highest"] = rates["product float32"]
        rates["thin float32 highest"] = rates["thin float32"]
    else:
        rates["product float32 highest"] = _rate(_highest, ones, ones)
        rates["thin float32 highest"] = _rate(_highest, ones[:, :64], ones[:64])
    rates["exp"] = _softmax_rate()
    rates |= _code_rates()
    with jax.enable_x64(True):
        wide = jnp.ones((min(n, 1024), min(n, 1024)), jnp.float64)
        rates["product float64"] = _rate(jnp.matmul, wide, wide)
        rates["thin float64"] = _rate(jnp.matmul, wide[:, :64], wide[:64])
        definite = jnp.ones((640, 640), jnp.float64) + 640 * jnp.eye(640, dtype=jnp.float64)
        rates["cholesky float64"] = _rate(jnp.linalg.cholesky, definite)
        for size in EIGH:
            some = jax.random.normal(jax.random.key(0), (size, size), jnp.float64)
            rates[f"eigh float64 {size}"] = _rate(jnp.linalg.eigh, some + some.T)
    others = {"read": _reading(), "put": _putting(), "write": _writing(directory)}
    return rates | others


def matmul_rate(size: int = 1024) -> float:
    """Operations per second of a float32 product at HIGHEST precision: the best of some."""
    ones = jnp.ones((size, size), jnp.float32)
    return 2.0 * size**3 / min(_times(jax.jit(_highest), ones, ones))


def rate(rates: Rates, kind: str) -> float:
    """Of a kind of work, by the nearest that was measured; that of eigh by its size.

    Raises:
      KeyError: if nothing like it was measured.
    """
    name = {"svd": "eigh"}.get(kind.split()[0], kind.split()[0])
    if name == "eigh":
        size = re.search(r" (\d+)$", kind)
        return _between(rates, EIGH[1] if size is None else int(size[1]))
    if name == "cholesky":
        return rates["cholesky float64"]
    if kind in rates:
        return rates[kind]
    if name in ("product", "thin"):  # of a dtype that was not measured
        return rates[f"{name} float32"]
    raise KeyError(f"no rate of {kind!r}; measured were {', '.join(sorted(rates))}")


def _between(rates: Rates, size: int) -> float:
    """The rate of an eigendecomposition, on the line between the two sizes in logarithms."""
    (a, b), (fa, fb) = EIGH, (rates[f"eigh float64 {n}"] for n in EIGH)
    share = min(max(math.log(size / a) / math.log(b / a), 0.0), 2.0)
    return min(fa * (fb / fa) ** share, rates["product float64"])


def _highest(a: Any, b: Any) -> Any:
    return jnp.matmul(a, b, precision="highest")


def _times(fn: Callable[..., Any], *args: Any) -> list[float]:
    """Seconds of each of some runs, compiled before."""
    jax.block_until_ready(fn(*args))
    found: list[float] = []
    while not found or (len(found) < RUNS and sum(found) < PATIENCE):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        found.append(time.perf_counter() - start)
    return found


def _rate(fn: Callable[..., Any], *args: Any, kind: str | None = None) -> float:
    """Of a program's operations, or of the one kind of its work that it is made for."""
    times, ops = _times(jax.jit(fn), *args), flops.count_ops(fn, *args)
    count = flops.total(ops) if kind is None else ops[kind]
    return count * len(times) / sum(times)


def _softmax_rate() -> float:
    """Numbers per second of a masked softmax, as attention takes it."""

    def weights(logits: Any) -> Any:
        masked = jnp.where(logits > -1, logits, -jnp.inf)
        found = jnp.exp(masked - jnp.max(masked, axis=-1, keepdims=True))
        return found, jnp.sum(found, axis=-1, keepdims=True)

    logits = jnp.ones((8, 256, 512), jnp.float32)
    times = _times(jax.jit(weights), logits)
    return logits.size * len(times) / sum(times)


def _code_rates() -> Rates:
    """Of finding codes and looking them up: few levels, many, and one row after the other."""
    numbers = jnp.cos(jnp.arange(2.0**18))
    moment = jnp.eye(512) + 0.1

    def coded(form: normal_float.Format) -> Callable[[Any], Any]:
        return lambda x: normal_float.dequantize(normal_float.quantize(x, form), form)

    def in_turn(rows: Any) -> Any:
        return error_feedback.quantize(
            rows, normal_float.Format.parse("nf2"), error_feedback.make_feedback(moment)
        ).codes

    return {
        "select": _rate(coded(normal_float.Format.parse("nf4")), numbers, kind="select"),
        "gather": _rate(coded(normal_float.Format.parse("nf8")), numbers, kind="gather"),
        "steps": _rate(in_turn, numbers[: 16 * 512].reshape(16, 512), kind="steps"),
    }


def _compiling() -> float:
    """Equations per second of tracing and compiling a program of some."""

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


def _reading() -> float:
    """Bytes per second of weights that are copied and checked."""
    stored = np.ones(BYTES // 4, np.float32)

    def load(a: np.ndarray) -> np.ndarray:
        return np.isfinite(a.copy())

    times = _times(load, stored)
    return stored.nbytes * len(times) / sum(times)


def _putting() -> float:
    """Bytes per second of weights that are turned and put on the device."""
    stored = np.ones((BYTES // 4096, 1024), np.float32)
    times = _times(lambda a: jnp.asarray(a.T), stored)
    return stored.nbytes * len(times) / sum(times)


def _writing(directory: str | os.PathLike[str] | None) -> float:
    """Bytes per second onto the disk."""
    data = np.random.default_rng(0).bytes(BYTES)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        file = Path(folder) / "file"

        def write() -> None:
            with file.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())

        times = _times(write)
    return len(data) * len(times) / sum(times)
