"""The work of a compression, stage by stage, from shapes alone.

The programs that `prepare` and `compress` run are traced with the shapes they run with, so that
nothing is counted that does not happen, and their operations are multiplied by how often they run.
Names of stages are those of a report's seconds; "factors" is part of "statistics and factors"
there.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lordjax.allocation.policies import INFLUENCED
from lordjax.calibration.backward_pass import (
    STATE_BYTES,
    empty_gradients,
    gradient_basis,
)
from lordjax.calibration.forward_pass import INFLUENCE, activation_keys, statistic_width
from lordjax.calibration.observers import (
    EMBEDDINGS,
    embed,
    empty,
    observe,
    observe_gradients,
    observe_pair,
    windows_per_step,
)
from lordjax.calibration.statistics import Moments
from lordjax.compression.sequential import sites_by_stage
from lordjax.compression.site_factors import input_shapes, site_work
from lordjax.compression.temperature import TEMPERATURES
from lordjax.forecast.job import STAGES, CompressionSpec
from lordjax.kernels import trees
from lordjax.kernels.base import nbytes
from lordjax.methods import method_at
from lordjax.models import objective
from lordjax.models.objective import loss_gradient, losses
from lordjax.models.sites import LAST_LAYER, LINEAR_SITES, Site, site_path
from lordjax.runtime import flops
from lordjax.runtime.flops import OpCounts


def _sweeps(job: CompressionSpec) -> int:
    """How many times the backward pass walks over the blocks."""
    windows, batch = job.backward
    together = max(1, STATE_BYTES // (nbytes(job.stream(batch)) * job.config.num_layers))
    return math.ceil(math.ceil(windows / batch) / together)


def stages(job: CompressionSpec) -> dict[str, OpCounts]:
    """Stage -> its work; stages without any are absent."""
    found = {name: Counter() for name in STAGES}
    weights = nbytes(job.block) * job.config.num_layers
    found["gradients"] = gradient_work(job)
    if job.factors_first:
        found["statistics"] = forward_work(job)
        found["statistics"].update(loaded(weights))
        found["factors"] = all_factors(job)
    if job.compares:
        found["comparison"] = _comparison(job)
        found["comparison"].update(loaded((1 + len(TEMPERATURES)) * weights))
    if job.walks:
        found["sequential"] = _sequential(job)
        found["sequential"].update(loaded(weights))
    found["apply"]["read"] += weights + nbytes(job.non_block_params)
    return {name: ops for name, ops in found.items() if ops}


def gradient_work(job: CompressionSpec) -> OpCounts:
    """Of taking loss gradients; nothing, if the method reads none."""
    windows, batch = job.backward
    if not windows:
        return Counter()
    found = _backward(job, windows, batch)
    found.update(loaded(2 * _sweeps(job) * nbytes(job.block) * job.config.num_layers))
    return found


def recomputed(job: CompressionSpec) -> float:
    """Operations of the backward pass that were made before: the forward passes of its blocks."""
    windows, batch = job.backward
    return flops.total(flops.scaled(_pass(job, batch, {}), windows / batch)) if windows else 0.0


def loaded(count: int) -> OpCounts:
    """Bytes of weights that are read and put on the device."""
    return Counter({"read": count, "put": count})


def gradient_shapes(job: CompressionSpec) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Statistics of a block's backward pass, and the coordinates they are taken in."""
    return jax.eval_shape(lambda block: empty_gradients(block, job.row, job.config), job.block)


def statistics(job: CompressionSpec) -> dict[str, Any]:
    """Shapes of what a block's forward pass collects."""
    keys, flat = activation_keys(job.block, job.sites, job.row), trees.flatten(job.block)
    wanted = sorted({key for names in keys.values() for key in names.values()})
    widths = {key: statistic_width(key, flat, job.config) for key in wanted}
    widths |= {INFLUENCE: None} if job.policy in INFLUENCED else {}
    return jax.eval_shape(lambda: empty(widths))


def inputs(job: CompressionSpec, site: Site) -> tuple[Any, dict[str, Any]]:
    """Shapes of what `factor` reads of a site: its kernels and statistics."""
    gradients = gradient_shapes(job)[0] if job.backward[0] else {}
    return input_shapes(job.row, site, job.block, gradients, job.config)


def every_layer(job: CompressionSpec, program: Callable[[int | None], OpCounts]) -> OpCounts:
    """Work of a program in all blocks; of one window it is compiled once."""
    layers = Counter(job.config.window(i) for i in range(job.config.num_layers))
    return flops.merged([flops.scaled(program(w), count) for w, count in layers.items()])


def _pass(job: CompressionSpec, rows: int, stats: Any, *, forward: bool = True) -> OpCounts:
    """A batch of windows through all blocks."""

    def block(window: int | None) -> OpCounts:
        step = functools.partial(observe, config=job.config, window=window, forward=forward)
        return flops.count_ops(step, job.block, job.stream(rows), None, stats)

    return every_layer(job, block)


def _tokens(job: CompressionSpec, rows: int) -> Any:
    return jax.ShapeDtypeStruct((rows, job.length), jnp.int32)


def _targets(job: CompressionSpec, rows: int) -> Any:
    width = 1 if job.config.head == "classes" else job.length
    return jax.ShapeDtypeStruct((rows, width), jnp.int32)


def _embedding(job: CompressionSpec, rows: int) -> OpCounts:
    tables = {key: value for key, value in job.non_block_params.items() if key in EMBEDDINGS}
    return flops.count_ops(functools.partial(embed, config=job.config), tables, _tokens(job, rows))


