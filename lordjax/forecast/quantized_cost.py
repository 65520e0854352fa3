"""The work of quantising a model, stage by stage, and its shapes: `stages` for codes.

What a budget chooses depends on the weights; without them `estimate` mixes the formats next to it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lordjax.allocation.candidates import (
    FORMATS,
    QUANTIZERS,
    Candidate,
    candidate_bytes,
    ranks_tried,
)
from lordjax.compression.quantized_matrix import best_pair, encode_kernel, measures, pack
from lordjax.forecast.job import CompressionSpec
from lordjax.forecast.low_rank_cost import forward_work, gradient_work, inputs, loaded
from lordjax.forecast.shapes import Candidates, kernel_shapes
from lordjax.kernels import normal_float
from lordjax.kernels.base import materialize, nbytes
from lordjax.methods import Method
from lordjax.methods.quantized.best_product import FIRST_POWERS, start_basis
from lordjax.methods.quantized.error_feedback import feedback_of
from lordjax.methods.quantized.lq import STEPS, decompose
from lordjax.methods.quantized.predicted_loss import predict
from lordjax.methods.quantized.weightings import WEIGHTINGS, Weights, cost_of, statistics_of
from lordjax.models.sites import Site, site_path
from lordjax.runtime import flops
from lordjax.runtime.flops import OpCounts

MIDDLE_RANK = 16  # of products where a solver chooses: what it gave most matrices (SmolLM2)


@dataclasses.dataclass(frozen=True)
class QuantizationSpec(CompressionSpec):
    """What `quantize` is asked for; ``method`` is a key of `QUANTIZERS`.

    Attributes:
      weighting: a key of `WEIGHTINGS`.
      options: site path -> what the matrix becomes.
      chosen: whether a budget chooses them, which needs predictions.
      rank: of all products, where no budget chooses it.
      feedback: whether codes make up for each other's errors.
      factors: format of the products' factors; None: ``dtype``.
      dtype: of the blocks' numbers that are no codes.
    """

    weighting: str = "none"
    options: Candidates = dataclasses.field(default_factory=dict, hash=False)
    chosen: bool = False
    rank: int | None = None
    feedback: bool = False
    factors: normal_float.Format | None = None
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if WEIGHTINGS[self.weighting]:  # else no windows are read
            super().__post_init__()

    @property
    def row(self) -> Method:
        """The weighting as a method."""
        return statistics_of(self.weighting)

    @property
    def policy(self) -> str:
        """None of those of ranks."""
        return "uniform"

    @property
    def walks(self) -> bool:
        """All statistics are those of the untouched model."""
        return False

    @property
    def batch(self) -> int:
        """Windows of a step, if any are read."""
        return super().batch if self.windows else 1

    @property
    def reads(self) -> bool:
        """Whether a pass over the blocks collects anything."""
        return "inputs" in WEIGHTINGS[self.weighting]


def estimate(
    shapes: Mapping[str, tuple[int, ...]],
    method: str,
    budget: float,
    rank: int | None,
    factors: normal_float.Format | None,
    itemsize: int,
    formats: Sequence[normal_float.Format] = FORMATS,
) -> dict[str, Candidate]:
    """About what a budget of so many bytes gives: small formats, then larger ones while they fit.

    Raises:
      ValueError: if the smallest formats do not fit.
    """
    all_in = QUANTIZERS[method].counts_low_rank
    most = MIDDLE_RANK if all_in else rank or 0

    def option(path: str, form: normal_float.Format) -> Candidate:
        fits = [r for r in ranks_tried(method, rank, shapes[path])[0] if r <= most]
        return Candidate(form, max(fits, default=0) or None)

    def size(path: str, form: normal_float.Format) -> int:
        made = option(path, form)
        return candidate_bytes(made, shapes[path], itemsize, factors, low_rank=all_in)

    def least() -> float:
        return budget - sum(size(path, rising[0]) for path in shapes)

    some = next(iter(shapes))
    rising = sorted(formats, key=lambda form: size(some, form))
    if least() < 0 and all_in:
        most = 0  # products are given up first
    left, found = least(), dict.fromkeys(shapes, rising[0])
    if left < 0 and not all_in:  # else low rank without codes may be smaller still
        count = sum(math.prod(shape) for shape in shapes.values())
        raise ValueError(
            f"{8 * budget / count:.4g} bits per weight cannot be met: method {method!r} needs at "
            f"least {8 * (budget - left) / count:.4g}; ask for more"
        )
    for form in rising[1:]:
        for path in found:
            more = size(path, form) - size(path, found[path])
            if more <= left:
                found[path], left = form, left - more
    return {path: option(path, form) for path, form in found.items()}


def quantized_stages(job: QuantizationSpec) -> dict[str, OpCounts]:
    """Stage -> its work; stages without any are absent."""
    found = {name: Counter() for name in ("gradients", "predictions", "decomposition", "apply")}
    weights = nbytes(job.block) * job.config.num_layers
    found["gradients"] = gradient_work(job)
    if job.chosen:
        found["predictions"] = flops.merged([_walk(job), _predictions(job)])
        found["predictions"].update(loaded(weights))
    found["decomposition"] = flops.merged([_walk(job), _decompositions(job)])
    found["decomposition"].update(loaded(weights))
    found["decomposition"]["read"] += weights
    found["apply"]["read"] += nbytes(job.non_block_params)
    return {name: ops for name, ops in found.items() if ops}


def weights_of(job: QuantizationSpec, site: Site) -> tuple[Any, Weights]:
    """Shapes of a matrix and of what its errors cost."""
    kernel, stats = inputs(job, site)
    cost = jax.eval_shape(cost_of, kernel, stats)
    if not job.feedback:
        return kernel, cost
    return kernel, cost._replace(feedback=jax.eval_shape(feedback_of, cost.inputs))


def _walk(job: QuantizationSpec) -> OpCounts:
    """A pass over the blocks that finds out what errors cost."""
    found = [forward_work(job)] if job.reads else []
    layers = job.config.num_layers
    for site in job.sites:
        kernel, stats = inputs(job, site)
        found.append(flops.scaled(flops.count_ops(cost_of, kernel, stats), layers))
        if job.feedback:
            cost = jax.eval_shape(cost_of, kernel, stats)
            found.append(flops.scaled(flops.count_ops(feedback_of, cost.inputs), layers))
    return flops.merged(found)


def _predictions(job: QuantizationSpec) -> OpCounts:
    """Tables of all matrices; those of equal shapes share programs."""
    found: list[OpCounts] = []
    counts = Counter(str(weights_of(job, site)) for site in job.sites)
    shapes = {str(weights_of(job, site)): weights_of(job, site) for site in job.sites}
    for name, (kernel, cost) in shapes.items():
        above, alone = ranks_tried(job.method, job.rank, kernel.shape)
        works = [
            flops.count_ops(functools.partial(predict, forms=FORMATS, ranks=above), kernel, cost)
        ]
        if alone:
            program = functools.partial(predict, forms=(None,), ranks=alone)
            works.append(flops.count_ops(program, kernel, cost))
        found.append(flops.scaled(flops.merged(works), counts[name] * job.config.num_layers))
    return flops.merged(found)


def _decompositions(job: QuantizationSpec) -> OpCounts:
    """All matrices as their options say; those of equal shapes and formats share programs."""
    width = max((o.rank for o in job.options.values() if o.rank is not None), default=1)
    counts: Counter[str] = Counter()
    shapes: dict[str, tuple[Any, Weights, Candidate]] = {}
    for site in job.sites:
        kernel, cost = weights_of(job, site)
        for i in range(job.config.num_layers):
            option = job.options[site_path(i, site)]
            name = f"{kernel} {cost} {option}"
            counts[name] += 1
            shapes[name] = kernel, cost, option
    return flops.merged(
        [
            flops.scaled(_decomposition(job, *shapes[name], width=width), count)
            for name, count in counts.items()
        ]
    )


def _decomposition(
    job: QuantizationSpec, kernel: Any, cost: Weights, option: Candidate, *, width: int
) -> OpCounts:
    """Of one matrix, with what is measured of the result."""
    form, found = option.form, []
    rank = jax.ShapeDtypeStruct((), jnp.int32)
    if form is not None and option.rank is not None:
        run = functools.partial(decompose, form=form, width=width, steps=STEPS)
        codes = jax.eval_shape(run, kernel, rank, cost).codes
        found += [flops.count_ops(run, kernel, rank, cost)]
        found += [flops.count_ops(functools.partial(pack, form=form), codes)]
    elif form is not None:
        found += [
            flops.count_ops(functools.partial(encode_kernel, form=form), kernel, cost.feedback)
        ]
    elif option.rank is not None:
        run = functools.partial(best_pair, width=width, powers=FIRST_POWERS)
        basis = jax.eval_shape(lambda: start_basis(kernel.shape, width))
        found += [flops.count_ops(run, kernel, rank, cost, basis)]
    new = kernel_shapes(kernel.shape, option, job.dtype, job.factors)
    found += [flops.count_ops(materialize, new), flops.count_ops(measures, kernel, kernel, cost)]
    return flops.merged(found)
