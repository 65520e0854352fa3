"""Quantization of a model: NormalFloat weights, low-rank terms beside them, one budget for both.

::

    prepare_quantized(source, tokens, ...) -> Quantizer   gradients, once
    Quantizer.compress(bits=...)           -> Result      choose within a budget, then decompose
    quantize(source, tokens, ...)          -> Result      both

Activation statistics of one block are in memory at a time. Gradient statistics of all blocks are,
about as many numbers as the blocks have weights, unless a `DiskStore` keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lordjax.allocation.candidates import FORMATS, QUANTIZERS, check_choice
from lordjax.calibration.backward_pass import few_gradients
from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.calibration_settings import (
    GRADIENT_WINDOWS,
    CalibrationSettings,
    check_positive,
)
from lordjax.compression.kept_pairs import KeptPairs, is_plain_pair, pair_format
from lordjax.compression.quantizer import Quantizer
from lordjax.compression.result import Result
from lordjax.compression.whole_file.budget import check_outer
from lordjax.compression.whole_file.tables import check_format
from lordjax.kernels import normal_float, trees
from lordjax.methods.quantized.lq import STEPS
from lordjax.methods.quantized.weightings import MOMENTS, WEIGHTINGS, weighting_method
from lordjax.models.sites import LINEAR_SITES, site_path
from lordjax.models.source import Materialized, Source
from lordjax.models.tables import table_paths
from lordjax.names import did_you_mean, layer
from lordjax.runtime.mesh import Mesh
from lordjax.runtime.progress import Clock, Progress
from lordjax.storage.store import Store


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
    embeddings: str | None = None,
    mask: np.ndarray | None = None,
    mask_token: int | None = None,
    batch_size: int | None = None,
    gradient_windows: int | None = GRADIENT_WINDOWS,
    progress: Progress | None = None,
    work: Store | None = None,
    mesh: Mesh | None = None,
) -> Quantizer:
    """Collects the gradients that a weighting needs; a plan collects the rest.

    Args:
      source: the model. Of a model that was compressed before, smaller matrices are quantized, and
        low-rank pairs stay pairs, with factors in the format of ``factors``, else in NF8. Other
        kernels count as dense.
      tokens: calibration ids ``[sequences, length]``; not needed for weighting ``none``.
      method: a key of `QUANTIZERS`.
      weighting: weighting of errors, a key of `WEIGHTINGS`; None: the method's own.
      rank: rank of all low-rank terms; None: the method's own. Not for methods that choose ranks.
      formats: quantization formats that a budget may choose from.
      factors: format of the low-rank factors, or ``dense``; None: the method's own.
      dtype: dtype of all that is not quantized; None: float16 in blocks, elsewhere unchanged.
      steps: number of alternations between quantized weights and low-rank term.
      feedback: whether later weights compensate for errors of earlier ones (GPTQ); None: if
        the weighting has a second moment of inputs, which this needs.
      embeddings: format of embeddings and head: a NormalFloat format or a dtype; None: they stay
        as they are, unless a budget of bytes of the files chooses their formats.
      mask: ``[sequences, length]``, False at padding.
      mask_token: id of the mask token, for a model that predicts masked tokens.
      batch_size: sequences per step; None: as many as this backend is fastest with.
      gradient_windows: number of sequences in the backward pass, spread evenly; None: all.
      progress: called with (stage, done, total).
      work: where finished work is kept; see `lordjax.prepare`.
      mesh: devices that share the calibration sequences; None: the first device.

    Raises:
      KeyError: if the method or the weighting is unknown.
      ValueError: if tokens are missing or do not fit the model, or an option is out of range.
    """
    settings = CalibrationSettings(
        tokens, mask, mask_token, batch_size, gradient_windows, progress, work, mesh
    )
    check_positive(steps=steps)
    check_format(embeddings)
    options = method_options(method, weighting, rank, factors, feedback)
    options |= {"formats": tuple(formats), "dtype": dtype, "steps": steps, "embeddings": embeddings}
    options["pairs"] = KeptPairs(source, pair_format(factors, QUANTIZERS[method].factors), dtype)
    return _take_gradients(Materialized(source), settings, options)


def method_options(
    method: str,
    weighting: str | None,
    rank: int | None,
    factors: str | None,
    feedback: bool | None,
) -> dict[str, Any]:
    """Checks options and puts the method's own in place of None; returns fields of `Quantizer`."""
    _check_names(method, weighting, rank, factors, feedback)
    own = QUANTIZERS[method]
    weighting = weighting or own.weighting
    form = own.factors if factors is None else None if factors == "dense" else factors
    return {
        "method": method,
        "weighting": weighting,
        "rank": own.rank if rank is None else rank,
        "factors": None if form is None else normal_float.Format.parse(form),
        "feedback": weighting in MOMENTS if feedback is None else feedback,
    }


