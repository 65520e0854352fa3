"""Operation counts of a quantization, stage by stage, from shapes alone.

The solver's choice depends on the weights. Without the weights `estimate` approximates it: it mixes
the formats closest to the budget.
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
from lordjax.calibration.observers import sequences_per_step
from lordjax.compression.measured import scale_search
from lordjax.compression.measured.held_out import group_of
from lordjax.compression.quantized_matrix import best_pair, encode_kernel, measures, pack
from lordjax.forecast.calibration_cost import (
    blocks_ops,
    embedding_ops,
    forward_work,
    gradient_work,
    site_inputs,
    target_shapes,
    weight_traffic,
)
from lordjax.forecast.job import CalibrationSpec
from lordjax.forecast.shapes import Candidates, kernel_shapes
from lordjax.kernels import normal_float
from lordjax.kernels.base import materialize, nbytes
from lordjax.methods import Method
from lordjax.methods.quantized.best_product import FIRST_POWERS, start_basis
from lordjax.methods.quantized.error_feedback import make_feedback
from lordjax.methods.quantized.lq import STEPS, decompose
from lordjax.methods.quantized.predicted_loss import predict
from lordjax.methods.quantized.weightings import WEIGHTINGS, Weights, make_weights, weighting_method
from lordjax.models.divergence import divergences
from lordjax.models.sites import Site, site_path
from lordjax.runtime import flops
from lordjax.runtime.flops import OpCounts

MIDDLE_RANK = 16  # rank that the solver gave most matrices of SmolLM2


@dataclasses.dataclass(frozen=True)
class QuantizationSpec(CalibrationSpec):
    """A job of `lordjax.quantize`; ``method`` is a key of `QUANTIZERS`.

    All statistics are taken on the original model.

    Attributes:
      weighting: a key of `WEIGHTINGS`.
      options: site path -> what the matrix becomes.
      chosen: whether a budget chooses ``options``, which needs predicted losses.
      rank: rank of all low-rank terms, where no budget chooses it.
      feedback: whether quantization compensates errors (GPTQ).
      factors: format of the low-rank factors; None: they are stored in ``dtype``.
      dtype: dtype of the blocks' arrays that are not quantized.
    """

    weighting: str = "none"
    options: Candidates = dataclasses.field(default_factory=dict, hash=False)
    chosen: bool = False
    rank: int | None = None
    feedback: bool = False
    factors: normal_float.Format | None = None
    dtype: str = "float16"

    @property
    def needs_sequences(self) -> bool:
        """Whether the weighting needs calibration sequences."""
        return bool(WEIGHTINGS[self.weighting])

    @property
    def compensates(self) -> bool:
        """Whether quantization compensates errors (GPTQ)."""
        return self.feedback

    @property
    def definition(self) -> Method:
        """The statistics of the weighting."""
        return weighting_method(self.weighting)

    @property
    def cross_fits(self) -> bool:
        """Whether errors are cross-fitted: those of quantized weights are not."""
        return False

    @property
    def measures_search(self) -> bool:
        """Whether it is measured if scales are searched."""
        return scale_search.measures_search(
            self.sequences if self.needs_sequences else 0,
            self.config.head,
            feedback=self.feedback,
            masked=False,
        )

    @property
    def reads_inputs(self) -> bool:
        """Whether a forward pass collects statistics of the sites' inputs."""
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
    """Returns about what a budget gives every matrix: the smallest format, then larger ones.

    Args:
      shapes: site path -> ``[in, out]``.
      method: a key of `QUANTIZERS`.
      budget: bytes of all matrices together.
      rank: rank of all low-rank terms, where the method does not choose it.
      factors: format of the low-rank factors; None: they are not quantized.
      itemsize: bytes of a number that is not quantized.
      formats: formats to choose from.

    Raises:
      ValueError: if the smallest formats do not fit.
    """
    counts_low_rank = QUANTIZERS[method].counts_low_rank
    largest_rank = MIDDLE_RANK if counts_low_rank else rank or 0

    def candidate(path: str, form: normal_float.Format) -> Candidate:
        fits = [r for r in ranks_tried(method, rank, shapes[path])[0] if r <= largest_rank]
        return Candidate(form, max(fits, default=0) or None)

    def size(path: str, form: normal_float.Format) -> int:
        made = candidate(path, form)
        return candidate_bytes(made, shapes[path], itemsize, factors, low_rank=counts_low_rank)

    def left_by_smallest() -> float:
        return budget - sum(size(path, rising[0]) for path in shapes)

    some = next(iter(shapes))
    rising = sorted(formats, key=lambda form: size(some, form))
    if left_by_smallest() < 0 and counts_low_rank:
        largest_rank = 0  # low-rank terms are given up first
    left, found = left_by_smallest(), dict.fromkeys(shapes, rising[0])
    # Where ranks are chosen, a low-rank term alone may still be smaller than any format.
    if left < 0 and not counts_low_rank:
        count = sum(math.prod(shape) for shape in shapes.values())
        raise ValueError(
            f"{8 * budget / count:.4g} bits per weight cannot be met: method {method!r} needs at "
            f"least {8 * (budget - left) / count:.4g}; ask for more (--bits, --budget-bytes)"
        )
    for form in rising[1:]:
        for path in found:
            more = size(path, form) - size(path, found[path])
            if more <= left:
                found[path], left = form, left - more
    return {path: candidate(path, form) for path, form in found.items()}


