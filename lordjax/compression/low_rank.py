"""Lifts a method from one site to a model: statistics and factors, block by block.

At any time one block's statistics are in memory, besides the hidden states of the calibration
tokens and the factors found so far::

    prepare(source, tokens, method) -> Prepared      statistics and rank-free factors, once
    Prepared.compress(keep)         -> Result        allocation and slicing, cheap, any budget
    compress(source, tokens, ...)   -> Result        both

Methods that calibrate on the compressed prefix (ROM) know their inputs only once the ranks before
are fixed; for them ``Prepared.compress`` walks the model again (`sequential`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lordjax import names
from lordjax.allocation.plan import Plan
from lordjax.allocation.policies import CURVELESS, GIVEN, INFLUENCED, check_policy, ranks_by_pattern
from lordjax.calibration.backward_pass import few_gradients
from lordjax.calibration.forward_pass import checked
from lordjax.compression.prepared import Prepared
from lordjax.compression.result import Result
from lordjax.compression.single_pass import factor_all
from lordjax.compression.site_factors import AnyFactors, site_sizes
from lordjax.data.token_windows import fingerprint
from lordjax.kernels import normal_float
from lordjax.methods import DEFAULT_METHOD, METHODS
from lordjax.models import objective
from lordjax.models.source import InMemory, Materialized, Source
from lordjax.runtime.mesh import Mesh
from lordjax.runtime.progress import Clock, Progress
from lordjax.storage.store import MemoryStore, Store

# The backward pass costs about four forward passes; more windows than this gain little.
GRADIENT_WINDOWS = 32
HELD_OUT = 2  # calibration windows that choose a temperature; 4 choose the same (docs, tried)
PREFIXES = ("dense", "compressed", "corrective")

__all__ = ["InMemory", "Prepared", "Result", "Source", "compress", "prepare"]


def check_method(name: str) -> None:
    """Raises KeyError with a hint if there is no such method."""
    if name not in METHODS:
        raise KeyError(f"no method {name!r}; {names.did_you_mean(name, METHODS)}")


def _check_options(
    method: str, prefix: str, batch_size: int | None, gradient_windows: int | None
) -> None:
    """Raises ValueError for options of `prepare` that are out of range or do not go together."""
    if prefix not in PREFIXES:
        raise ValueError(f"prefix must be one of {', '.join(PREFIXES)}, got {prefix!r}")
    if prefix == "corrective" and "abs_mean" in METHODS[method].needs:
        raise ValueError(f"method {method!r} has no corrective target: it does not fit outputs")
    if any(given is not None and given < 1 for given in (batch_size, gradient_windows)):
        raise ValueError(
            f"batch_size and gradient_windows must be at least 1, got {batch_size} and "
            f"{gradient_windows}"
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
    progress: Progress | None = None,
    work: Store | None = None,
    mesh: Mesh | None = None,
) -> Prepared:
    """Collects statistics of the untouched model and factors every site for all ranks.

    Args:
      source: the model. A compressed one is compressed again; its kernels count as dense.
      tokens: calibration ids ``[windows, length]``.
      method: a key of `METHODS`.
      allocation: the policy that will be used, if not the method's own; a sequential method whose
        policy needs no error curves (ROM's) skips the pass over the untouched model.
      prefix: where later statistics come from, if not the method's own choice; see `Method`.
      mask: ``[windows, length]``, False at padding.
      mask_token: id of the mask token, of a model that predicts masked tokens; see `objective`.
      batch_size: windows per step; None = as many as this backend is fastest with.
      gradient_windows: how many windows, spread evenly, the backward pass sees; None = all.
      progress: called with (stage, done, total).
      work: where finished work is kept; with a `workspace.Workspace` memory holds one block, and
        what a killed process finished is not done again. None: in memory.
      mesh: devices that share the calibration windows and the sites to factor (`mesh.make_mesh`);
        None: the first one does all.

    Raises:
      KeyError: if the method or the policy is unknown.
      ValueError: if tokens do not fit the model, or an activation is not finite.
    """
    check_method(method)
    row, config = METHODS[method], source.config
    policy, prefix = allocation or row.allocation, prefix or row.prefix
    check_policy(policy)
    _check_options(method, prefix, batch_size, gradient_windows)
    calibration = checked(config, tokens, mask, batch_size, mask_token, mesh)
    tokens, held_out = calibration.tokens, calibration.tokens[:0]
    source = Materialized(source)
    clock = Clock(progress)
    if policy in INFLUENCED:
        calibration, held_out = calibration.hold_out(HELD_OUT)
    store = MemoryStore() if work is None else work
    gradients = few_gradients(source, calibration, row, gradient_windows, clock, store)
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
        "calibration": {
            "windows": len(calibration.tokens),
            "held_out_windows": len(held_out),
            "length": tokens.shape[1],
            "tokens_sha256": fingerprint(tokens),
            **objective.protocol(config, mask_token),
        },
        "seconds": clock.seconds,
    }
    return Prepared(
        source=source,
        calibration=calibration,
        held_out=held_out,
        method=method,
        prefix=prefix,
        factors=factors,
        influences=influences,
        gradients=gradients,
        report=report,
        sizes=site_sizes(source, method, store),
        progress=progress,
        store=store,
    )


def compress(
    source: Source,
    tokens: np.ndarray,
    *,
    keep: float = 0.8,
    ranks: Mapping[str, int] | None = None,
    allocation: str | None = None,
    temperature: float | None = None,
    dtype: Any = None,
    factors: str | None = None,
    into: Any = None,
    **options: Any,
) -> Result:
    """Compresses a model: `prepare`, then one plan.

    Args:
      source: the model.
      tokens: calibration ids ``[windows, length]``.
      keep: share of the block linear weights that stays, in (0, 1].
      ranks: instead of a budget; see `sizing.ranks_by_pattern`.
      allocation: a key of `POLICIES`; None = the method's own.
      temperature: see `Prepared.plan`.
      dtype: of the result; None = that of the source.
      factors: see `Prepared.compress`.
      into: see `Prepared.apply`; `streaming.compress_into` writes a directory.
      **options: see `prepare`.

    Raises:
      KeyError: if the method or the policy is unknown, or a pattern of ``ranks`` decides no site.
      ValueError: see `prepare`, `Prepared.plan` and `sizing.ranks_by_pattern`.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    if factors is not None:
        normal_float.Format.parse(factors)
    if ranks is not None:
        method = options.get("method", DEFAULT_METHOD)
        check_method(method)
        chosen = ranks_by_pattern(site_sizes(source, method), ranks)
        plan = Plan(method, chosen, None, GIVEN, factors=factors)
        # A policy that needs no statistics, so that none are taken for it.
        prepared = prepare(source, tokens, allocation="uniform", **options)
        return prepared.apply(plan, dtype=dtype, into=into)
    prepared = prepare(source, tokens, allocation=allocation, **options)
    return prepared.compress(
        keep, allocation, temperature=temperature, dtype=dtype, factors=factors, into=into
    )
