"""Seconds and bytes of memory that a compression will take, before it begins.

`seconds` divides the work of every stage (`stages`) by the measured rate of its kind (`speed`).
`memory` adds up what is alive in each stage; the largest stage is the peak::

    in memory            factors of all sites, statistics of one block (of
                         gradients: of all), hidden states of all windows
    with a work directory   one block, its statistics, hidden states of one batch; the rest is on
                         disk, the states before every block while gradients are taken included

and in both the activations of one batch, the float64 workspace of the largest site, and with N
devices the statistics of N blocks, on the host. On CPU what would be on a device is on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from lordjax.allocation.policies import INFLUENCED
from lordjax.calibration.backward_pass import STATE_BYTES
from lordjax.compression.temperature import TEMPERATURES
from lordjax.forecast.job import CompressionSpec
from lordjax.forecast.low_rank_cost import gradient_shapes, inputs, statistics
from lordjax.forecast.quantized_cost import QuantizationSpec, weights_of
from lordjax.kernels import trees
from lordjax.kernels.base import is_kernel, nbytes
from lordjax.kernels.kinds import weights
from lordjax.kernels.low_rank import LowRank
from lordjax.models.head_axes import LAST_NAME
from lordjax.models.objective import CHUNK
from lordjax.models.sites import Site
from lordjax.runtime.flops import OpCounts

PROCESS = 600e6  # bytes of Python with JAX, the rest of the library and a tokenizer
PROGRAM = 250e3  # bytes of compiled code and what made it, per equation, on the host
# The same of programs that look for codes, which are long and simple; the stages that run them.
CODE_PROGRAM, CODING = 5e3, ("predictions", "decomposition")
# Float64 arrays of a factor program beside its inputs, as large as the largest; XLA: < 3.5.
COPIES = 4
CODE_COPIES = 8  # float32 arrays of the largest matrix, while its codes are looked for
PAGES = 2.0**24  # bytes of the model's files that stay mapped (conversions/tensors.py)
ROWS = ("device: hidden states",)  # what devices share; the rest each has, or may have
SHARD = 2 * 2**30  # bytes that are written at a time

MemoryReport = dict[str, Any]


def memory(
    job: CompressionSpec,
    ops: Mapping[str, OpCounts],
    before: Any,
    after: Any,
    devices: int = 1,
    processes: int = 1,
) -> dict[str, MemoryReport]:
    """Peak bytes of ``in memory`` and ``with a work directory``.

    Args:
      job: what is asked for.
      ops: of its stages.
      before: shapes of the stored model, as a nested dict.
      after: shapes of the result.
      devices: that share the work.
      processes: that have them; what is counted is one's.

    Returns:
      for each ``host``, ``device`` (0 on CPU, where it is counted to the host) and the ``stage`` of
      the peak; ``parts``: stage -> part -> bytes. With a work directory ``disk``, too.
      Of several devices ``device`` is what each holds, also on CPU.
    """
    compiled = sum(
        of_stage["equations"] * (CODE_PROGRAM if name in CODING else PROGRAM)
        for name, of_stage in ops.items()
    )
    about = (before, after, PROCESS + compiled, min(devices, job.config.num_layers), processes)
    parts = (
        _QuantizedMemoryByStage(job, *about)
        if isinstance(job, QuantizationSpec)
        else _MemoryByStage(job, *about)
    )
    whole = {name: getattr(parts, name)() for name in ops}
    streamed = {name: _streamed(parts, name) for name in ops}
    return {
        "in memory": _peak(whole, devices, processes),
        "with a work directory": _peak(streamed, devices, processes) | {"disk": parts.disk()},
    }


def _peak(stages: Mapping[str, dict[str, float]], devices: int, processes: int) -> MemoryReport:
    """The largest stage on the host and on a device; names on a device begin with ``device``."""
    on_cpu = jax.default_backend() == "cpu"
    sums = {}
    for name, parts in stages.items():
        own = {part: n for part, n in parts.items() if part.startswith("device")}
        each = sum(n / (devices if part in ROWS else 1) for part, n in own.items())
        sums[name] = (sum(parts.values()) - sum(own.values()), each)
    both = {name: host + devices // processes * each for name, (host, each) in sums.items()}
    at = max(both, key=lambda name: both[name])
    host = both[at] if on_cpu else max(host for host, _ in sums.values())
    device = 0 if on_cpu and devices == 1 else max(each for _, each in sums.values())
    table = {n: {part: round(v) for part, v in parts.items() if v} for n, parts in stages.items()}
    return {"host": round(host), "device": round(device), "stage": at, "parts": table}


class _MemoryByStage:
    """What is alive in each stage, in bytes, by name.

    ``group`` blocks are factored together; a process keeps the statistics of its own sites.
    """

    def __init__(
        self,
        job: CompressionSpec,
        before: Any,
        after: Any,
        process: float,
        group: int,
        processes: int,
    ):
        self.job, self.process, self.group, self.processes = job, process, group, processes
        self.layers = job.config.num_layers
        self.stored, self.result = nbytes(before), nbytes(after)
        self.block, self.non_block_params = nbytes(job.block), nbytes(job.non_block_params)
        self.block_stored = float(nbytes(before["layer_0"]))
        self.after = after
        self.kept = self._kept()
        gradients, bases = gradient_shapes(job) if job.backward[0] else ({}, {})
        self.gradient, self.bases = nbytes(gradients), nbytes(bases)
        self.statistic = nbytes(statistics(job)) if job.factors_first else 0

    def _kept(self) -> list[int]:
        """Bytes of the factors of a block's sites."""
        return [_factor_bytes(self.job, site) for site in self.job.sites]

    def _begun(self) -> dict[str, float]:
        return {"process": self.process, "pages of the model": min(PAGES, float(self.stored))}

    def _states(self, windows: int) -> float:
        return float(nbytes(self.job.stream(windows)))

    def activations(self, batch: int, *, backward: bool) -> float:
        """Of a block: the residual stream, what its layers put out, and one head's attention."""
        config = self.job.config
        heads = config.head_size * (config.num_heads + 2 * config.num_kv_heads)
        width = 4 * config.hidden_size + 2 * heads + (2 + config.gated) * config.mlp_size
        at_once = config.num_heads // config.num_kv_heads
        if jax.default_backend() != "cpu":
            at_once = batch * config.num_heads
        attention = 2 * at_once * min(256, self.job.length) * self.job.length
        tokens = batch * self.job.length
        return 4.0 * (tokens * width + attention) * (2 if backward else 1)

    def logits(self, batch: int) -> float:
        """Of a chunk of positions, with their gradient."""
        rows = min(CHUNK, self.job.length) * (batch if self.job.backward[0] == 0 else 1)
        return 3.0 * rows * self.job.config.vocab_size * 4

    def workspace(self) -> float:
        """Of the largest factorisation."""

        def of_site(site: Site) -> float:
            kernels, stats = inputs(self.job, site)
            if self.job.on_host(site) is not None:
                # The Gram; a triangle of factors; the last layer's kernel, rounded from float64.
                fan_in, fan_out = kernels[LAST_NAME[site.kind]].shape
                return 10.0 * fan_in**2 + 12.0 * fan_in * fan_out
            leaves = jax.tree.leaves((kernels, stats))
            largest = max((leaf.size for leaf in leaves), default=0)
            return 8.0 * (sum(leaf.size for leaf in leaves) + COPIES * largest)

        return max(map(of_site, self.job.sites), default=0.0)

    def gradients(self) -> dict[str, float]:
        """While loss gradients are taken."""
        windows, batch = self.job.backward
        states = self._states(windows) * self.layers
        return self._begun() | {
            "device: hidden states": min(states, max(STATE_BYTES, states * batch / windows)),
            "device: gradient statistics": float(self.layers * (self.gradient + self.bases)),
            "device: a block": float(self.block),
            "device: activations": self.activations(batch, backward=True),
            "device: embedding and head": float(self.non_block_params),
            "device: logits": self.logits(batch),
        }

    def statistics(self) -> dict[str, float]:
        """While a block's inputs, or a group's, are collected; the last block."""
        windows = self.job.windows - self.job.held_out
        reads = bool(self.statistic) or self.job.policy in INFLUENCED
        made, others = sum(self.kept), self.group - 1  # whose gradients are there beside factors
        collected = self.statistic * self.group / self.processes if others else 0.0
        return self._begun() | {
            "factors": float(max(made, self.gradient)) * self.layers
            + min(made, self.gradient) * others,
            "statistics of a group": collected,
            "device: hidden states": self._states(windows) if reads else 0.0,
            "device: a block": float(self.block),
            "device: statistics": float(self.statistic),
            "device: activations": self.activations(self.job.batch, backward=False) * reads,
        }

    def factors(self) -> dict[str, float]:
        """While a block's sites are factored, whose kernels are read again as they are stored."""
        return self.statistics() | {
            "device: a block": self.block_stored,
            "device: activations": 0.0,
            "device: workspace": self.workspace(),
        }

    def comparison(self) -> dict[str, float]:
        """While a temperature is chosen."""
        variants = len(TEMPERATURES) + 1
        return self._begun() | {
            "factors": float(sum(self.kept)) * self.layers,
            "device: hidden states": self._states(self.job.held_out) * variants,
            "device: a block": 4.0 * self.block,
            "device: embedding and head": float(self.non_block_params),
            "device: activations": self.activations(self.job.held_out, backward=False)
            + self.logits(self.job.held_out),
        }

    def sequential(self) -> dict[str, float]:
        """While blocks are compressed one after the other."""
        both = 2 if (self.job.prefix or self.job.row.prefix) == "corrective" else 1
        return self.statistics() | {
            "factors": float(sum(self.kept) + self.gradient) * self.layers,
            "statistics of a group": 0.0,
            "device: hidden states": both * self._states(self.job.windows),
            "device: a block": 3.0 * self.block,
            "device: workspace": self.workspace(),
        }

    def apply(self) -> dict[str, float]:
        """When the result is put together: pairs that keep their dtype are views of factors."""
        leaves = jax.tree.leaves(self.after, is_leaf=is_kernel)
        views = [a for a in leaves if isinstance(a, LowRank) and a.left.dtype == "float32"]
        return self._begun() | {
            "factors": float(sum(self.kept)) * self.layers,
            "result": float(self.result - nbytes(views)),
        }

    def write(self) -> dict[str, float]:
        """While a file is made: its arrays in order, and their bytes."""
        return self.apply() | {"a file": 2.0 * min(SHARD, self.result)}

    def alone(self, stage: str) -> dict[str, float]:
        """Parts of a stage of which less than a block's is in memory."""
        if stage != "factors":
            return {}
        return {"factors": float(sorted([0, *self.kept])[-2])}  # the largest: in its workspace

    def disk(self) -> int:
        """In a work directory when it is fullest, with the result."""
        windows = self.job.backward[0]
        kept = self._states(self.job.windows) * (self.group + 1)
        states = max(self._states(windows) * (self.layers + 3), kept)
        return round(states + self.layers * (sum(self.kept) + self.gradient) + self.result)


