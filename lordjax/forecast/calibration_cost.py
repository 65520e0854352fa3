"""Operation counts of the calibration passes over the blocks, from shapes alone.

The jitted steps that calibration runs are traced with the shapes that it runs them on, and their
operations are multiplied by how often they run. So nothing is counted that does not run.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lordjax.calibration.backward_pass import STATE_BYTES, empty_gradients, gradient_basis
from lordjax.calibration.forward_pass import INFLUENCE, activation_keys, statistic_width
from lordjax.calibration.observers import EMBEDDINGS, embed, empty, observe, observe_gradients
from lordjax.compression.site_factors import input_shapes
from lordjax.forecast.job import CalibrationSpec
from lordjax.kernels import trees
from lordjax.kernels.base import nbytes
from lordjax.models import objective
from lordjax.models.objective import loss_gradient
from lordjax.models.sites import Site
from lordjax.runtime import flops
from lordjax.runtime.flops import OpCounts

# Shapes ------------------------------------------------------------------------------------------


def gradient_shapes(spec: CalibrationSpec) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Returns shapes of the gradient statistics of a block, and of the bases they are taken in."""
    return jax.eval_shape(
        lambda block: empty_gradients(block, spec.definition, spec.config), spec.block
    )


def statistics_shapes(spec: CalibrationSpec) -> dict[str, Any]:
    """Returns shapes of the statistics that the forward pass of a block collects."""
    keys = activation_keys(spec.block, spec.sites, spec.definition)
    flat = trees.flatten(spec.block)
    wanted = sorted({key for names in keys.values() for key in names.values()})
    widths = {key: statistic_width(key, flat, spec.config) for key in wanted}
    widths |= {INFLUENCE: None} if spec.measures_influence else {}
    return jax.eval_shape(lambda: empty(widths))


def site_inputs(spec: CalibrationSpec, site: Site) -> tuple[Any, dict[str, Any]]:
    """Returns shapes of the kernels and statistics that a site is factorized from."""
    gradients = gradient_shapes(spec)[0] if spec.backward[0] else {}
    return input_shapes(spec.definition, site, spec.block, gradients, spec.config)


def token_shapes(spec: CalibrationSpec, batch: int) -> jax.ShapeDtypeStruct:
    """Returns the shape ``[batch, length]`` of token ids."""
    return jax.ShapeDtypeStruct((batch, spec.length), jnp.int32)


def target_shapes(spec: CalibrationSpec, batch: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of the loss's targets: one per token, or a few per sequence."""
    width = {"classes": 1, "span": 2}.get(spec.config.head, spec.length)
    return jax.ShapeDtypeStruct((batch, width), jnp.int32)


# Operations --------------------------------------------------------------------------------------


def weight_traffic(count: int) -> OpCounts:
    """Counts ``count`` bytes of weights that are read and put on the device."""
    return Counter({"read": count, "put": count})


def per_layer(spec: CalibrationSpec, count_layer: Callable[[int | None], OpCounts]) -> OpCounts:
    """Sums the operations of a program over all blocks.

    Args:
      spec: the job.
      count_layer: sliding window of a layer -> operations of the program in that layer. Layers with
        the same window share one compiled program.
    """
    layers = Counter(spec.config.window(i) for i in range(spec.config.num_layers))
    return flops.merged([flops.scaled(count_layer(w), count) for w, count in layers.items()])


def embedding_ops(spec: CalibrationSpec, batch: int) -> OpCounts:
    """Counts the operations of the embedding of a batch of sequences."""
    tables = {key: value for key, value in spec.non_block_params.items() if key in EMBEDDINGS}
    program = functools.partial(embed, config=spec.config)
    return flops.count_ops(program, tables, token_shapes(spec, batch))


def blocks_ops(spec: CalibrationSpec, batch: int, stats: Any, *, forward: bool = True) -> OpCounts:
    """Counts the operations of a batch of sequences in all blocks.

    Args:
      spec: the job.
      batch: sequences of the batch.
      stats: shapes of the statistics that are collected on the way.
      forward: whether the output of every block is computed, or its statistics only.
    """

    def block(sliding_window: int | None) -> OpCounts:
        step = functools.partial(
            observe, config=spec.config, sliding_window=sliding_window, forward=forward
        )
        return flops.count_ops(step, spec.block, spec.residual_stream(batch), None, stats)

    return per_layer(spec, block)


def forward_work(spec: CalibrationSpec) -> OpCounts:
    """Counts the forward pass that collects `statistics_shapes`; empty if there are none."""
    stats = statistics_shapes(spec)
    if not stats:
        return Counter()
    steps = flops.merged([embedding_ops(spec, spec.batch), blocks_ops(spec, spec.batch, stats)])
    return flops.scaled(steps, (spec.sequences - spec.held_out) / spec.batch)


def gradient_work(spec: CalibrationSpec) -> OpCounts:
    """Counts the backward pass; empty if the method reads no gradients."""
    sequences, batch = spec.backward
    if not sequences:
        return Counter()
    return backward_work(spec, sequences, batch, *gradient_shapes(spec))


def backward_work(
    spec: CalibrationSpec, sequences: int, batch: int, stats: Any, bases: Mapping[str, Any]
) -> OpCounts:
    """Counts a backward pass over some sequences.

    Args:
      spec: the job.
      sequences: number of sequences.
      batch: sequences of a batch.
      stats: shapes of the statistics of a block that are collected on the way.
      bases: path of a kernel -> shape of the basis of its gradients, or None.
    """
    found = _backward(spec, sequences, batch, stats, bases)
    block_bytes = nbytes(spec.block) * spec.config.num_layers
    found.update(weight_traffic(2 * _sweeps(spec, sequences, batch) * block_bytes))
    return found


def recomputed(spec: CalibrationSpec) -> float:
    """Returns FLOPs of the backward pass that repeat the forward passes of the blocks."""
    sequences, batch = spec.backward
    if not sequences:
        return 0.0
    return flops.total(flops.scaled(blocks_ops(spec, batch, {}), sequences / batch))


def _sweeps(spec: CalibrationSpec, sequences: int, batch: int) -> int:
    """How often a backward pass over some sequences goes through all blocks."""
    state_bytes = nbytes(spec.residual_stream(batch)) * spec.config.num_layers
    batches_per_sweep = max(1, STATE_BYTES // state_bytes)
    return math.ceil(math.ceil(sequences / batch) / batches_per_sweep)


def _backward(
    spec: CalibrationSpec, sequences: int, batch: int, stats: Any, bases: Mapping[str, Any]
) -> OpCounts:
    """Operations of `backward_work`."""
    objective.objective_for(spec.config)  # raises if the head has no loss

    def backward(sliding_window: int | None) -> OpCounts:
        step = functools.partial(
            observe_gradients, config=spec.config, sliding_window=sliding_window
        )
        x = spec.residual_stream(batch)
        return flops.count_ops(step, spec.block, x, None, x, bases, stats)

    loss = flops.count_ops(
        functools.partial(loss_gradient, config=spec.config),
        spec.non_block_params,
        spec.residual_stream(batch),
        target_shapes(spec, batch),
    )
    steps = flops.merged(
        [embedding_ops(spec, batch), blocks_ops(spec, batch, {}), loss, per_layer(spec, backward)]
    )
    flat = trees.flatten(spec.block)
    rotated = [
        flops.count_ops(gradient_basis, flat[path])
        for path, basis in bases.items()
        if basis is not None
    ]
    return flops.merged(
        [
            flops.scaled(steps, sequences / batch),
            flops.scaled(flops.merged(rotated), spec.config.num_layers),
        ]
    )
