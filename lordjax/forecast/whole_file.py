"""The matrices outside the blocks, from shapes alone: their cost, and what they leave of a file."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

from lordjax.allocation.candidates import (
    FORMATS,
    QUANTIZERS,
    Candidate,
    candidate_bytes,
    ranks_tried,
)
from lordjax.allocation.plan import SiteSize
from lordjax.calibration.observers import sequences_per_step
from lordjax.calibration.statistics import MeanSquare, SecondMoment
from lordjax.calibration.table_statistics import Ends
from lordjax.compression.quantized_matrix import encode_kernel, measures
from lordjax.compression.whole_file.budget import least_bytes, share_in_file, too_small
from lordjax.compression.whole_file.tables import WINDOWS, Tables, has_loss
from lordjax.forecast.calibration_cost import backward_work, target_shapes, token_shapes
from lordjax.forecast.job import CalibrationSpec
from lordjax.forecast.quantized_cost import weight_ops, weight_shapes
from lordjax.forecast.shapes import kernel_shapes
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import materialize
from lordjax.kernels.table import parse
from lordjax.methods import METHODS
from lordjax.methods.quantized.predicted_loss import predict
from lordjax.methods.quantized.weightings import Weights
from lordjax.models.config import ModelConfig
from lordjax.models.source import InMemory
from lordjax.models.tables import as_kernel, table_paths
from lordjax.runtime import flops
from lordjax.runtime.flops import OpCounts
from lordjax.storage.store import MemoryStore
from lordjax.storage.tensor_files import header_bytes

# Arrays of a quantized matrix; and of one that may have a low-rank term, on average.
QUANTIZED_ARRAYS, ARRAYS = 4, 8


def tables_of(source: InMemory) -> Tables:
    """Returns the tables of a model's shapes, in the dtypes that are stored."""
    return Tables(source, None, None, MemoryStore(), {})


def estimated_tables(
    config: ModelConfig, source: InMemory, embeddings: str | None, budget: int | None
) -> dict[str, str]:
    """Returns about which formats tables get.

    Args:
      config: architecture of the model.
      source: shapes of the model.
      embeddings: format of all tables; None: the budget chooses.
      budget: bytes of all files with weights; None: there is no such budget.
    """
    if embeddings is not None or budget is None:
        return tables_of(source).all_in(embeddings)
    count = sum(math.prod(leaf.shape) for leaf in trees.flatten(source.params).values())
    fitting = [form for form in FORMATS if form.bits_per_weight <= 8 * budget / count]
    form = max(fitting or FORMATS[:1], key=lambda form: form.bits_per_weight)
    return dict.fromkeys(table_paths(config), str(form))


def matrix_bytes(
    source: InMemory,
    shapes: Mapping[str, tuple[int, ...]],
    forms: Mapping[str, str],
    given: Mapping[str, Any],
    budget: int,
) -> int:
    """Returns the bytes that a file's budget leaves for the matrices of a quantizing method.

    Args:
      source: shapes of the model, in the dtypes that are stored.
      shapes: site path -> shape of the matrix.
      forms: path of a table -> its format.
      given: ``method``; ``rank`` and ``factors`` of its low-rank terms; ``itemsize`` of numbers
        that are not quantized.
      budget: bytes of all files with weights.

    Raises:
      ValueError: if the smallest matrices do not fit.
    """
    tables = tables_of(source)
    flat = trees.flatten(source.params)
    others = {p: leaf for p, leaf in flat.items() if p not in shapes and p not in tables.leaves}
    fixed = least_bytes(others, None) + tables.nbytes(forms)
    plain = given["rank"] is None and not QUANTIZERS[given["method"]].counts_low_rank
    arrays = QUANTIZED_ARRAYS if plain else ARRAYS
    fixed += sum(header_bytes(path, arrays) for path in shapes)
    least = sum(_least(shape, given) for shape in shapes.values())
    if fixed + least > budget:
        raise ValueError(too_small(budget, given["method"], fixed + least))
    return budget - fixed


def _least(shape: tuple[int, ...], given: Mapping[str, Any]) -> int:
    """Returns the bytes of the smallest candidate of a matrix."""
    beside, alone = ranks_tried(given["method"], given["rank"], shape)
    ways = [Candidate(FORMATS[0], min(beside) or None), *(Candidate(None, r) for r in alone)]
    return min(candidate_bytes(way, shape, given["itemsize"], given["factors"]) for way in ways)


