"""Bytes that are alive in each stage of a compression, by purpose, from shapes alone.

Names of purposes are keys of a report. Those that begin with ``device`` are on the device, the
others on the host.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from lordjax.calibration.backward_pass import STATE_BYTES
from lordjax.compression.measured import scale_search
from lordjax.compression.measured.temperature import TEMPERATURES
from lordjax.forecast.calibration_cost import gradient_shapes, site_inputs, statistics_shapes
from lordjax.forecast.job import CalibrationSpec, CompressionSpec
from lordjax.forecast.quantized_cost import QuantizationSpec, weighted_site
from lordjax.forecast.whole_file import coded_tables, end_sums, table_sequences
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import is_kernel, nbytes
from lordjax.kernels.kinds import weights
from lordjax.kernels.low_rank import LowRank
from lordjax.models.head_axes import LAST_NAME
from lordjax.models.objective import CHUNK
from lordjax.models.sites import Site
from lordjax.runtime import target

# Float64 arrays of a factorization beside its inputs, each as large as the largest input. XLA was
# seen to hold fewer than 3.5.
FACTORIZATION_COPIES = 4
QUANTIZATION_COPIES = 8  # float32 arrays of the largest matrix while it is quantized
PAGES = 2.0**24  # bytes of the model's files that stay mapped: `readers.tensor_files.PAGES`
SHARD = 2 * 2**30  # bytes that are written at a time

Parts = dict[str, float]  # purpose -> bytes


class StageMemory:
    """Bytes by purpose of every stage; a stage is a method, with underscores in its name.

    Subclasses add the stages of low-rank compression and of quantization.

    Args:
      spec: the job.
      before: shapes of the stored model, as a nested dict.
      after: shapes of the result.
      process: bytes of the process itself, compiled programs included.
      layer_batch: number of blocks that are factorized at a time.
      processes: number of processes; each keeps the statistics of its own sites.
    """

    def __init__(
        self,
        spec: CalibrationSpec,
        before: Any,
        after: Any,
        process: float,
        layer_batch: int,
        processes: int,
    ):
        self.spec, self.process = spec, process
        self.layer_batch, self.processes = layer_batch, processes
        self.layers = spec.config.num_layers
        self.after = after
        self.stored, self.result = nbytes(before), nbytes(after)
        self.block, self.non_block_params = nbytes(spec.block), nbytes(spec.non_block_params)
        self.block_stored = float(nbytes(before["layer_0"]))
        gradients, bases = gradient_shapes(spec) if spec.backward[0] else ({}, {})
        self.gradient, self.bases = spec.folds * nbytes(gradients), nbytes(bases)
        self.factor_bytes: list[int] = []  # of the sites of a block
        self.statistic = 0  # bytes of what the forward pass of a block collects

    def parts(self, stage: str) -> Parts:
        """Returns the bytes of a stage by its name."""
        return getattr(self, stage.replace(" ", "_").replace("-", "_"))()

    def gradients(self) -> Parts:
        """While the backward pass runs."""
        sequences, batch = self.spec.backward
        states = self.state_bytes(sequences) * self.layers
        return self._baseline() | {
            "device: hidden states": min(states, max(STATE_BYTES, states * batch / sequences)),
            "device: gradient statistics": float(self.layers * (self.gradient + self.bases)),
            "device: a block": float(self.block),
            "device: activations": self._activations(batch, backward=True),
            "device: embedding and head": float(self.non_block_params),
            "device: logits": self._logits(batch),
        }

    def tables(self) -> Parts:
        """While statistics of the tables are collected, or their formats are tried."""
        sequences, batch = table_sequences(self.spec)
        kept = max(sum(self.factor_bytes), self.gradient)
        states = (self.layers + 1) * self.state_bytes(sequences)
        collecting = self._activations(batch, backward=True) + self._logits(batch) + self.block
        return self._baseline() | {
            "factors": float(kept) * self.layers,
            "device: hidden states": min(states, STATE_BYTES),
            "device: embedding and head": float(self.non_block_params),
            "device: statistics": float(nbytes(end_sums(self.spec))) if sequences else 0.0,
            "device: workspace": max(collecting * bool(sequences), self._table_workspace()),
        }

    def _table_workspace(self) -> float:
        """Bytes while the largest table is quantized: its kernel, error weights and codes."""
        coded = coded_tables(self.spec).values()
        each = [
            4.0 * (1 + QUANTIZATION_COPIES) * kernel.size + 2.0 * nbytes(weights)
            for kernel, weights, _ in coded
        ]
        return max(each, default=0.0)

    def apply(self) -> Parts:
        """While the result is put together, and tables are quantized."""
        return self._baseline() | {
            "result": float(self.result),
            "device: workspace": self._table_workspace(),
        }

    def write(self) -> Parts:
        """While a file is written: its arrays in order, and their bytes."""
        return self.apply() | {"a file": 2.0 * min(SHARD, self.result)}

    def streamed_parts(self, stage: str) -> Parts:
        """Purposes that take less memory with a work directory, as this kind of job does it."""
        del stage
        return {}

    def disk(self) -> int:
        """Bytes of a work directory when it is fullest, with the result."""
        sequences = self.spec.backward[0]
        inputs = self.state_bytes(self.spec.sequences) * (self.layer_batch + 1)
        states = max(self.state_bytes(sequences) * (self.layers + 3), inputs)
        kept = self.layers * (sum(self.factor_bytes) + self.gradient)
        return round(states + kept + self.result)

    def state_bytes(self, sequences: int) -> float:
        """Bytes of the residual stream of some sequences."""
        return float(nbytes(self.spec.residual_stream(sequences)))

    def _baseline(self) -> Parts:
        return {"process": self.process, "pages of the model": min(PAGES, float(self.stored))}

    def _activations(self, batch: int, *, backward: bool) -> float:
        """Bytes of a block's activations: residual stream, layer outputs, attention weights."""
        config = self.spec.config
        heads = config.head_size * (config.num_heads + 2 * config.num_kv_heads)
        width = 4 * config.hidden_size + 2 * heads + (2 + config.gated) * config.mlp_size
        parallel_heads = config.num_heads // config.num_kv_heads
        if target.platform() != "cpu":
            parallel_heads = batch * config.num_heads
        attention = 2 * parallel_heads * min(256, self.spec.length) * self.spec.length
        tokens = batch * self.spec.length
        return 4.0 * (tokens * width + attention) * (2 if backward else 1)

    def _logits(self, batch: int) -> float:
        """Bytes of the logits of a chunk of positions, and of their gradient."""
        rows = min(CHUNK, self.spec.length) * (batch if self.spec.backward[0] == 0 else 1)
        return 3.0 * rows * self.spec.config.vocab_size * 4


