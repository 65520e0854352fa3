"""Operation counts of a low-rank compression, stage by stage, from shapes alone.

The programs that `prepare` and `compress` run are traced with the shapes that they run on, and
their operations are multiplied by how often they run. So nothing is counted that does not run.
Stages have the names that they have in a report's ``seconds``; there "factors" is part of
"statistics and factors".
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lordjax.allocation.measured_errors import WHOLE_KEPT
from lordjax.calibration.forward_pass import activation_keys
from lordjax.calibration.observers import observe_pair, sequences_per_step
from lordjax.calibration.statistics import Moments
from lordjax.compression.measured.held_out import group_of
from lordjax.compression.measured.temperature import TEMPERATURES
from lordjax.compression.sequential import sites_by_stage
from lordjax.compression.site_factors import site_work
from lordjax.forecast.calibration_cost import (
    blocks_ops,
    embedding_ops,
    forward_work,
    gradient_work,
    per_layer,
    site_inputs,
    statistics_shapes,
    target_shapes,
    weight_traffic,
)
from lordjax.forecast.job import STAGES, CompressionSpec
from lordjax.kernels import trees
from lordjax.kernels.base import nbytes
from lordjax.methods import method_at
from lordjax.models.objective import decides, decisions, losses
from lordjax.models.sites import LAST_LAYER, LINEAR_SITES, Site, site_path
from lordjax.runtime import flops
from lordjax.runtime.flops import OpCounts


def stages(spec: CompressionSpec) -> dict[str, OpCounts]:
    """Returns stage -> operation counts; a stage without operations is absent."""
    found = {name: Counter() for name in STAGES}
    block_bytes = nbytes(spec.block) * spec.config.num_layers
    found["gradients"] = gradient_work(spec)
    if spec.factors_first:
        found["statistics"] = forward_work(spec)
        found["statistics"].update(weight_traffic(block_bytes))
        found["factors"] = all_factors(spec)
    if spec.checks_errors:
        found["held-out check"] = _check(spec)
        changed = len(spec.trials) * nbytes(spec.block) + block_bytes  # sites, and a whole plan
        found["held-out check"].update(Counter(read=2 * block_bytes, put=2 * block_bytes + changed))
    if spec.chooses_temperature:
        found["comparison"] = _comparison(spec)
        found["comparison"].update(weight_traffic((1 + len(TEMPERATURES)) * block_bytes))
    if spec.is_sequential:
        found["sequential"] = _sequential(spec)
        found["sequential"].update(weight_traffic(block_bytes))
    found["apply"]["read"] += block_bytes + nbytes(spec.non_block_params)
    return {name: ops for name, ops in found.items() if ops}


def all_factors(spec: CompressionSpec, counts: Mapping[Site, int] | None = None) -> OpCounts:
    """Counts the factorizations of sites; sites of equal shapes share one compiled program.

    Args:
      spec: the job.
      counts: site -> in how many blocks it is factorized; None: in all blocks.
    """
    known: set[str] = set()
    found: OpCounts = Counter()
    counts = dict.fromkeys(spec.sites, spec.config.num_layers) if counts is None else counts
    for site, count in counts.items():
        name = method_at(spec.method, site.layer) if site.kind == "linear" else site.kind
        program = f"{name} {site_inputs(spec, site)}"
        ops = flops.scaled(site_factors(spec, site), count)
        found.update({k: n for k, n in ops.items() if k != "equations" or program not in known})
        known.add(program)
    return found


def site_factors(spec: CompressionSpec, site: Site) -> OpCounts:
    """Counts the factorization of a site in one block."""
    inputs = site_inputs(spec, site)
    return site_work(spec.method, site, *inputs, meshed=spec.meshed, folds=spec.folds)


def _check(spec: CompressionSpec) -> OpCounts:
    """Forward passes of every variant from its first changed block on, and of the original model.

    First the sites are measured, then a plan beside the original model again.
    """
    layers, trials = spec.config.num_layers, spec.trials
    blocks = 3 * layers + sum(layers - i for i, *_ in trials)
    found = _variants(spec, blocks / layers, 3 + len(trials), comparisons=2)
    fits = [_refit_flops(spec, fraction, group) for _, group, _, fraction in trials]
    fits.append(layers * _refit_flops(spec, WHOLE_KEPT))
    found["cholesky float64"] += round(sum(fits))
    return found


def _comparison(spec: CompressionSpec) -> OpCounts:
    """Forward passes of the original model and one model per temperature."""
    variants = len(TEMPERATURES) + 1
    found = _variants(spec, variants, variants)
    fits = len(TEMPERATURES) * spec.config.num_layers * _refit_flops(spec, spec.keep)
    found["cholesky float64"] += round(fits)
    return found


def _variants(spec: CompressionSpec, passes: float, heads: int, comparisons: int = 1) -> OpCounts:
    """Runs of all blocks on the held-out sequences, and evaluations of the head."""
    batch = sequences_per_step(spec.held_out, spec.length)
    with jax.default_matmul_precision("highest"):
        head = flops.count_ops(
            functools.partial(losses, spec.config),
            spec.non_block_params,
            spec.residual_stream(batch),
            target_shapes(spec, batch),
        )
        steps = [flops.scaled(blocks_ops(spec, batch, {}), passes), flops.scaled(head, heads)]
        if decides(spec.config):  # the targets
            decide, x = functools.partial(decisions, spec.config), spec.residual_stream(batch)
            ops = flops.count_ops(decide, spec.non_block_params, x)
            steps.append(flops.scaled(ops, comparisons))
    return flops.scaled(flops.merged(steps), spec.held_out / batch)


def _refit_flops(spec: CompressionSpec, keep: float, group: str | None = None) -> float:
    """FLOPs of the refits, on the host, of a block's modules at about ``keep`` of their width.

    Args:
      spec: the job.
      keep: fraction of the width.
      group: group of the modules, see `group_of`; None: all modules.
    """
    flat, count = trees.flatten(spec.block), 0.0
    for site in spec.sites:
        if site.kind in LAST_LAYER and group in (None, group_of(site_path(0, site))):
            fan_in, fan_out = flat[LAST_LAYER[site.kind]].shape
            count += (keep * fan_in) ** 2 * fan_out
    return count


def _sequential(spec: CompressionSpec) -> OpCounts:
    """A forward pass for every group of sites, and one through the compressed blocks."""
    corrective = spec.calibration_mode == "corrective"
    layers = spec.config.num_layers
    passes = flops.scaled(blocks_ops(spec, spec.batch, {}), 1 + corrective)
    found = [embedding_ops(spec, spec.batch), passes]
    factors = []
    for group in sites_by_stage(spec.definition, spec.config):
        fraction = sum(_has_ranks(spec, i, group) for i in range(layers)) / layers
        if not fraction:
            continue
        observed = [site for site in group if not corrective or site.kind != "linear"]
        if observed:
            keys = activation_keys(spec.block, tuple(observed), spec.definition)
            wanted = {key for names in keys.values() for key in names.values()}
            stats = {key: s for key, s in statistics_shapes(spec).items() if key in wanted}
            found.append(flops.scaled(blocks_ops(spec, spec.batch, stats, forward=False), fraction))
        if corrective:
            found.append(flops.scaled(per_layer(spec, _pair_ops(spec, group)), fraction))
        factors += [flops.scaled(site_factors(spec, site), fraction * layers) for site in group]
    steps = flops.scaled(flops.merged(found), (spec.sequences - spec.held_out) / spec.batch)
    return flops.merged([steps, *factors])


def _has_ranks(spec: CompressionSpec, i: int, group: tuple[Site, ...]) -> bool:
    """Whether block ``i`` compresses a site of the group; True while ranks are unknown."""
    if spec.ranks is None:
        return True
    return any(spec.ranks.get(site_path(i, site)) is not None for site in group)


def _pair_ops(spec: CompressionSpec, group: tuple[Site, ...]) -> Callable[[int | None], OpCounts]:
    """A program's operations that runs a dense block and its compressed version in lockstep."""
    flat = trees.flatten(spec.block)
    last = {LAST_LAYER.get(site.kind, site.path) for site in group}
    sites = [site for site in LINEAR_SITES if site.path in last]
    zeros = jax.eval_shape(
        lambda: (
            {s.output_tap: Moments.zeros(flat[s.path].shape[1]) for s in sites},
            {s.input_tap: Moments.zeros(flat[s.path].shape[0]) for s in sites},
            {f"{s.input_tap}|{s.output_tap}": jnp.zeros(flat[s.path].shape) for s in sites},
        )
    )

    def program(sliding_window: int | None) -> OpCounts:
        step = functools.partial(observe_pair, config=spec.config, sliding_window=sliding_window)
        x = spec.residual_stream(spec.batch)
        return flops.count_ops(step, (spec.block, spec.block), (x, x), None, *zeros)

    return program
