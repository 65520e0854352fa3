"""The platform that programs are compiled for: the default backend, or a GPU that is not here.

Some code has one form for CPUs and one for accelerators. It asks `platform`, so that a process that
compiles for a GPU on a machine without one traces what the GPU would run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator

import jax

_compiled_for: tuple[str, int] | None = None


def platform() -> str:
    """Returns ``cpu``, ``gpu`` or ``tpu``: what programs are compiled for."""
    return jax.default_backend() if _compiled_for is None else _compiled_for[0]


def device_count() -> int:
    """Returns the number of devices that programs are compiled for."""
    return jax.device_count() if _compiled_for is None else _compiled_for[1]


def is_absent() -> bool:
    """Returns whether programs are compiled for devices that are not here, and cannot run."""
    return _compiled_for is not None


@functools.cache
def has_triton() -> bool:
    """Returns whether this JAX compiles Pallas kernels with Triton; later versions may not."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


@contextlib.contextmanager
def absent_gpus(count: int = 1) -> Iterator[None]:
    """Inside, `platform` is ``gpu``; traced programs are forgotten before and after.

    Args:
      count: number of GPUs.
    """
    global _compiled_for
    before, _compiled_for = _compiled_for, ("gpu", count)
    jax.clear_caches()
    try:
        yield
    finally:
        _compiled_for = before
        jax.clear_caches()