def _take_gradients(
    source: Source, settings: CalibrationSettings, options: Mapping[str, Any]
) -> Quantizer:
    """Runs the backward pass if the weighting needs it.

    Args:
      source: the original model.
      settings: calibration tokens and how to run them.
      options: fields of `Quantizer` that are options.
    """
    config, clock, store = source.config, Clock(settings.progress), settings.store()
    weighting = options["weighting"]
    report = {"method": options["method"], "weighting": weighting, "seconds": clock.seconds}
    shapes, others = _shapes(options["pairs"])
    check_rank(options["rank"], shapes)
    calibration: Calibration | None = None
    gradients: Mapping[int, Sequence[Mapping[str, Mapping[str, Any]]]] = {}
    if WEIGHTINGS[weighting]:
        if settings.tokens is None:
            raise ValueError(
                f"weighting {weighting!r} needs calibration tokens, got none; pass some, or use "
                "weighting 'none'"
            )
        calibration = settings.calibration(config)
        report["calibration"] = settings.summary(config)
        statistics, limit = weighting_method(weighting), settings.gradient_windows
        gradients = few_gradients(source, calibration, statistics, limit, clock, store)
    return Quantizer(
        source=source,
        calibration=calibration,
        gradients=gradients,
        shapes=shapes,
        others=others,
        report=report,
        store=store,
        progress=settings.progress,
        **options,
    )


def _shapes(pairs: KeptPairs) -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
    """Returns the shapes of all sites, and of the parameters that are neither sites nor tables.

    Raises:
      ValueError: if there are no sites, because all matrices are low-rank pairs.
    """
    source, names = pairs.source, table_paths(pairs.source.config)
    outside = trees.flatten(source.non_block_params()).items()
    shapes, others = {}, {path: _shape(leaf) for path, leaf in outside if path not in names}
    for i in range(source.config.num_layers):
        flat = {f"{layer(i)}/{path}": leaf for path, leaf in trees.flatten(source.block(i)).items()}
        kept = {path: flat.pop(path) for path in [*flat] if is_plain_pair(flat[path])}
        sites = [path for site in LINEAR_SITES if (path := site_path(i, site)) in flat]
        shapes |= {path: tuple(flat.pop(path).shape) for path in sites}
        others |= {path: _shape(leaf) for path, leaf in flat.items()}
        for path, pair in kept.items():
            others |= pairs.sizes(path, pair)
    if not shapes:
        raise ValueError(
            "all matrices of the blocks are low-rank pairs, so none is left to quantize; compress "
            "the original model again, with factors=FORMAT"
        )
    return shapes, others


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _check_names(
    method: str,
    weighting: str | None,
    rank: int | None,
    factors: str | None,
    feedback: bool | None,
) -> None:
    """Raises KeyError or ValueError if an option is unknown or does not fit the method."""
    for what, name, table in (
        ("method", method, QUANTIZERS),
        ("weighting", weighting, WEIGHTINGS),
    ):
        if name is not None and name not in table:
            raise KeyError(f"no {what} {name!r}; {did_you_mean(name, table)}")
    own = QUANTIZERS[method]
    if rank is not None and own.rank is None:
        which = "chooses ranks itself" if own.counts_low_rank else "has no low-rank part"
        raise ValueError(f"method {method!r} {which}; leave out the rank")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if factors is not None and own.rank is None and not own.counts_low_rank:
        raise ValueError(f"method {method!r} has no low-rank part; leave out factors")
    if factors not in (None, "dense"):
        normal_float.Format.parse(factors)
    weighting = weighting or own.weighting
    if feedback and weighting not in MOMENTS:
        raise ValueError(
            f"feedback needs a second moment of inputs, which weighting {weighting!r} does not "
            f"collect; use weighting {' or '.join(MOMENTS)}"
        )


