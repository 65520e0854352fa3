"""Compiles programs for a GPU on a machine without one.

JAX's CUDA plugin compiles for a GPU that is only described (`cards`). It needs no driver and none
of the CUDA libraries, but ``ptxas``. XLA reads its flags once per process, and a program that is
traced for a GPU is no program for the CPU, so this is done in a process of its own (`run_apart`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from lordjax.runtime.cards import Card
from lordjax.runtime.json_files import dumps
from lordjax.runtime.mesh import DATA_AXIS

PLUGIN, COMPILER = "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"


def require_plugin() -> Path:
    """Returns the directory of the CUDA compiler.

    Raises:
      ImportError: if the plugin or the compiler is missing, or the plugin's version is not that of
        jaxlib; says what to install.
    """
    jaxlib = importlib.metadata.version("jaxlib")
    install = f"pip install {PLUGIN}=={jaxlib} {COMPILER}"
    where = "in an environment of its own, since JAX then looks for a GPU in every program"
    try:
        version = importlib.metadata.version(PLUGIN)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"compiling for a GPU needs JAX's CUDA plugin, which is not installed: {install} "
            f"({where})"
        ) from None
    if version != jaxlib:
        raise ImportError(
            f"{PLUGIN} is version {version}; expected {jaxlib}, as jaxlib: {install} ({where})"
        )
    spec = importlib.util.find_spec("nvidia")
    for parent in (spec.submodule_search_locations or ()) if spec else ():
        directory = Path(parent) / "cuda_nvcc"
        if (directory / "bin" / "ptxas").exists() or (directory / "bin" / "ptxas.exe").exists():
            return directory
    raise ImportError(
        f"compiling for a GPU needs ptxas of {COMPILER}, which is not installed: {install} "
        f"({where})"
    )


def environment(compiler: Path) -> dict[str, str]:
    """Returns the environment of a process that compiles for a GPU.

    Args:
      compiler: the directory of `require_plugin`.
    """
    # Autotuning would need the GPU.
    flags = ("--xla_gpu_autotune_level=0", f"--xla_gpu_cuda_data_dir={compiler}")
    own = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "false",  # a fast compilation is not what would run
        "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    return {**os.environ, **own}


def run_apart(module: str, task: Any) -> Any:
    """Runs a module of lordjax in a process that compiles for a GPU; returns its result.

    Args:
      module: its name. It calls `answer` when it is run.
      task: what it gets; anything that can be pickled.

    Returns:
      what the module's function returned; anything that JSON can hold.

    Raises:
      ImportError: as `require_plugin`.
      ValueError: if the function raised a ValueError; the same message.
      RuntimeError: if the process failed otherwise; ends with what it wrote to stderr.
    """
    own = environment(require_plugin())
    found = subprocess.run(
        [sys.executable, "-m", module], input=pickle.dumps(task), capture_output=True, env=own
    )
    if found.returncode:
        raise RuntimeError(
            f"the process that compiles for a GPU ended with code {found.returncode}:\n"
            f"{found.stderr.decode(errors='replace')[-4000:]}"
        )
    answered = json.loads(found.stdout.decode().splitlines()[-1])
    if "error" in answered:
        raise ValueError(answered["error"])
    return answered["result"]


def answer(function: Callable[[Any], Any]) -> None:
    """Answers the process that called `run_apart`, with a function of its task."""
    task = pickle.loads(sys.stdin.buffer.read())
    try:
        answered = {"result": function(task)}
    except ValueError as error:
        answered = {"error": str(error)}
    print(dumps(answered))


def absent_mesh(card: Card, count: int = 1) -> Mesh:
    """Returns a mesh of described devices along `DATA_AXIS`; nothing can run on it.

    Args:
      card: the GPU.
      count: number of devices, all of one host.
    """
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=card.target_config(), topology=f"1x1x{count}"
    )
    devices = np.array(topology.devices)
    return Mesh(devices, (DATA_AXIS,), axis_types=(AxisType.Auto,))


def compile_program(fn: Any, args: Any, options: Mapping[str, Any] | None = None) -> Any:
    """Compiles a function for the devices of its arguments.

    Args:
      fn: a function, or a jitted function, whose donated arguments then are donated.
      args: its arguments: shapes with shardings on an `absent_mesh`.
      options: keyword arguments.

    Returns:
      JAX's ``Compiled``.
    """
    jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
    traced = jitted.trace(*args, **(options or {}))
    return traced.lower(lowering_platforms=("cuda",)).compile()
