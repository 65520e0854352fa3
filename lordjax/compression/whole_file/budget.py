"""Budgets of bytes that count everything in the files with weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from lordjax.allocation.candidates import (
    Candidate,
    Table,
    array_count,
    candidate_bytes,
    solve,
)
from lordjax.allocation.knapsack import UnmetBudgetError
from lordjax.allocation.plan import Plan, SiteSize
from lordjax.compression.quantized_matrix import dense_dtype
from lordjax.compression.whole_file.tables import Tables, check_format
from lordjax.kernels import normal_float, trees
from lordjax.models.head_axes import ROPE_INDEX
from lordjax.models.sites import counted_sites
from lordjax.names import is_block_linear, layer
from lordjax.storage.tensor_files import header_bytes

if TYPE_CHECKING:
    from lordjax.compression.prepared import Prepared
    from lordjax.compression.quantizer import Quantizer

LEAST_KEEP = 1e-9  # where nothing is left, so that the error says what is needed
FILE_BYTES = 128  # of a file without arrays, at most: the rest of its header


def formats_of(chosen: Mapping[str, Candidate]) -> dict[str, str]:
    """Returns path -> format of the tables among some choices; dense ones are left out."""
    names = {p: c.dtype if c.form is None else str(c.form) for p, c in sorted(chosen.items())}
    return {p: name for p, name in names.items() if name is not None and not is_block_linear(p)}


def check_stored(
    keep: float | None,
    factors: str | None,
    embeddings: str | None,
    file_bytes: int | None,
    ranks: Mapping[str, int] | None,
) -> None:
    """Checks the budget of a low-rank method, and how its result is stored.

    Args:
      keep: see `low_rank.compress`; None: an elastic model, which has no budget.
      factors: see `low_rank.compress`.
      embeddings: see `low_rank.compress`.
      file_bytes: see `low_rank.compress`.
      ranks: see `low_rank.compress`.

    Raises:
      ValueError: if a format is unknown, or options are out of range or do not go together.
    """
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    if factors is not None:
        normal_float.Format.parse(factors)
    check_format(embeddings)
    if file_bytes is not None and (factors is not None or ranks is not None):
        what = "ranks" if factors is None else "factors"
        raise ValueError(
            f"file_bytes and {what} do not go together: file_bytes chooses ranks, of factors that "
            f"are not quantized; leave {what} out, or use method 'auto'"
        )


def check_outer(weighting: str, form: str | None, file_bytes: int | None) -> None:
    """Checks what a quantizing method does with embeddings and head.

    Args:
      weighting: a key of `WEIGHTINGS`.
      form: format of all tables; None: they stay, or a budget of bytes chooses.
      file_bytes: bytes of all files with weights; None: there is no such budget.

    Raises:
      ValueError: if the format is unknown, or a budget chooses for matrices and tables, but their
        errors have no common unit.
    """
    check_format(form)
    if file_bytes is not None and weighting == "input" and form is None:
        raise ValueError(
            "file_bytes with weighting 'input': errors of a layer's outputs do not compare with "
            "those of embeddings; use weighting 'both', or choose a format (embeddings)"
        )


def in_file(
    tables: Mapping[str, Table],
    shapes: Mapping[str, tuple[int, ...]],
    itemsizes: Mapping[str, int],
    factors: normal_float.Format | None,
) -> dict[str, Table]:
    """Returns tables of candidates whose sizes are all bytes that a file holds for them.

    Args:
      tables: path -> candidates of a matrix.
      shapes: path -> shape of the matrix.
      itemsizes: path -> bytes of a number that is not quantized.
      factors: format of the low-rank factors; None: they are not quantized.
    """

    def resized(path: str) -> Table:
        def size(candidate: Candidate) -> int:
            whole = candidate_bytes(candidate, shapes[path], itemsizes[path], factors)
            return whole + header_bytes(path, array_count(candidate, factors))

        return tables[path].resized(size)

    return {path: resized(path) for path in tables}


def least_bytes(others: Mapping[str, Any], dtype: Any | None) -> int:
    """Returns the bytes of a model's files that no choice of formats changes.

    Args:
      others: path -> shape and dtype of the parameters that stay as they are.
      dtype: dtype of floating-point numbers that are not quantized; None: as in ``others``.
    """

    def itemsize(leaf: Any) -> int:
        floating = dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.dtype(dtype if floating else leaf.dtype).itemsize

    arrays = sum(
        math.prod(leaf.shape) * itemsize(leaf) + header_bytes(path, 1)
        for path, leaf in others.items()
    )
    blocks = {path.split("/")[0] for path in others if path.startswith("layer_")}
    return arrays + FILE_BYTES * (1 + len(blocks))


def chosen_in_file(
    quantizer: Quantizer, budget: int, solver: str
) -> tuple[dict[str, Candidate], float]:
    """Chooses a candidate for every matrix and table: least predicted error within a file's bytes.

    Args:
      quantizer: the model with predicted errors.
      budget: bytes of all files with weights.
      solver: a key of `SOLVERS`.

    Returns:
      Path -> candidate, and the gap to the best possible error.

    Raises:
      ValueError: if the budget cannot be met, or a predicted error is not finite.
    """
    check_outer(quantizer.weighting, quantizer.embeddings, budget)
    leaves, dtype = quantizer.outer.leaves, quantizer.dtype
    shapes = quantizer.shapes | {path: leaf.shape for path, leaf in leaves.items()}
    sizes: dict[str, Any] = {path: leaf.dtype.itemsize for path, leaf in leaves.items()}
    sizes |= dict.fromkeys(quantizer.shapes, dense_dtype(dtype).itemsize)
    tables = quantizer.tables | quantizer.outer.options(quantizer.embeddings, quantizer.formats)
    tables = in_file(tables, shapes, sizes, quantizer.factors)
    fixed = least_bytes(quantizer.others, dtype)
    least = fixed + math.ceil(sum(table.sizes[0] for table in tables.values()))
    if least > budget:
        raise ValueError(too_small(budget, quantizer.method, least))
    return solve(tables, budget - fixed, solver)


class Share(NamedTuple):
    """What a file's bytes leave for the blocks' linear weights.

    Attributes:
      keep: fraction of the dense weights that fits; below 0 if nothing does.
      fixed: bytes of everything else.
      itemsize: bytes of a linear weight.
    """

    keep: float
    fixed: int
    itemsize: int


def share_in_file(
    tables: Tables,
    kinds: frozenset[str],
    sizes: Mapping[str, SiteSize],
    forms: Mapping[str, str],
    budget: int,
) -> Share:
    """Returns what a budget of bytes leaves for a low-rank method.

    Args:
      tables: the tables of the result.
      kinds: kinds of sites that the method compresses.
      sizes: site path -> its size.
      forms: path of a table -> its format; other tables stay.
      budget: bytes of all files with weights.
    """
    source, dtype = tables.source, tables.dtype
    counted = {k for site in counted_sites(kinds, source.config).values() for k in site.kernels}
    outside = trees.flatten(source.non_block_params()).items()
    others = {path: leaf for path, leaf in outside if path not in tables.leaves}
    itemsize, headers = 0, 0
    for i in range(source.config.num_layers):
        for path, leaf in trees.flatten(source.block(i)).items():
            if path in counted:
                headers += header_bytes(f"{layer(i)}/{path}", 3)  # a pair, and a bias
                itemsize = max(itemsize, jnp.dtype(dtype or leaf.dtype).itemsize)
            else:
                others[f"{layer(i)}/{path}"] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        if "qk" in kinds:  # which rotary pairs are kept
            pairs = (source.config.num_kv_heads, source.config.head_size // 2)
            others[f"{layer(i)}/{ROPE_INDEX}"] = jax.ShapeDtypeStruct(pairs, jnp.int32)
    fixed = least_bytes(others, dtype) + tables.nbytes(forms) + headers
    dense = itemsize * sum(size.dense for size in sizes.values())
    return Share(min((budget - fixed) / dense, 1.0), fixed, itemsize)


def plan_in_file(
    prepared: Prepared, tables: Tables, forms: Mapping[str, str], budget: int, **options: Any
) -> Plan:
    """Returns the plan of a low-rank method for the bytes of all files with weights.

    What the blocks' linear weights may take is what everything else leaves of the budget.

    Args:
      prepared: the factors.
      tables: the tables of the result.
      forms: path of a table -> its format; other tables stay.
      budget: bytes of all files with weights.
      **options: keyword arguments of `Prepared.plan`.

    Raises:
      ValueError: if the budget cannot be met; see also `Prepared.plan`.
    """
    share = share_in_file(tables, prepared.definition.kinds, prepared.sizes, forms, budget)
    try:
        return prepared.plan(max(share.keep, LEAST_KEEP), **options)
    except UnmetBudgetError as error:
        least = share.fixed + math.ceil(share.itemsize * error.least)
        raise ValueError(too_small(budget, prepared.method, least)) from error


def too_small(budget: int, method: str, least: int) -> str:
    """Returns what an error says about a budget that cannot be met."""
    return (
        f"files of {budget:,} bytes cannot be met: with method {method!r} the weights need at "
        f"least {least:,} bytes; ask for more, or choose a smaller format of embeddings and head"
    )
