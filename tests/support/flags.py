"""Flags of XLA with which tests compile in half the time, to be read before JAX is imported."""

import importlib.util
import mmap
from pathlib import Path

# Fusions become LLVM's IR at once and not by way of MLIR, in one thread: there are as many
# processes as cores.
FASTER = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")


def known(flag):
    """Whether this jaxlib has a flag; XLA ends a process that gives it another."""
    folder = Path(importlib.util.find_spec("jaxlib").origin).parent
    name = flag.removeprefix("--").split("=")[0].encode()
    with max(folder.glob("*.so"), key=lambda path: path.stat().st_size).open("rb") as library:
        strings = mmap.mmap(library.fileno(), 0, access=mmap.ACCESS_READ)
        return strings.find(name + b"\0") >= 0


def faster():
    """Those of `FASTER` that this jaxlib knows."""
    return [flag for flag in FASTER if known(flag)]
