"""Benchmark of `collect` on a large tree over several GPUs, compiled on a machine that has none.

Run, where jax's CUDA plugin is installed without its libraries (``pip install --no-deps
jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12``)::

    python -m lordjax.scripts.benchmarks.functions.sharded

Nothing is computed: the function, its parameters and the batch are shapes. The parameters are split
over all devices along their outputs, the batch along its sequences.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

# What XLA must know of a card: facts of the data sheet of an H200 SXM (141 GB, 4.8 TB/s), and of
# the compute capability 9.0 (CUDA programming guide).
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--width", default=4096, show_default=True, help="Width of the model.")
@click.option("--hidden", default=11008, show_default=True, help="Width of its MLPs.")
@click.option("--layers", default=48, show_default=True, help="Number of scanned blocks.")
@click.option("--devices", default=8, show_default=True, help="Number of GPUs.")
@click.option("--sequences", default=8, show_default=True, help="Sequences of a batch.")
@click.option("--length", default=2048, show_default=True, help="Tokens of a sequence.")
def main(width: int, hidden: int, layers: int, devices: int, sequences: int, length: int) -> None:
    """Compiles a pass of collect for H200 GPUs; prints its bytes per device as JSON."""
    prepare_compiler()  # before jax is imported
    from lordjax.scripts.benchmarks.protocol import environment

    shape = width, hidden, layers
    found = {
        name: compiled_bytes(*shape, devices, sequences, length, gradients=gradients)
        for name, gradients in (("activations", False), ("activations and gradients", True))
    }
    click.echo(json.dumps({"environment": environment(), **found}, indent=1))


def prepare_compiler() -> None:
    """Sets the environment for compiling for a GPU.

    Raises:
      click.UsageError: if the CUDA plugin is not installed.
    """
    try:
        import nvidia.cuda_nvcc
    except ImportError as error:
        raise click.UsageError(
            "this benchmark needs the CUDA plugin of jax, in its version; install it with pip "
            "install --no-deps jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12"
        ) from error
    data = Path(next(iter(nvidia.cuda_nvcc.__path__)))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={data}"


def compiled_bytes(
    width: int,
    hidden: int,
    layers: int,
    devices: int,
    sequences: int,
    length: int,
    *,
    gradients: bool,
) -> dict[str, Any]:
    """Returns bytes per device of one pass of `collect`, and its collectives.

    Args:
      width: width of the model.
      hidden: width of its MLPs.
      layers: number of scanned blocks.
      devices: number of GPUs.
      sequences: sequences of a batch.
      length: tokens of a sequence.
      gradients: whether gradients of the loss are taken.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from lordjax.functions.collecting import Collection
    from lordjax.functions.equations.tracing import open_call
    from lordjax.functions.site_statistics import needs_of
    from lordjax.scripts.benchmarks.functions.cost import block, loss, make_params

    mesh = Mesh(np.array(gpus(devices)), ("data",))

    def shaped(a: Any, *spec: str | None) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    def apply(params: Any, ids: Any) -> Any:
        step = jax.checkpoint(block)
        x = params["embed"][ids]
        x, _ = jax.lax.scan(lambda x, p: (step(p, x), None), x, params["blocks"])
        return x @ params["head"]

    tree = jax.eval_shape(lambda: make_params(width, hidden, layers))
    params = jax.tree.map(lambda a: shaped(a, *[None] * (a.ndim - 1), "data"), tree)
    ids = shaped(jax.ShapeDtypeStruct((sequences, length), jnp.int32), "data")
    needs = needs_of(["lord", "modegpt"] if gradients else ["svd-llm"], loss=gradients)
    given = apply, params, (ids,), needs, loss if gradients else None
    run = Collection(*given, where="blocks/")
    call = open_call(params, (ids,), {}, kernels=False)
    traced = run.program(call).trace(run.folds[0], run.leaves, call.inputs, run.bases)
    return analysis(traced.lower(lowering_platforms=("cuda",)).compile())


def gpus(count: int) -> Any:
    """Returns devices that programs can be compiled for, and that do not exist."""
    from jax.experimental import topologies

    given = {"platform": "cuda", "target_config": H200, "topology": f"1x1x{count}"}
    return topologies.get_topology_desc(**given).devices


def analysis(compiled: Any) -> dict[str, Any]:
    """Returns the bytes per device of a compiled program, and the number of its collectives."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    return {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "donated": memory.alias_size_in_bytes,
        "besides": memory.temp_size_in_bytes,
        "collectives": {k: text.count(f" {k}(") + text.count(f" {k}-start(") for k in kinds},
    }


if __name__ == "__main__":
    main()
