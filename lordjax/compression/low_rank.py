"""Low-rank compression of a model: prepare once, then compress to any budget.

At any time the statistics of one block are in memory, besides the hidden states of the calibration
tokens and the factors found so far::

    prepare(source, tokens, method) -> Prepared      statistics and factors for all ranks, once
    Prepared.compress(keep)         -> Result        allocation and slicing, cheap, any budget
    compress(source, tokens, ...)   -> Result        both

Methods that calibrate on the compressed blocks before (ROM) know their inputs only once the ranks
of those blocks are fixed. For them ``Prepared.compress`` runs over the model again (`sequential`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lordjax import names
from lordjax.allocation.plan import Plan, SiteSize
from lordjax.allocation.policies import (
    CURVELESS,
    GIVEN,
    INFLUENCED,
    TILE,
    check_policy,
    ranks_by_pattern,
)
from lordjax.calibration.backward_pass import few_gradients
from lordjax.calibration.calibration_settings import (
    GRADIENT_WINDOWS,
    CalibrationSettings,
    check_positive,
)
from lordjax.compression.measured.held_out import check
from lordjax.compression.prepared import Prepared
from lordjax.compression.result import Result
from lordjax.compression.single_pass import factor_all
from lordjax.compression.site_factors import AnyFactors, site_sizes
from lordjax.compression.whole_file.budget import check_stored
from lordjax.conversions.families.config.resize import can_describe
from lordjax.kernels import trees
from lordjax.methods import DEFAULT_METHOD, METHODS, SHAPES, method_of_shape, shape_of
from lordjax.models.config import ModelConfig
from lordjax.models.source import InMemory, Materialized, Source
from lordjax.models.stock import HEADS, MLP, blocks_are_alike
from lordjax.models.tables import table_paths
from lordjax.runtime.mesh import Mesh
from lordjax.runtime.progress import Clock, Progress
from lordjax.storage.store import Store

# Calibration sequences that choose a temperature, and that check predicted errors; 4 choose the
# same temperature (docs, tried).
HELD_OUT = 2
WIDTHS = 4  # fewest multiples that an MLP's width must have
# With fewer multiples than this in an MLP's width, stock widths are multiples of 32: the least that
# every engine's blocks of weights divide (those of GGUF's Q8_0 have 32).
FINE_WIDTHS, NARROW_MULTIPLE = 64, 32
LEAST_CHECKED = 8  # with fewer calibration sequences predicted errors are not checked
PREFIXES = ("dense", "compressed", "corrective")

__all__ = ["InMemory", "Prepared", "Result", "Source", "compress", "prepare"]


def check_method(name: str) -> None:
    """Raises KeyError with a suggestion if there is no such method."""
    if name not in METHODS:
        raise KeyError(f"no method {name!r}; {names.did_you_mean(name, METHODS)}")


def _check_prefix(method: str, prefix: str) -> None:
    """Raises ValueError if the prefix is unknown or the method cannot use it."""
    if prefix not in PREFIXES:
        raise ValueError(f"prefix must be one of {', '.join(PREFIXES)}, got {prefix!r}")
    if prefix == "corrective" and "abs_mean" in METHODS[method].needs:
        raise ValueError(
            f"method {method!r} has no corrective target, because it does not fit outputs; use "
            "prefix 'dense' or 'compressed'"
        )


def prepare(
    source: Source,
    tokens: np.ndarray,
    *,
    method: str = DEFAULT_METHOD,
    allocation: str | None = None,
    prefix: str | None = None,
    mask: np.ndarray | None = None,
    mask_token: int | None = None,
    batch_size: int | None = None,
    gradient_windows: int | None = GRADIENT_WINDOWS,
    multiple: int | None = None,
    progress: Progress | None = None,
    work: Store | None = None,
    mesh: Mesh | None = None,
) -> Prepared:
    """Collects statistics of the original model and factors every site for all ranks.

    Args:
      source: the model. A compressed model is compressed again; its kernels count as dense.
      tokens: calibration ids ``[sequences, length]``.
      method: a key of `METHODS`.
      allocation: policy that will be used, a key of `POLICIES`; None: the method's own. A
        sequential method whose policy reads no errors (ROM's) skips the pass over the model.
      prefix: model that later statistics are taken from (`Method.prefix`); None: the method's own.
      mask: ``[sequences, length]``, False at padding.
      mask_token: id of the mask token, for a model that predicts masked tokens; see `objective`.
      batch_size: sequences per step; None: as many as this backend is fastest with.
      gradient_windows: number of sequences in the backward pass, spread evenly; None: all.
      multiple: ranks are multiples of this, in policies that optimize; None: 8; for stock shapes
        64, and 32 for MLPs narrower than 4096; for per-layer shapes 256; less for MLPs narrower
        than four times that.
      progress: called with (stage, done, total).
      work: where finished work is kept; None: in memory. With a `DiskStore` memory holds one
        block, and a run that was killed does not repeat what it finished.
      mesh: devices that share the calibration sequences and the sites (`mesh.make_mesh`); None:
        the first device.

    Raises:
      KeyError: if the method or the policy is unknown.
      ValueError: if an option is out of range, tokens do not fit the model, or an activation is
        not finite.
    """
    check_method(method)
    settings = CalibrationSettings(
        tokens, mask, mask_token, batch_size, gradient_windows, progress, work, mesh
    )
    policy, prefix = allocation or METHODS[method].allocation, prefix or METHODS[method].prefix
    check_policy(policy)
    _check_prefix(method, prefix)
    check_positive(multiple=multiple)
    dense = Materialized(source)
    if shape_of(method) != SHAPES[0]:
        multiple = multiple or default_multiple(method, dense.config.mlp_size)
        _check_shape(dense, method, policy, prefix, multiple)
    return _take_statistics(dense, settings, method, policy, prefix, multiple or TILE)


def default_multiple(method: str, width: int) -> int:
    """Returns the default multiple of ranks: a power of two that leaves an MLP enough widths.

    One width for all blocks leaves up to a multiple of neurons in every block unspent.

    Args:
      method: a key of `METHODS`.
      width: width of the MLP.
    """
    multiple = METHODS[method].multiple or TILE
    if METHODS[method].stock and multiple * FINE_WIDTHS > width:
        multiple = NARROW_MULTIPLE
    while multiple > 1 and multiple * WIDTHS > width:
        multiple //= 2
    return multiple


def _check_shape(source: Source, method: str, policy: str, prefix: str, multiple: int) -> None:
    """Raises ValueError if a method's shapes do not go with other settings, or with the model."""
    config, shape, allocation = source.config, shape_of(method), METHODS[method].allocation
    for name, value, only in (("allocation", policy, allocation), ("prefix", prefix, "dense")):
        if value != only:
            raise ValueError(f"{shape} shapes need {name} {only!r}, got {value!r}; leave it out")
    if multiple * WIDTHS > config.mlp_size:
        raise ValueError(
            f"multiple {multiple}: MLPs have width {config.mlp_size}, and {shape} shapes need at "
            f"least {WIDTHS} widths to choose from; expected a multiple of at most "
            f"{config.mlp_size // WIDTHS}"
        )
    block = trees.flatten(source.block(0))
    width, values = block["mlp/down/kernel"].shape[0], block["attention/o/kernel"].shape[0]
    if (width, values) != (config.mlp_size, config.num_heads * config.head_size):
        raise ValueError(
            "the model has other widths than its config says, because it was compressed before; "
            f"compress the original model to {shape} shapes"
        )


def _stock_sizes(source: Materialized, sizes: dict[str, SiteSize]) -> dict[str, SiteSize]:
    """Returns the sizes of sites; those that the family's config cannot describe are fixed."""
    config, fixed = source.config, set()
    fewer = config.num_heads // config.num_kv_heads
    trials = {
        MLP: dataclasses.replace(config, mlp_size=1),
        HEADS: dataclasses.replace(config, num_kv_heads=1, num_heads=fewer),
    }
    for name, trial in trials.items():
        if not _describes(source, trial):
            fixed.add(name)
    return {
        path: SiteSize(size.dense, size.dense) if names.layer_type(path) in fixed else size
        for path, size in sizes.items()
    }


def _removes_blocks(source: Materialized, method: str) -> bool:
    """Returns whether whole blocks may be removed."""
    if not METHODS[method].stock or not blocks_are_alike(source.config):
        return False
    fewer = dataclasses.replace(source.config, num_layers=source.config.num_layers - 1)
    return _describes(source, fewer)


def _describes(source: Materialized, config: ModelConfig) -> bool:
    """Returns whether the config of a model's family, if it has one, can describe new sizes."""
    hf_config = getattr(source.source, "hf_config", None)
    return hf_config is None or can_describe(hf_config, config)


def _take_statistics(
    source: Materialized,
    settings: CalibrationSettings,
    method: str,
    policy: str,
    prefix: str,
    tile: int,
) -> Prepared:
    """Runs the passes over the original model that a method, a policy and a prefix need."""
    config, clock, store = source.config, Clock(settings.progress), settings.store()
    calibration = settings.calibration(config)
    held_out = calibration.tokens[:0]
    checked = checks_errors(method, policy, prefix, len(calibration.tokens))
    checked = checked and calibration.mask is None
    if policy in INFLUENCED or checked:
        count = held_out_count(method, policy, prefix, len(calibration.tokens))
        calibration, held_out = calibration.hold_out(count)
    if policy not in CURVELESS:
        calibration = calibration.split()
    limit = settings.gradient_windows
    gradients = few_gradients(source, calibration, METHODS[method], limit, clock, store)
    factors: Mapping[str, AnyFactors] = {}
    influences: dict[int, float] = {}
    if prefix == "dense" or policy not in CURVELESS:
        factors, influences = factor_all(
            source,
            calibration,
            method,
            gradients,
            clock,
            store,
            keep_gradients=prefix != "dense",
            influence=policy in INFLUENCED,
        )
    report = {
        "method": method,
        "prefix": prefix,
        "calibration": settings.summary(config, len(held_out)),
        "seconds": clock.seconds,
    }
    sizes = site_sizes(source, method, store)
    prepared = Prepared(
        source=source,
        calibration=calibration,
        held_out=held_out,
        method=method,
        prefix=prefix,
        factors=factors,
        influences=influences,
        gradients=gradients,
        report=report,
        sizes=_stock_sizes(source, sizes) if METHODS[method].stock else sizes,
        progress=settings.progress,
        store=store,
        tile=tile,
    )
    if checked:
        check(prepared, removes_blocks=_removes_blocks(source, method))
    return prepared


def checks_errors(method: str, policy: str, prefix: str, sequences: int) -> bool:
    """Returns whether a job measures some of the predicted errors, from its settings alone."""
    reads = policy not in CURVELESS and prefix == "dense" and METHODS[method].in_nats
    return reads and sequences >= LEAST_CHECKED


def held_out_count(method: str, policy: str, prefix: str, sequences: int) -> int:
    """Returns how many sequences a job holds out, from its settings alone."""
    if policy in INFLUENCED:
        return max(1, min(HELD_OUT, sequences // 8))
    if not checks_errors(method, policy, prefix, sequences):
        return 0
    return HELD_OUT if sequences >= 16 * HELD_OUT else 1  # few sequences are needed for the factors


def compress(
    source: Source,
    tokens: np.ndarray,
    *,
    method: str = DEFAULT_METHOD,
    shape: str = "free",
    keep: float = 0.8,
    ranks: Mapping[str, int] | None = None,
    allocation: str | None = None,
    temperature: float | None = None,
    dtype: Any = None,
    factors: str | None = None,
    embeddings: str | None = None,
    file_bytes: int | None = None,
    into: Any = None,
    **options: Any,
) -> Result:
    """Compresses a model: `prepare`, then one plan.

    Args:
      source: the model.
      tokens: calibration ids ``[sequences, length]``.
      method: a key of `METHODS`.
      shape: one of `SHAPES`: ``free``; ``stock``, shapes that the family's own ``config.json`` can
        say (`Result.config` has them); or ``per-layer``, an MLP width for each block.
      keep: fraction of the block linear weights to keep, in (0, 1].
      ranks: pattern -> rank, instead of a budget; see `ranks_by_pattern`.
      allocation: a key of `POLICIES`; None: the method's own.
      temperature: temperature of policy ``block-influence``; see `Prepared.plan`.
      dtype: dtype of the result; None: that of the source.
      factors: quantization format of factor pairs; see `Prepared.compress`.
      embeddings: format of embeddings and head; see `Prepared.compress`.
      file_bytes: bytes of all files with weights, instead of ``keep``; see `Prepared.compress`.
      into: where finished parts of the model go; see `Prepared.apply`. `Output` writes a directory.
      **options: keyword arguments of `prepare`.

    Returns:
      The compressed model, its plan and its report.

    Raises:
      KeyError: if the method or the policy is unknown, or a pattern of ``ranks`` decides no site.
      ValueError: if an option is out of range; see also `prepare`, `Prepared.plan` and
        `ranks_by_pattern`.
    """
    check_stored(keep, factors, embeddings, file_bytes, ranks)
    method = method_of_shape(method, shape)
    if ranks is not None:
        check_method(method)
        chosen = ranks_by_pattern(site_sizes(source, method), ranks)
        tables = dict.fromkeys(table_paths(source.config), embeddings) if embeddings else {}
        plan = Plan(method, chosen, None, GIVEN, factors=factors, tables=tables)
        # Without given shapes: a policy that needs no statistics, so that none are taken for it.
        free = shape_of(method) == SHAPES[0]
        policy = "uniform" if free else METHODS[method].allocation
        prepared = prepare(source, tokens, method=method, allocation=policy, **options)
        return prepared.apply(plan, dtype=dtype, into=into)
    prepared = prepare(source, tokens, method=method, allocation=allocation, **options)
    how: dict[str, Any] = {"temperature": temperature, "dtype": dtype, "factors": factors}
    how |= {"embeddings": embeddings, "file_bytes": file_bytes, "into": into}
    return prepared.compress(keep, allocation, **how)