def _backward(job: CompressionSpec, windows: int, batch: int) -> OpCounts:
    """Of the sweeps that take gradients, for some windows, as many at a time."""
    stats, bases = gradient_shapes(job)
    objective.objective_for(job.config)  # raises where there is no loss

    def backward(window: int | None) -> OpCounts:
        step = functools.partial(observe_gradients, config=job.config, window=window)
        x = job.stream(batch)
        return flops.count_ops(step, job.block, x, None, x, bases, stats)

    loss = functools.partial(loss_gradient, config=job.config)
    steps = flops.merged(
        [
            _embedding(job, batch),
            _pass(job, batch, {}),
            flops.count_ops(loss, job.non_block_params, job.stream(batch), _targets(job, batch)),
            every_layer(job, backward),
        ]
    )
    flat = trees.flatten(job.block)
    turned = [
        flops.count_ops(gradient_basis, flat[p]) for p, basis in bases.items() if basis is not None
    ]
    return flops.merged(
        [
            flops.scaled(steps, windows / batch),
            flops.scaled(flops.merged(turned), job.config.num_layers),
        ]
    )


def forward_work(job: CompressionSpec) -> OpCounts:
    """Of the pass that collects what `statistics` says; nothing, if that is nothing."""
    stats = statistics(job)
    if not stats:
        return Counter()
    steps = flops.merged([_embedding(job, job.batch), _pass(job, job.batch, stats)])
    return flops.scaled(steps, (job.windows - job.held_out) / job.batch)


def all_factors(job: CompressionSpec, counts: Mapping[Site, int] | None = None) -> OpCounts:
    """Of so many of each site, or of all; those of equal shapes share a program."""
    known: set[str] = set()
    found: OpCounts = Counter()
    counts = dict.fromkeys(job.sites, job.config.num_layers) if counts is None else counts
    for site, count in counts.items():
        name = method_at(job.method, site.layer) if site.kind == "linear" else site.kind
        program = f"{name} {inputs(job, site)}"
        ops = flops.scaled(site_factors(job, site), count)
        found.update({k: n for k, n in ops.items() if k != "equations" or program not in known})
        known.add(program)
    return found


def site_factors(job: CompressionSpec, site: Site) -> OpCounts:
    """Of a site in one block."""
    return site_work(job.method, site, *inputs(job, site), meshed=job.meshed)


def _comparison(job: CompressionSpec) -> OpCounts:
    """Forward passes of a model for every temperature, whose modules are fitted on the host."""
    rows = windows_per_step(job.held_out, job.length)
    with jax.default_matmul_precision("highest"):
        ends = flops.count_ops(
            functools.partial(losses, job.config),
            job.non_block_params,
            job.stream(rows),
            _targets(job, rows),
        )
        steps = flops.merged([_pass(job, rows, {}), ends])
    variants = len(TEMPERATURES) + (job.config.head == "classes")
    found = flops.scaled(steps, variants * job.held_out / rows)
    found["cholesky float64"] += round(len(TEMPERATURES) * job.config.num_layers * _fits(job))
    return found


def _fits(job: CompressionSpec) -> float:
    """Fitting a block's modules to a width, about ``keep`` of what it was."""
    flat, count = trees.flatten(job.block), 0.0
    for site in job.sites:
        if site.kind in LAST_LAYER:
            fan_in, fan_out = flat[LAST_LAYER[site.kind]].shape
            count += (job.keep * fan_in) ** 2 * fan_out
    return count


def _sequential(job: CompressionSpec) -> OpCounts:
    """Of `sequential`: a forward pass for every group of sites, and one of what became of them."""
    corrective = (job.prefix or job.row.prefix) == "corrective"
    layers = job.config.num_layers
    found = [_embedding(job, job.batch), flops.scaled(_pass(job, job.batch, {}), 1 + corrective)]
    factors = []
    for group in sites_by_stage(job.row, job.config):
        share = sum(_planned(job, i, group) for i in range(layers)) / layers
        if not share:
            continue
        kinds = [site for site in group if not corrective or site.kind != "linear"]
        if kinds:
            keys = activation_keys(job.block, tuple(kinds), job.row)
            wanted = {key for names in keys.values() for key in names.values()}
            stats = {key: stat for key, stat in statistics(job).items() if key in wanted}
            found.append(flops.scaled(_pass(job, job.batch, stats, forward=False), share))
        if corrective:
            found.append(flops.scaled(every_layer(job, _pairs(job, group)), share))
        factors += [flops.scaled(site_factors(job, site), share * layers) for site in group]
    steps = flops.scaled(flops.merged(found), (job.windows - job.held_out) / job.batch)
    return flops.merged([steps, *factors])


def _planned(job: CompressionSpec, i: int, group: tuple[Site, ...]) -> bool:
    """Whether a block has anything to compress in a group, as far as that is known."""
    return job.ranks is None or any(job.ranks.get(site_path(i, site)) is not None for site in group)


def _pairs(job: CompressionSpec, group: tuple[Site, ...]) -> Callable[[int | None], OpCounts]:
    """Untouched and compressed block in lockstep."""
    flat = trees.flatten(job.block)
    last = {LAST_LAYER.get(site.kind, site.path) for site in group}
    sites = [site for site in LINEAR_SITES if site.path in last]
    zeros = jax.eval_shape(
        lambda: (
            {s.output_tap: Moments.zeros(flat[s.path].shape[1]) for s in sites},
            {s.input_tap: Moments.zeros(flat[s.path].shape[0]) for s in sites},
            {f"{s.input_tap}|{s.output_tap}": jnp.zeros(flat[s.path].shape) for s in sites},
        )
    )

    def program(window: int | None) -> OpCounts:
        step = functools.partial(observe_pair, config=job.config, window=window)
        x = job.stream(job.batch)
        return flops.count_ops(step, (job.block, job.block), (x, x), None, *zeros)

    return program