class LowRankMemory(StageMemory):
    """Bytes by purpose of the stages of a low-rank compression."""

    spec: CompressionSpec

    def __init__(self, spec: CompressionSpec, *others: Any):
        super().__init__(spec, *others)
        self.factor_bytes = [_factor_bytes(spec, site) for site in spec.sites]
        self.statistic = spec.folds * nbytes(statistics_shapes(spec)) if spec.factors_first else 0

    def statistics(self) -> Parts:
        """While statistics of the last batch of blocks are collected."""
        sequences = self.spec.sequences - self.spec.held_out
        reads = bool(self.statistic) or self.spec.measures_influence
        # Blocks of the same batch still hold gradients in place of factors.
        made, others = sum(self.factor_bytes), self.layer_batch - 1
        collected = self.statistic * self.layer_batch / self.processes if others else 0.0
        return self._baseline() | {
            "factors": float(max(made, self.gradient)) * self.layers
            + min(made, self.gradient) * others,
            "statistics of a group": collected,
            "device: hidden states": self.state_bytes(sequences) if reads else 0.0,
            "device: a block": float(self.block),
            "device: statistics": float(self.statistic),
            "device: activations": self._activations(self.spec.batch, backward=False) * reads,
        }

    def factors(self) -> Parts:
        """While a block is factorized; its kernels are read again in the stored dtype."""
        return self.statistics() | {
            "device: a block": self.block_stored,
            "device: activations": 0.0,
            "device: workspace": self._workspace(),
        }

    def held_out_check(self) -> Parts:
        """While predicted errors are checked on held-out sequences."""
        return self._variants(1 + len(self.spec.trials))

    def comparison(self) -> Parts:
        """While a temperature is chosen."""
        return self._variants(1 + len(TEMPERATURES))

    def _variants(self, count: int) -> Parts:
        """While some models, the original one among them, run block by block."""
        held_out = self.spec.held_out
        return self._baseline() | {
            "factors": float(sum(self.factor_bytes)) * self.layers,
            "device: hidden states": self.state_bytes(held_out) * count,
            "device: a block": 4.0 * self.block,
            "device: embedding and head": float(self.non_block_params),
            "device: activations": self._activations(held_out, backward=False)
            + self._logits(held_out),
        }

    def sequential(self) -> Parts:
        """While blocks are compressed in order."""
        streams = 2 if self.spec.calibration_mode == "corrective" else 1
        return self.statistics() | {
            "factors": float(sum(self.factor_bytes) + self.gradient) * self.layers,
            "statistics of a group": 0.0,
            "device: hidden states": streams * self.state_bytes(self.spec.sequences),
            "device: a block": 3.0 * self.block,
            "device: workspace": self._workspace(),
        }

    def apply(self) -> Parts:
        """While the result is put together: float32 pairs are views of the factors."""
        leaves = jax.tree.leaves(self.after, is_leaf=is_kernel)
        views = [a for a in leaves if isinstance(a, LowRank) and a.left.dtype == "float32"]
        return self._baseline() | {
            "factors": float(sum(self.factor_bytes)) * self.layers,
            "result": float(self.result - nbytes(views)),
            "device: workspace": self._table_workspace(),
        }

    def streamed_parts(self, stage: str) -> Parts:
        """While a block is factorized: all factors but the largest, which is in the workspace.

        Hidden states of variants stay in memory.
        """
        if stage == "factors":
            return {"factors": float(sorted([0, *self.factor_bytes])[-2])}
        kept = "device: hidden states"
        variants = stage in ("held-out check", "comparison")
        return {kept: self.parts(stage)[kept]} if variants else {}

    def _workspace(self) -> float:
        """Bytes of the largest factorization."""
        return max(map(self._site_workspace, self.spec.sites), default=0.0)

    def _site_workspace(self, site: Site) -> float:
        kernels, stats = site_inputs(self.spec, site)
        if self.spec.on_host(site) is not None:
            # The Gram matrix, a triangle of factors, and the last layer's kernel in two dtypes; the
            # sums of all folds, if there are several.
            fan_in, fan_out = kernels[LAST_NAME[site.kind]].shape
            return (10.0 + 4.0 * (self.spec.folds - 1)) * fan_in**2 + 12.0 * fan_in * fan_out
        leaves = jax.tree.leaves((kernels, stats))
        largest = max((leaf.size for leaf in leaves), default=0)
        return 8.0 * (sum(leaf.size for leaf in leaves) + FACTORIZATION_COPIES * largest)


