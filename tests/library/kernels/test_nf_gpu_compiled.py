"""The kernels of a GPU, compiled for one that is not here: none spills a register to memory."""

import json
import re
import subprocess
import sys

import pytest

from lordjax.runtime import gpu_compiler

KERNELS = """
import itertools
import jax
import jax.numpy as jnp
from lordjax.kernels import nf_gpu, nf_gpu_autotune
from lordjax.models.attention import attend
from lordjax.runtime import target
from lordjax.runtime.cards import CARDS
from lordjax.runtime.gpu_compiler import absent_mesh, answer
from lordjax.scripts.benchmarks.gpu.kernels import operands

ROWS = 1, 32, 256

def products():
    for form, rows in itertools.product(("nf4", "nf3"), ROWS):
        for tile in nf_gpu_autotune.candidates(rows):
            yield form, rows, 64, "bfloat16", tile
    others = [("nf2", "bfloat16"), ("nf8", "bfloat16"), ("nf4", "float16"), ("nf4", "float32")]
    for form, dtype in others:
        for rows in ROWS:
            yield form, rows, 0, dtype, nf_gpu.default_tile(rows)

def run(card):
    device = absent_mesh(CARDS[card], 1).devices.flat[0]
    where = jax.sharding.SingleDeviceSharding(device)

    def compiled(fn, args):
        def place(a):
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

        traced = jax.jit(fn).trace(*jax.tree.map(place, args))
        made = traced.lower(lowering_platforms=("cuda",)).compile()
        assert "triton" in made.as_text()

    count = 0
    with target.absent_gpus():
        for form, rows, rank, dtype, tile in products():
            args = jax.eval_shape(lambda: operands((1024, 512), rows, form, rank, dtype))
            compiled(lambda *a, tile=tile: nf_gpu.matmul(*a, tile=tile), args)
            count += 1
        for width in (64, 128, 256):
            arrays = [jax.ShapeDtypeStruct((1, 256, 4, width), jnp.bfloat16)] * 3
            loss = lambda *a: attend(*a, scale=1.0).astype(jnp.float32).sum()
            compiled(jax.grad(loss, argnums=(0, 1, 2)), arrays)
            count += 1
    return count

answer(run)
"""


@pytest.mark.gpu_compile
@pytest.mark.parametrize(
    ("card", "architecture"), [("h200", "sm_90a"), ("a100", "sm_80"), ("l4", "sm_89")]
)
def test_no_kernel_spills(monkeypatch, tmp_path, card, architecture):
    (tmp_path / "kernels_apart.py").write_text(KERNELS)
    dump = tmp_path / "dump"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={dump}")
    count = gpu_compiler.run_apart("kernels_apart", card)
    ptxas = gpu_compiler.require_plugin() / "bin" / "ptxas"
    programs = [path for path in sorted(dump.glob("*.ptx")) if path.stat().st_size]
    assert len(programs) >= count > 40
    spilled = {}
    for path in programs:
        command = [ptxas, f"-arch={architecture}", "-v", path, "-o", tmp_path / "cubin"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        for name, stores in re.findall(r"for (\S+)\n.*?(\d+) bytes spill stores", told):
            if int(stores):
                spilled[f"{path.name} {name}"] = int(stores)
    assert not spilled, json.dumps(spilled, indent=1)
