"""What a budget of a file's bytes leaves for the blocks, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lordjax.allocation.candidates import (
    FORMATS,
    QUANTIZERS,
    Candidate,
    candidate_bytes,
    ranks_tried,
)
from lordjax.allocation.plan import SiteSize
from lordjax.compression.whole_file.budget import least_bytes, share_in_file, too_small
from lordjax.compression.whole_file.tables import Tables
from lordjax.kernels import trees
from lordjax.methods import METHODS
from lordjax.models.config import ModelConfig
from lordjax.models.source import InMemory
from lordjax.models.tables import table_paths
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