def quantized_stages(spec: QuantizationSpec) -> dict[str, OpCounts]:
    """Returns stage -> operation counts; a stage without operations is absent."""
    names = ("gradients", scale_search.STAGE, "predictions", "decomposition", "apply")
    found: dict[str, OpCounts] = {name: Counter() for name in names}
    block_bytes = nbytes(spec.block) * spec.config.num_layers
    found["gradients"] = gradient_work(spec)
    if spec.measures_search:
        found[scale_search.STAGE] = _scale_search(spec)
        changed = len(scale_search.WAYS) * _measured_blocks(spec) * nbytes(spec.block)
        found[scale_search.STAGE].update(
            Counter(read=2 * block_bytes, put=2 * block_bytes + changed)
        )
    weights = _error_weights(spec, spec.sites, spec.config.num_layers)
    if spec.chosen:
        found["predictions"] = flops.merged([weights, _predictions(spec)])
        found["predictions"].update(weight_traffic(block_bytes))
    found["decomposition"] = flops.merged([weights, _decompositions(spec)])
    found["decomposition"].update(weight_traffic(block_bytes))
    found["decomposition"]["read"] += block_bytes
    found["apply"]["read"] += nbytes(spec.non_block_params)
    return {name: ops for name, ops in found.items() if ops}


def weighted_site(spec: QuantizationSpec, site: Site) -> tuple[Any, Weights]:
    """Returns shapes of a matrix and of its error weights."""
    kernel, stats = site_inputs(spec, site)
    return kernel, weight_shapes(kernel, stats, feedback=spec.feedback)


def weight_shapes(kernel: Any, stats: Any, *, feedback: bool) -> Weights:
    """Returns shapes of a matrix's error weights.

    Args:
      kernel: shape of the matrix.
      stats: shapes of its statistics.
      feedback: whether later weights compensate for the errors of earlier ones.
    """
    found = jax.eval_shape(make_weights, kernel, stats)
    if not feedback:
        return found
    return found._replace(feedback=jax.eval_shape(make_feedback, found.inputs))


def weight_ops(kernel: Any, stats: Any, *, feedback: bool) -> OpCounts:
    """Returns the operations of `weight_shapes`; the arguments are the same."""
    found = [flops.count_ops(make_weights, kernel, stats)]
    if feedback:
        moment = jax.eval_shape(make_weights, kernel, stats).inputs
        found.append(flops.count_ops(make_feedback, moment))
    return flops.merged(found)


def _measured_blocks(spec: QuantizationSpec) -> int:
    """Number of blocks that are quantized to choose how scales are found."""
    return len(scale_search.measured_blocks(spec.config.num_layers))


