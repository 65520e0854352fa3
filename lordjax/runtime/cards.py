"""Facts about GPUs: what XLA needs to compile for them, and their limits.

Sources: the data sheets of H200, H100 (SXM), A100 (SXM, 80 GB) and L4 by NVIDIA for bandwidth and
operations per second without sparsity; sizes of a multiprocessor from the table of compute
capabilities in the CUDA C++ Programming Guide; bytes of memory as the driver reports them
(openxla/xla, ``xla/backends/gpu/target_config/specs``; L4: 23,034 MiB of ``nvidia-smi``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

T = 1e12


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
      name: its name at the command line.
      title: its name for people.
      capability: CUDA compute capability, major and minor.
      cores: number of multiprocessors.
      fpus: float32 units of a multiprocessor.
      threads: largest number of resident threads of a multiprocessor.
      shared: bytes of shared memory of a multiprocessor; a block can use 1024 fewer.
      cache: bytes of the second-level cache.
      clock: boost clock in GHz.
      memory: bytes of device memory.
      bandwidth: bytes per second of device memory.
      link: bytes per second that a device sends to the others, by NVLink where there is one.
      rates: dtype of a product -> FLOPs per second; ``tf32`` is float32 at the default precision.
    """

    name: str
    title: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    threads: int
    shared: int
    cache: int
    clock: float
    memory: int
    bandwidth: float
    link: float
    rates: Mapping[str, float]

    def target_config(self) -> str:
        """Returns the card as a ``GpuTargetConfigProto`` of XLA, in text."""
        major, minor = self.capability
        sizes: dict[str, Any] = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 * 1024,
            "shared_memory_per_block_optin": self.shared - 1024,
            "shared_memory_per_core": self.shared,
            "threads_per_core_limit": self.threads,
            "core_count": self.cores,
            "fpus_per_core": self.fpus,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "memory_bandwidth": round(self.bandwidth),
            "l2_cache_size": self.cache,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
        }
        lines = [f"{name}: {value}" for name, value in sizes.items()]
        lines.append(f"cuda_compute_capability {{ major: {major} minor: {minor} }}")
        return (
            f"gpu_device_info {{ {' '.join(lines)} }}\n"
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }\n'
            f'device_description_str: "NVIDIA {self.title}"\n'
        )


H100 = Card(
    name="h100",
    title="H100 SXM 80GB",
    capability=(9, 0),
    cores=132,
    fpus=128,
    threads=2048,
    shared=228 * 1024,
    cache=50 * 2**20,
    clock=1.98,
    memory=84_942_979_072,
    bandwidth=3.35 * T,
    link=0.45 * T,
    rates={
        "bfloat16": 989 * T,
        "float16": 989 * T,
        "tf32": 494 * T,
        "float32": 67 * T,
        "float64": 67 * T,
    },
)
CARDS = {
    "h200": dataclasses.replace(
        H100, name="h200", title="H200 SXM 141GB", memory=151_397_597_184, bandwidth=4.8 * T
    ),
    "h100": H100,
    "a100": Card(
        name="a100",
        title="A100 SXM 80GB",
        capability=(8, 0),
        cores=108,
        fpus=64,
        threads=2048,
        shared=164 * 1024,
        cache=40 * 2**20,
        clock=1.41,
        memory=85_100_068_864,
        bandwidth=2.039 * T,
        link=0.3 * T,
        rates={
            "bfloat16": 312 * T,
            "float16": 312 * T,
            "tf32": 156 * T,
            "float32": 19.5 * T,
            "float64": 19.5 * T,
        },
    ),
    "l4": Card(
        name="l4",
        title="L4 24GB",
        capability=(8, 9),
        cores=58,
        fpus=128,
        threads=1536,
        shared=100 * 1024,
        cache=48 * 2**20,
        clock=2.04,
        memory=24_152_899_584,
        bandwidth=0.3 * T,
        link=0.032 * T,
        rates={
            "bfloat16": 121 * T,
            "float16": 121 * T,
            "tf32": 60 * T,
            "float32": 30.3 * T,
            # A 64th of float32, as in all GPUs of compute capability 8.9.
            "float64": 0.47 * T,
        },
    ),
}


def parse_device(text: str) -> tuple[Card, int]:
    """Returns the card and the number of devices of ``NAME`` or ``NAME:N``.

    Args:
      text: such as ``h200`` or ``a100:8``.

    Raises:
      ValueError: if the card is unknown or the number is not 1 to 64.
    """
    name, _, count = text.partition(":")
    if name not in CARDS:
        raise ValueError(
            f"no GPU {name!r}; expected one of {', '.join(CARDS)}, with :N for N of them"
        )
    if ":" in text and not (re.fullmatch("[0-9]{1,2}", count) and 1 <= int(count) <= 64):
        raise ValueError(f"{text!r}: expected {name}:N with N from 1 to 64 devices, got {count!r}")
    return CARDS[name], int(count or 1)