def keep_by_shapes(
    source: InMemory,
    method: str,
    sizes: Mapping[str, SiteSize],
    embeddings: str | None,
    budget: int,
) -> float:
    """Returns the fraction of the block linear weights that a file's bytes leave room for.

    Args:
      source: shapes of the model, in the dtypes that are stored.
      method: a key of `METHODS`.
      sizes: site path -> its size.
      embeddings: format of all tables; None: they stay as they are.
      budget: bytes of all files with weights.

    Raises:
      ValueError: if everything else is larger.
    """
    tables = tables_of(source)
    forms = tables.all_in(embeddings)
    share = share_in_file(tables, METHODS[method].kinds, sizes, forms, budget)
    if share.keep <= 0:
        raise ValueError(too_small(budget, method, share.fixed))
    return share.keep


def coded_tables(spec: CalibrationSpec) -> dict[str, tuple[Any, Weights, normal_float.Format]]:
    """Returns path of a quantized table -> shapes of its kernel and error weights, and its format.

    Args:
      spec: the job.
    """
    found, flat = {}, trees.flatten(spec.non_block_params)
    for path, text in spec.tables.items():
        form = parse(text)
        if isinstance(form, normal_float.Format):
            kernel = jax.eval_shape(functools.partial(as_kernel, path), flat[path])
            found[path] = kernel, _table_weights(spec, kernel), form
    return found


def _statistics(kernel: Any) -> dict[str, Any]:
    """Returns shapes of the statistics of a table; see `table_statistics.Ends`."""
    fan_in, fan_out = kernel.shape
    return jax.eval_shape(
        lambda: {
            "weighted_inputs": SecondMoment.zeros(fan_in),
            "weighted_squares": MeanSquare.zeros(fan_out),
        }
    )


def _table_weights(spec: CalibrationSpec, kernel: Any) -> Weights:
    """Returns shapes of the error weights of a table."""
    if not table_sequences(spec)[0]:
        return Weights()
    return weight_shapes(kernel, _statistics(kernel), feedback=spec.compensates)


def table_sequences(spec: CalibrationSpec) -> tuple[int, int]:
    """Returns how many sequences the statistics of tables are taken on, and how many at a time."""
    named = [isinstance(parse(text), str) for text in spec.tables.values()]
    if all(named) or not spec.needs_sequences or not has_loss(spec.config):
        return 0, 1
    available = spec.sequences - spec.held_out
    count, step = min(WINDOWS, available), sequences_per_step(spec.sequences, spec.length)
    step = min(step, available // spec.folds) if spec.folds > 1 else step
    return count, min(count, max(1, step // 2))


def _ends(config: ModelConfig, rest: Any, x: Any, goals: Any, tokens: Any) -> Any:
    """The sums at both ends of the model of a batch; see `table_statistics.Ends`."""
    ends = Ends(config, rest)
    ends.last(rest, x, goals)
    ends.first(rest, tokens, None, x)
    return ends.head, ends.embeddings


def end_sums(spec: CalibrationSpec) -> Any:
    """Returns shapes of the sums at both ends of the model."""
    x = spec.residual_stream(1)
    given = spec.non_block_params, x, target_shapes(spec, 1), token_shapes(spec, 1)
    return jax.eval_shape(functools.partial(_ends, spec.config), *given)


def table_stages(spec: CalibrationSpec) -> dict[str, OpCounts]:
    """Returns the operations that tables add to the stages of a job.

    ``tables`` are their statistics and the predicted losses of their formats; quantized tables are
    made in ``apply``.

    Args:
      spec: the job.
    """
    sequences, batch = table_sequences(spec)
    found: list[OpCounts] = []
    if sequences:
        x, rest = spec.residual_stream(batch), spec.non_block_params
        given = rest, x, target_shapes(spec, batch), token_shapes(spec, batch)
        ends = flops.count_ops(functools.partial(_ends, spec.config), *given)
        found.append(backward_work(spec, sequences, batch, {}, {}))
        found.append(flops.scaled(ends, sequences / batch))
    made: list[OpCounts] = []
    for kernel, weights, form in coded_tables(spec).values():
        own = []
        if sequences:
            own.append(weight_ops(kernel, _statistics(kernel), feedback=spec.compensates))
        if spec.chooses_tables:
            program = functools.partial(predict, forms=FORMATS, ranks=(0,))
            found += [*own, flops.count_ops(program, kernel, weights)]
        new = kernel_shapes(kernel.shape, Candidate(form, None), "float32", None)
        encode = functools.partial(encode_kernel, form=form)
        made += [*own, flops.count_ops(encode, kernel, weights)]
        made += [flops.count_ops(materialize, new)]
        made += [flops.count_ops(measures, kernel, kernel, weights)]
    both = {"tables": flops.merged(found), "apply": flops.merged(made)}
    return {name: ops for name, ops in both.items() if ops}