class _QuantizedMemoryByStage(_MemoryByStage):
    """The same where matrices become codes: there are no factors, and a pass or two."""

    def __init__(self, job: QuantizationSpec, before: Any, after: Any, *others: Any):
        super().__init__(job, before, after, *others)
        matrices = [weights_of(job, site) for site in job.sites]
        # A kernel, and what its errors cost beside the sums that say so.
        self.matrix = max(4.0 * kernel.size + 2.0 * nbytes(cost) for kernel, cost in matrices)
        self.largest = max(4.0 * kernel.size for kernel, _ in matrices)
        self.statistic = nbytes(statistics(job)) if job.reads else 0

    def predictions(self) -> dict[str, float]:
        """While a block's inputs are collected, or its options are tried, a matrix at a time."""
        states = self._states(self.job.windows) if self.statistic else 0.0
        ahead = self.activations(self.job.batch, backward=False) + self.block
        return self._begun() | {
            "factors": float(self.gradient) * self.layers,  # of all blocks, until they are used
            "a block, as it is stored": 2.0 * self.block_stored,
            "device: hidden states": states,
            "device: statistics": float(self.statistic),
            "device: workspace": max(
                ahead if self.statistic else 0.0, self.matrix + CODE_COPIES * self.largest
            ),
        }

    def decomposition(self) -> dict[str, float]:
        """The same, while results are there in part."""
        return self.predictions() | {"result": float(self.result)}

    def apply(self) -> dict[str, float]:
        """When what is no block is put beside the result."""
        return self._begun() | {"result": float(self.result)}

    def alone(self, stage: str) -> dict[str, float]:
        """Gradients are mapped with their matrix; what is no block is written first."""
        if stage == "apply":
            return {}
        return {"factors": 0.0, "result": self.result / self.layers}

    def _kept(self) -> list[int]:
        return []