def check_rank(rank: int | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError if the rank of all low-rank terms is too large for a matrix."""
    small = [path for path, shape in shapes.items() if rank is not None and rank >= min(shape)]
    if small:
        raise ValueError(
            f"rank {rank} is not below the smaller side of {small[0]} {shapes[small[0]]}; "
            "ask for a smaller rank"
        )


def check_settings(
    method: str,
    *,
    bits: float | None = None,
    budget_bytes: int | None = None,
    file_bytes: int | None = None,
    embeddings: str | None = None,
    form: str | None = None,
    solver: str = "bisection",
    weighting: str | None = None,
    rank: int | None = None,
    factors: str | None = None,
    feedback: bool | None = None,
    dtype: Any | None = None,
) -> bool:
    """Checks the options of `quantize` before the work begins.

    Args:
      method: see `quantize`.
      bits: see `quantize`.
      budget_bytes: see `quantize`.
      file_bytes: see `quantize`.
      embeddings: see `prepare_quantized`.
      form: see `quantize`.
      solver: see `quantize`.
      weighting: see `prepare_quantized`.
      rank: see `prepare_quantized`.
      factors: see `prepare_quantized`.
      feedback: see `prepare_quantized`.
      dtype: see `prepare_quantized`.

    Returns:
      Whether calibration tokens are needed.

    Raises:
      KeyError: if the method, the weighting or the solver is unknown.
      ValueError: if options are out of range or do not go together.
    """
    _check_names(method, weighting, rank, factors, feedback)
    own = QUANTIZERS[method]
    if bits is not None and not 0 < bits < np.inf:
        raise ValueError(f"bits must be positive, got {bits}")
    budgets = {"bits": bits, "budget_bytes": budget_bytes, "file_bytes": file_bytes}
    check_choice(solver, **budgets, format=form)
    if own.counts_low_rank and form is not None:
        raise ValueError(
            f"method {method!r} chooses formats itself; give bits, budget_bytes or file_bytes"
        )
    check_outer(weighting or own.weighting, embeddings, file_bytes)
    if form is not None:
        normal_float.Format.parse(form)
    if dtype is not None:
        jnp.dtype(dtype)
    return bool(WEIGHTINGS[weighting or own.weighting])


def quantize(
    source: Source,
    tokens: np.ndarray | None = None,
    *,
    method: str = "lq",
    bits: float | None = None,
    budget_bytes: int | None = None,
    file_bytes: int | None = None,
    form: str | None = None,
    solver: str = "bisection",
    into: Any = None,
    **options: Any,
) -> Result:
    """Quantizes a model: `prepare_quantized`, then one plan.

    Args:
      source: the model.
      tokens: calibration ids ``[sequences, length]``; not needed for weighting ``none``.
      method: a key of `QUANTIZERS`.
      bits: budget in average bits per block weight; see `Quantizer.plan`.
      budget_bytes: budget in bytes of all block kernels; see `Quantizer.plan`.
      file_bytes: budget in bytes of all files with weights; see `Quantizer.plan`.
      form: format of all matrices, instead of a budget (`normal_float.Format.parse`).
      solver: a key of `knapsack.SOLVERS`.
      into: where finished parts of the model go; see `Prepared.apply`.
      **options: keyword arguments of `prepare_quantized`.

    Returns:
      The quantized model, its plan and its report.

    Raises:
      KeyError: see `prepare_quantized` and `Quantizer.plan`.
      ValueError: see `prepare_quantized` and `Quantizer.plan`; or if not exactly one of bits,
        budget_bytes, file_bytes and form is given.
    """
    budget: dict[str, Any] = {"bits": bits, "budget_bytes": budget_bytes, "file_bytes": file_bytes}
    names = ("weighting", "rank", "factors", "feedback", "dtype", "embeddings")
    shared = {name: options[name] for name in names if name in options}
    check_settings(method, form=form, solver=solver, **budget, **shared)
    prepared = prepare_quantized(source, tokens, method=method, **options)
    if form is not None:
        plan = prepared.uniform(normal_float.Format.parse(form), prepared.rank)
        return prepared.apply(plan, into=into)
    return prepared.compress(solver=solver, into=into, **budget)
