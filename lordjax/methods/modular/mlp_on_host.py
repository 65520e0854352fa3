"""The MLP method on the host with LAPACK, in place, with the same results as `modular.mlp.mlp`.

Peak memory is one float64 matrix of size width × width. One array holds in turn the Gram matrix,
its inverse, and what elimination leaves of that; then, in the new order, the Gram matrix and its
factor. Beside it there are the float32 sums, until they are read for the second time, and one
matrix of the size of ``down``.

`lordjax.compression.site_factors` chooses it where arrays are on the host. The elimination loop
works on float32 copies of the refit kernel and of rows in the metric. They take half of the time;
in tests the chosen columns are identical.

`mlp` is written twice, because LAPACK works in place on one triangle and in float64. Shared code
would round differently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lordjax.methods import column_selection, lapack, linalg
from lordjax.methods.base import ModuleFactors

SCORES = ("elimination", "leverage")


def mlp(
    kernels: Mapping[str, Any],
    stats: dict[str, Any],
    *,
    score: str,
    ridge: float,
    intercept: bool = False,
    shrinkage: float = 0.0,
    dtype: Any = np.float64,
) -> ModuleFactors:
    """Ranks the neurons of an MLP and refits ``down``; see `modular.mlp.mlp`.

    Args:
      kernels: ``down`` ``[f, m]``; other kernels are not read.
      stats: ``moments`` and optionally ``gradients``. The dict is emptied, so that sums are freed
        once they are read.
      score: one of `SCORES`.
      ridge: ridge of the leverage scores, relative to the mean energy of a column.
      intercept: whether to fit a bias as well.
      shrinkage: ridge of the refit in neurons per token.
      dtype: dtype of the Gram matrix and its factors.

    Returns:
      Factors with NumPy arrays.
    """
    moments, down = stats.pop("moments"), np.asarray(kernels["down"])
    root = _root(stats.pop("gradients", None))
    with np.errstate(invalid="ignore", divide="ignore"):  # without tokens nothing is finite
        shrunk = np.maximum(
            column_selection.JITTER, shrinkage * len(down) / np.float64(moments.count)
        )
    gram = np.empty((len(down), len(down)), dtype)
    _fill(gram, moments, np.arange(len(down)), centred=intercept)
    if score == "elimination":
        order = lapack.elimination_order(gram, _in_metric(down, root), shrunk)
    else:
        order = np.argsort(lapack.leverage_complement(gram, ridge), kind="stable")
    _fill(gram, moments, order, centred=intercept)
    parts: dict[str, Any] = {"order": order.astype(np.int32)}
    if intercept:
        parts["mean"] = np.asarray(moments.mean, np.float32)[order]
    del moments
    parts["lower"], parts["right"] = lapack.nested_refit(gram, _ordered(down, order, dtype), shrunk)
    del gram
    spectrum = np.empty(len(down))
    for p, q in lapack.panels(len(down)):
        spectrum[p:q] = (_in_metric(parts["right"][p:q], root).astype(np.float64) ** 2).sum(axis=1)
    spectrum /= 1 + shrunk
    return ModuleFactors(spectrum, parts)


def errors(
    kernels: Mapping[str, Any],
    factors: ModuleFactors,
    stats: dict[str, Any],
    *,
    intercept: bool = False,
) -> np.ndarray:
    """Returns the errors of an MLP at every width, by statistics of other tokens.

    See `modular.mlp.mlp_errors`. It runs in float32, because the ridge of the refit bounds the
    condition number.

    Args:
      kernels: not read.
      factors: what `mlp` returned.
      stats: ``moments`` and optionally ``gradients`` of other tokens.
      intercept: as for `mlp`.
    """
    del kernels
    parts, moments = factors.parts, stats["moments"]
    order, root = np.asarray(parts["order"]), _root(stats.get("gradients"))
    gram = np.empty((len(order), len(order)), np.float32)
    _fill(gram, moments, order, centred=intercept)
    if intercept:
        shift = np.asarray(moments.mean)[order] - parts["mean"]
        for p, q in lapack.panels(len(gram)):
            gram[p:q, :q] += shift[p:q, None] * shift[None, :q]
    return lapack.prefix_errors(parts["lower"], gram, _in_metric(parts["right"], root))


def _ordered(
    rows: Float[np.ndarray, "n m"], order: Int[np.ndarray, "n"], dtype: Any
) -> Float[np.ndarray, "n m"]:
    """Returns rows in a new order and dtype, in column-major layout for LAPACK."""
    found = np.empty(rows.shape, dtype, order="F")
    for p, q in lapack.panels(len(rows)):
        found[p:q] = rows[order[p:q]]
    return found


def _root(gradients: Any) -> Float[np.ndarray, "m m"] | None:
    """Returns a root of the gradient metric, float32, or None without gradients."""
    if gradients is None:
        return None
    moment = np.asarray(gradients.total, np.float64) / float(gradients.count)
    lapack.cholesky(moment, linalg.GRADIENT_DAMPING, linalg.mean_unit(moment.diagonal()))
    return np.tril(moment).astype(np.float32)


def _in_metric(
    rows: Float[np.ndarray, "n m"], root: Float[np.ndarray, "m m"] | None
) -> Float[np.ndarray, "n m"]:
    """Returns a float32 copy of rows in the metric."""
    found = np.empty(rows.shape, np.float32)
    for p, q in lapack.panels(len(rows)):
        own = rows[p:q].astype(np.float32)
        found[p:q] = own if root is None else own @ root
    return found


def _fill(
    gram: Float[np.ndarray, "n n"], moments: Any, order: Int[np.ndarray, "n"], *, centred: bool
) -> None:
    """Fills the lower triangle of ``gram`` with the (centred) second moment in a new order."""
    scatter, mean = np.asarray(moments.scatter), np.asarray(moments.mean, np.float64)[order]
    for p, q in lapack.panels(len(gram)):
        part = gram[p:q, :q]
        part[:] = scatter[order[p:q]][:, order[:q]]
        part /= float(moments.count)
        if not centred:
            part += mean[p:q, None] * mean[None, :q]


def work(
    kernels: Mapping[str, Any], stats: Mapping[str, Any], *, score: str, folds: int = 1
) -> Counter[str]:
    """Returns the operations of `mlp` for some shapes, by the kinds of `lordjax.runtime.flops`.

    With two folds it is run for each of them too, in float32, and followed by `errors`.
    """
    found = _work(kernels, stats, score)
    if folds > 1:
        n, m = kernels["down"].shape
        for kind, count in _work(kernels, stats, score).items():
            found[kind.replace("float64", "float32")] += folds * count
        found["product float32"] += folds * (2 * n**3 + n**2 * m)
    return found


def _work(kernels: Mapping[str, Any], stats: Mapping[str, Any], score: str) -> Counter[str]:
    n, m = kernels["down"].shape
    found: Counter[str] = Counter()
    # A factor and its inverse; for elimination also the product of the inverse with itself.
    found["cholesky float64"] += n**3 // 3 + (n**3 // 3 if score == "leverage" else 2 * n**3 // 3)
    if score == "elimination":
        found["product float64"] += n**3 // 3
        found["thin float32"] += n**2 * m
    found["cholesky float64"] += n**3 // 3
    found["product float64"] += n**2 * m
    if "gradients" in stats:
        found["cholesky float64"] += m**3 // 3
        found["product float32"] += 2 * n * m**2 * (1 + (score == "elimination"))
    return found
