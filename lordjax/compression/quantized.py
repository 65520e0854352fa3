"""Quantises a model: NormalFloat codes, low-rank products on top, one budget for both.

::

    prepare_quantized(source, tokens, ...) -> Quantizer   gradients, once
    Quantizer.compress(bits=...)           -> Result      choose within a budget, then decompose
    quantize(source, tokens, ...)          -> Result      both

Statistics of one block are in memory at a time. Weights from gradients are those of all blocks,
about as many numbers as these have weights, unless work is kept in a directory (`workspace`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lordjax.allocation.candidates import FORMATS, QUANTIZERS
from lordjax.allocation.knapsack import SOLVERS
from lordjax.calibration.backward_pass import few_gradients
from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import checked
from lordjax.compression.low_rank import GRADIENT_WINDOWS
from lordjax.compression.quantizer import Quantizer
from lordjax.compression.result import Result
from lordjax.data.token_windows import fingerprint
from lordjax.kernels import normal_float, trees
from lordjax.methods.quantized.lq import STEPS
from lordjax.methods.quantized.weightings import MOMENTS, WEIGHTINGS, weighting_method
from lordjax.models import objective
from lordjax.models.sites import LINEAR_SITES, site_path
from lordjax.models.source import Materialized, Source
from lordjax.names import did_you_mean
from lordjax.runtime.mesh import Mesh
from lordjax.runtime.progress import Clock, Progress
from lordjax.storage.store import MemoryStore, Store


def prepare_quantized(
    source: Source,
    tokens: np.ndarray | None = None,
    *,
    method: str = "lq",
    weighting: str | None = None,
    rank: int | None = None,
    formats: Sequence[normal_float.Format] = FORMATS,
    factors: str | None = None,
    dtype: Any | None = None,
    steps: int = STEPS,
    feedback: bool | None = None,
    mask: np.ndarray | None = None,
    mask_token: int | None = None,
    batch_size: int | None = None,
    gradient_windows: int | None = GRADIENT_WINDOWS,
    progress: Progress | None = None,
    work: Store | None = None,
    mesh: Mesh | None = None,
) -> Quantizer:
    """Takes the gradients that a weighting needs; the rest is found when a plan asks for it.

    Args:
      source: the model. A compressed one is compressed again; its kernels count as dense.
      tokens: calibration ids ``[windows, length]``; not needed for weighting ``none``.
      method: a key of `QUANTIZERS`.
      weighting: a key of `WEIGHTINGS`; None = the method's own.
      rank: of all products; None = the method's own. Not for a method that chooses ranks.
      formats: of codes that a budget may choose from.
      factors: format of the products' factors (`nf.Format.parse`), or ``dense``; None = the
        method's own.
      dtype: of everything that is no code; None: float16 for the blocks' matrices, the rest as
        it is.
      steps: alternations.
      feedback: whether codes make up for each other's errors (`methods.feedback`), which needs a
        second moment of inputs; None = where the weighting has one.
      mask: ``[windows, length]``, False at padding.
      mask_token: id of the mask token, of a model that predicts masked tokens; see `objective`.
      batch_size: windows per step; None = as many as this backend is fastest with.
      gradient_windows: how many windows, spread evenly, the backward pass sees; None = all.
      progress: called with (stage, done, total).
      work: see `compression.prepare`.
      mesh: devices that share the calibration windows; None: the first one.

    Raises:
      KeyError: if the method or the weighting is unknown.
      ValueError: if tokens are missing or do not fit the model, or an option is out of range.
    """
    _check_names(method, weighting, rank, factors, feedback)
    row = QUANTIZERS[method]
    weighting = weighting or row.weighting
    for name, value in {
        "steps": steps,
        "batch_size": batch_size,
        "gradient_windows": gradient_windows,
    }.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    form = row.factors if factors is None else None if factors == "dense" else factors
    source, clock = Materialized(source), Clock(progress)
    report: dict[str, Any] = {"method": method, "weighting": weighting, "seconds": clock.seconds}
    shapes = {}
    for i in range(source.config.num_layers):
        flat = trees.flatten(source.block(i))
        found = {site_path(i, s): flat[s.path].shape for s in LINEAR_SITES if s.path in flat}
        shapes |= found
    rank = row.rank if rank is None else rank
    check_rank(rank, shapes)
    store = MemoryStore() if work is None else work
    calibration: Calibration | None = None
    gradients: Mapping[int, Mapping[str, Mapping[str, Any]]] = {}
    if WEIGHTINGS[weighting]:
        if tokens is None:
            raise ValueError(f"weighting {weighting!r} needs calibration tokens; give some")
        calibration = checked(source.config, tokens, mask, batch_size, mask_token, mesh)
        tokens = calibration.tokens
        report["calibration"] = {
            "windows": len(tokens),
            "length": tokens.shape[1],
            "tokens_sha256": fingerprint(tokens),
            **objective.protocol(source.config, mask_token),
        }
        statistics = weighting_method(weighting)
        gradients = few_gradients(source, calibration, statistics, gradient_windows, clock, store)
    return Quantizer(
        source=source,
        calibration=calibration,
        method=method,
        weighting=weighting,
        formats=tuple(formats),
        rank=rank,
        factors=None if form is None else normal_float.Format.parse(form),
        dtype=dtype,
        steps=steps,
        feedback=weighting in MOMENTS if feedback is None else feedback,
        gradients=gradients,
        shapes=shapes,
        report=report,
        store=store,
        progress=progress,
    )


def _check_names(
    method: str,
    weighting: str | None,
    rank: int | None,
    factors: str | None,
    feedback: bool | None,
) -> None:
    """Raises KeyError or ValueError for what `prepare_quantized` cannot make sense of."""
    for what, name, table in (
        ("method", method, QUANTIZERS),
        ("weighting", weighting, WEIGHTINGS),
    ):
        if name is not None and name not in table:
            raise KeyError(f"no {what} {name!r}; {did_you_mean(name, table)}")
    row = QUANTIZERS[method]
    if rank is not None and row.rank is None:
        which = "chooses ranks itself" if row.all_in else "has no low-rank part"
        raise ValueError(f"method {method!r} {which}; leave out the rank")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if factors is not None and row.rank is None and not row.all_in:
        raise ValueError(f"method {method!r} has no low-rank part; leave out factors")
    if factors not in (None, "dense"):
        normal_float.Format.parse(factors)
    weighting = weighting or row.weighting
    if feedback and weighting not in MOMENTS:
        raise ValueError(
            f"feedback needs a second moment of inputs, which weighting {weighting!r} does not "
            f"take; use {' or '.join(MOMENTS)}"
        )


def check_rank(rank: int | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError if a rank of all products is too large for a matrix."""
    narrow = [path for path, shape in shapes.items() if rank is not None and rank >= min(shape)]
    if narrow:
        raise ValueError(
            f"rank {rank} is not below the smaller side of {narrow[0]} {shapes[narrow[0]]}; "
            "ask for less"
        )