class QuantizedMemory(StageMemory):
    """Bytes by purpose of the stages of a quantization, which has one or two passes."""

    spec: QuantizationSpec

    def __init__(self, spec: QuantizationSpec, *others: Any):
        super().__init__(spec, *others)
        self.matrices = matrices = [weighted_site(spec, site) for site in spec.sites]
        # A kernel, its error weights, and the statistics that they are computed from.
        self.matrix = max(4.0 * kernel.size + 2.0 * nbytes(cost) for kernel, cost in matrices)
        self.largest = max(4.0 * kernel.size for kernel, _ in matrices)
        self.statistic = spec.folds * nbytes(statistics_shapes(spec)) if spec.reads_inputs else 0

    def predictions(self) -> Parts:
        """While a block's inputs are collected, or its candidates are tried matrix by matrix."""
        states = self.state_bytes(self.spec.sequences) if self.statistic else 0.0
        collecting = self._activations(self.spec.batch, backward=False) + self.block
        return self._baseline() | {
            "factors": float(self.gradient) * self.layers,  # gradients wait until they are used
            "a block, as it is stored": 2.0 * self.block_stored,
            "device: hidden states": states,
            "device: statistics": float(self.statistic),
            "device: workspace": max(
                collecting if self.statistic else 0.0,
                self.matrix + QUANTIZATION_COPIES * self.largest,
            ),
        }

    def scales(self) -> Parts:
        """While some blocks are quantized in both ways, and the models run on some sequences."""
        form = normal_float.Format.parse(scale_search.FORMAT)
        coded = sum(form.nbytes(math.prod(kernel.shape)) for kernel, _ in self.matrices)
        blocks = len(scale_search.WAYS) * len(scale_search.measured_blocks(self.layers))
        found = self.predictions()
        streams = (1 + len(scale_search.WAYS)) * self.state_bytes(scale_search.SEQUENCES)
        found["device: hidden states"] = max(found["device: hidden states"], streams)
        return found | {"result": float(blocks * coded)}

    def decomposition(self) -> Parts:
        """While matrices are decomposed, with the results so far."""
        return self.predictions() | {"result": float(self.result)}

    def streamed_parts(self, stage: str) -> Parts:
        """Gradients are mapped with their matrix; parameters outside the blocks come first."""
        return {} if stage == "apply" else {"factors": 0.0, "result": self.result / self.layers}


def _factor_bytes(spec: CompressionSpec, site: Site) -> int:
    """Bytes of a site's factors as they are kept: float32 on the host."""
    flat = trees.flatten(spec.block)
    shapes = [flat[path].shape for path in site.kernels if path in flat]
    if site.kind == "linear":  # pairs up to break-even
        return 4 * weights(jax.ShapeDtypeStruct(shapes[0], "float32"))
    fan_in, fan_out = shapes[-1]
    module = spec.definition.modules[site.kind]
    fits = getattr(module.factor, "keywords", {}).get("fit", True)
    if site.kind == "qk":
        return 4 * fan_out * spec.config.head_size * (spec.config.rope is None)
    triangle = fan_in**2 if fits else 0
    return 4 * (triangle + fan_in * fan_out * (fits or site.kind == "vo"))
