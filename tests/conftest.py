"""JAX as strict as it gets, on several CPU devices, before any test imports it."""

import os
from pathlib import Path

from flags import faster

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
        *faster(),
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Also in commands that run in processes of their own; what is measured runs elsewhere.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
# What commands compile in processes of their own is not left behind.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# Small matrices in as many processes as cores: threads of BLAS and torch would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def forget_programs():
    """Every compiled program holds memory mappings, and Linux allows a process 65530 of them."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def forget_programs_of_other_files():
    """What one file compiles no other uses; clearing keeps memory low."""
    yield
    jax.clear_caches()