def _streamed(parts: _MemoryByStage, stage: str) -> dict[str, float]:
    """A stage where everything but one block's part is on disk."""
    job, table = parts.job, getattr(parts, stage)()
    batch = job.backward[1] if stage == "gradients" else job.batch
    small = {
        "pages of the model": parts.stored / parts.layers,
        "factors": float(max(parts.kept, default=parts.gradient)),
        "device: hidden states": 2.0 * parts._states(batch),
        "device: gradient statistics": float(parts.gradient + parts.bases),
        "result": float(max(parts.non_block_params, parts.result / parts.layers)),
        "a file": float(parts.result / parts.layers),
    }
    small |= parts.alone(stage)
    if stage == "gradients":  # the head is read for the loss, and gone before the blocks
        alone = ("device: embedding and head", "device: logits")
        blocks = ("device: a block", "device: activations", "device: gradient statistics")
        table |= {part: min(n, small.get(part, math.inf)) for part, n in table.items()}
        less = min(alone, blocks, key=lambda parts: sum(table[part] for part in parts))
        small |= dict.fromkeys(less, 0.0)
    return {part: min(n, small.get(part, math.inf)) for part, n in table.items()}


def _factor_bytes(job: CompressionSpec, site: Site) -> int:
    """What is kept of a site's factors, float32 on the host."""
    flat = trees.flatten(job.block)
    shapes = [flat[path].shape for path in site.kernels if path in flat]
    if site.kind == "linear":  # pairs up to break-even
        return 4 * weights(jax.ShapeDtypeStruct(shapes[0], "float32"))
    fan_in, fan_out = shapes[-1]
    module = job.row.modules[site.kind]
    fits = getattr(module.factor, "keywords", {}).get("fit", True)
    if site.kind == "qk":
        return 4 * fan_out * job.config.head_size * (job.config.rope is None)
    triangle = fan_in**2 if fits else 0
    return 4 * (triangle + fan_in * fan_out * (fits or site.kind == "vo"))