def check_settings(
    method: str,
    *,
    bits: float | None = None,
    budget_bytes: int | None = None,
    form: str | None = None,
    solver: str = "bisection",
    weighting: str | None = None,
    rank: int | None = None,
    factors: str | None = None,
    feedback: bool | None = None,
    dtype: Any | None = None,
) -> bool:
    """Checks the options of `quantize` before the work begins.

    Returns:
      Whether calibration tokens are needed.

    Raises:
      KeyError: if the method, the weighting or the solver is unknown.
      ValueError: if options are out of range or do not go together.
    """
    _check_names(method, weighting, rank, factors, feedback)
    row = QUANTIZERS[method]
    if bits is not None and not 0 < bits < np.inf:
        raise ValueError(f"bits must be positive, got {bits}")
    if sum(given is not None for given in (bits, budget_bytes, form)) != 1:
        raise ValueError(
            "give exactly one of bits, budget_bytes and format, got "
            f"{bits}, {budget_bytes} and {form}"
        )
    if row.all_in and form is not None:
        raise ValueError(f"method {method!r} chooses formats itself; give bits or budget_bytes")
    if solver not in SOLVERS:
        raise KeyError(f"no solver {solver!r}; {did_you_mean(solver, SOLVERS)}")
    if form is not None:
        normal_float.Format.parse(form)
    if dtype is not None:
        jnp.dtype(dtype)
    return bool(WEIGHTINGS[weighting or row.weighting])


def quantize(
    source: Source,
    tokens: np.ndarray | None = None,
    *,
    method: str = "lq",
    bits: float | None = None,
    budget_bytes: int | None = None,
    form: str | None = None,
    solver: str = "bisection",
    into: Any = None,
    **options: Any,
) -> Result:
    """Quantises a model: `prepare_quantized`, then one plan.

    Args:
      source: the model.
      tokens: calibration ids ``[windows, length]``; not needed for weighting ``none``.
      method: a key of `QUANTIZERS`.
      bits: see `Quantizer.plan`.
      budget_bytes: see `Quantizer.plan`.
      form: instead of a budget, the format of all matrices (`nf.Format.parse`).
      solver: see `Quantizer.plan`.
      into: see `Quantizer.apply`.
      **options: see `prepare_quantized`.

    Raises:
      KeyError: see `prepare_quantized` and `Quantizer.plan`.
      ValueError: see `prepare_quantized` and `Quantizer.plan`; or if not exactly one of bits,
        budget_bytes and form is given.
    """
    budget: dict[str, Any] = {"bits": bits, "budget_bytes": budget_bytes}
    names = ("weighting", "rank", "factors", "feedback", "dtype")
    shared = {name: options[name] for name in names if name in options}
    check_settings(method, form=form, solver=solver, **budget, **shared)
    prepared = prepare_quantized(source, tokens, method=method, **options)
    if form is not None:
        plan = prepared.uniform(normal_float.Format.parse(form), prepared.rank)
        return prepared.apply(plan, into=into)
    return prepared.compress(solver=solver, into=into, **budget)
