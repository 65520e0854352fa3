"""`modular.mlp` on the host, in place: two float64 matrices of the MLP's width never live at once.

One array holds the Gram, its inverse and what elimination leaves of it; then, in the new order, the
Gram again and its factor. Beside it there are the float32 sums, until they were read for the second
time, and one matrix of the size of ``down``.

Chosen where the arrays are the host's (`factoring`). Refit kernels while columns are eliminated,
and rows in the metric, are float32: the columns chosen are the same, and half the time is theirs.
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
) -> ModuleFactors:
    """`modular.mlp` with a fit, by one of `SCORES`; arrays of the result are NumPy's.

    Args:
      kernels: as there.
      stats: as there; is emptied, so that sums live no longer than they are read.
      score: one of `SCORES`.
      ridge: of the leverage scores.
      intercept: as there.
      shrinkage: as there.
    """
    moments, down = stats.pop("moments"), np.asarray(kernels["down"])
    root = _root(stats.pop("gradients", None))
    with np.errstate(invalid="ignore", divide="ignore"):  # no tokens: not finite, as the rest
        shrunk = np.maximum(
            column_selection.JITTER, shrinkage * len(down) / np.float64(moments.count)
        )
    gram = np.empty((len(down), len(down)))
    _fill(gram, moments, np.arange(len(down)), centred=intercept)
    if score == "elimination":
        order = lapack.elimination_order(gram, _weighed(down, root), shrunk)
    else:
        order = np.argsort(lapack.leverage_complement(gram, ridge), kind="stable")
    _fill(gram, moments, order, centred=intercept)
    parts: dict[str, Any] = {"order": order.astype(np.int32)}
    if intercept:
        parts["mean"] = np.asarray(moments.mean, np.float32)[order]
    del moments
    parts["lower"], parts["right"] = lapack.nested_refit(gram, _ordered(down, order), shrunk)
    del gram
    spectrum = np.empty(len(down))
    for p, q in lapack.panels(len(down)):
        spectrum[p:q] = (_weighed(parts["right"][p:q], root).astype(np.float64) ** 2).sum(axis=1)
    spectrum /= 1 + shrunk
    return ModuleFactors(spectrum, parts)


def _ordered(
    rows: Float[np.ndarray, "n m"], order: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "n m"]:
    """Rows in an order, as LAPACK wants to work on them: float64 and along columns."""
    found = np.empty(rows.shape, np.float64, order="F")
    for p, q in lapack.panels(len(rows)):
        found[p:q] = rows[order[p:q]]
    return found


def _root(gradients: Any) -> Float[np.ndarray, "m m"] | None:
    """A root of the gradient metric, float32; None without gradients."""
    if gradients is None:
        return None
    moment = np.asarray(gradients.total, np.float64) / float(gradients.count)
    lapack.cholesky(moment, linalg.GRADIENT_DAMPING, linalg.mean_unit(moment.diagonal()))
    return np.tril(moment).astype(np.float32)


def _weighed(
    rows: Float[np.ndarray, "n m"], root: Float[np.ndarray, "m m"] | None
) -> Float[np.ndarray, "n m"]:
    """Rows in the metric, float32; a copy."""
    found = np.empty(rows.shape, np.float32)
    for p, q in lapack.panels(len(rows)):
        own = rows[p:q].astype(np.float32)
        found[p:q] = own if root is None else own @ root
    return found


def _fill(
    gram: Float[np.ndarray, "n n"], moments: Any, order: Int[np.ndarray, "n"], *, centred: bool
) -> None:
    """The lower triangle of the (centred) second moment in an order."""
    scatter, mean = np.asarray(moments.scatter), np.asarray(moments.mean, np.float64)[order]
    for p, q in lapack.panels(len(gram)):
        part = gram[p:q, :q]
        part[:] = scatter[order[p:q]][:, order[:q]]
        part /= float(moments.count)
        if not centred:
            part += mean[p:q, None] * mean[None, :q]


def work(kernels: Mapping[str, Any], stats: Mapping[str, Any], *, score: str) -> Counter[str]:
    """Operations of `mlp` on arrays of some shapes, by the kinds of `flops`."""
    n, m = kernels["down"].shape
    found: Counter[str] = Counter()
    # A factor; its inverse, and for elimination the product of that with itself.
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