def _scale_search(spec: QuantizationSpec) -> OpCounts:
    """Some blocks quantized in both ways, and runs of the models on some sequences."""
    ways, blocks = len(scale_search.WAYS), _measured_blocks(spec)
    sites = [s for s in spec.sites if group_of(site_path(0, s)) == scale_search.MEASURED]
    found = [_error_weights(spec, sites, blocks)]
    form = normal_float.Format.parse(scale_search.FORMAT)
    for site in sites:
        kernel, error_weights = weighted_site(spec, site)
        program = functools.partial(encode_kernel, form=form)
        ops = [flops.count_ops(program, kernel, error_weights)]
        new = kernel_shapes(kernel.shape, Candidate(form, None), spec.dtype, None)
        ops.append(flops.count_ops(materialize, new))
        found.append(flops.scaled(flops.merged(ops), ways * blocks))
    count = min(scale_search.SEQUENCES, spec.sequences)
    batch = sequences_per_step(count, spec.length)
    x, rest = spec.residual_stream(batch), spec.non_block_params
    with jax.default_matmul_precision("highest"):
        program = functools.partial(divergences, spec.config)
        head = flops.count_ops(program, rest, rest, x, x, target_shapes(spec, batch))
        steps = [embedding_ops(spec, batch), flops.scaled(head, ways)]
        steps.append(flops.scaled(blocks_ops(spec, batch, {}), 1 + ways))
    return flops.merged([*found, flops.scaled(flops.merged(steps), count / batch)])


def _error_weights(spec: QuantizationSpec, sites: Sequence[Site], blocks: int) -> OpCounts:
    """A pass over the blocks that computes the error weights of some sites in some blocks."""
    found = [forward_work(spec)] if spec.reads_inputs else []
    for site in sites:
        ops = weight_ops(*site_inputs(spec, site), feedback=spec.feedback)
        found.append(flops.scaled(ops, blocks))
    return flops.merged(found)


def _predictions(spec: QuantizationSpec) -> OpCounts:
    """Predicted losses of all matrices; matrices of equal shapes share compiled programs."""
    found: list[OpCounts] = []
    weighted = [weighted_site(spec, site) for site in spec.sites]
    counts = Counter(map(str, weighted))
    for name, (kernel, error_weights) in {str(pair): pair for pair in weighted}.items():
        with_format, without_format = ranks_tried(spec.method, spec.rank, kernel.shape)
        program = functools.partial(predict, forms=FORMATS, ranks=with_format)
        tables = [flops.count_ops(program, kernel, error_weights)]
        if without_format:
            program = functools.partial(predict, forms=(None,), ranks=without_format)
            tables.append(flops.count_ops(program, kernel, error_weights))
        found.append(flops.scaled(flops.merged(tables), counts[name] * spec.config.num_layers))
    return flops.merged(found)


def _decompositions(spec: QuantizationSpec) -> OpCounts:
    """All matrices decomposed; those of equal shapes and formats share compiled programs."""
    width = max((o.rank for o in spec.options.values() if o.rank is not None), default=1)
    counts: Counter[str] = Counter()
    kinds: dict[str, tuple[Any, Weights, Candidate]] = {}
    for site in spec.sites:
        kernel, error_weights = weighted_site(spec, site)
        for i in range(spec.config.num_layers):
            candidate = spec.options[site_path(i, site)]
            name = f"{kernel} {error_weights} {candidate}"
            counts[name] += 1
            kinds[name] = kernel, error_weights, candidate
    return flops.merged(
        [
            flops.scaled(_decomposition(spec, *kinds[name], width=width), count)
            for name, count in counts.items()
        ]
    )


def _decomposition(
    spec: QuantizationSpec,
    kernel: Any,
    error_weights: Weights,
    candidate: Candidate,
    *,
    width: int,
) -> OpCounts:
    """One matrix decomposed, and the errors of the result."""
    form, found = candidate.form, []
    rank = jax.ShapeDtypeStruct((), jnp.int32)
    if form is not None and candidate.rank is not None:
        run = functools.partial(decompose, form=form, width=width, steps=STEPS)
        codes = jax.eval_shape(run, kernel, rank, error_weights).codes
        found += [flops.count_ops(run, kernel, rank, error_weights)]
        found += [flops.count_ops(functools.partial(pack, form=form), codes)]
    elif form is not None:
        run = functools.partial(encode_kernel, form=form)
        found += [flops.count_ops(run, kernel, error_weights)]
    elif candidate.rank is not None:
        run = functools.partial(best_pair, width=width, powers=FIRST_POWERS)
        basis = jax.eval_shape(lambda: start_basis(kernel.shape, width))
        found += [flops.count_ops(run, kernel, rank, error_weights, basis)]
    new = kernel_shapes(kernel.shape, candidate, spec.dtype, spec.factors)
    found += [flops.count_ops(materialize, new)]
    found += [flops.count_ops(measures, kernel, kernel, error_weights)]
    return flops.merged(found)
