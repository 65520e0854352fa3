"""Column selection on the host with LAPACK, in place: the functions of `column_selection`.

XLA keeps a matrix, its factor and its inverse in memory together, and has no symmetric product. On
the host LAPACK needs only one of them, half of the operations and no compilation. Accelerators use
`column_selection`. Both choose the same columns in the tests.

The algorithms are written twice, because these work in place on one triangle and in panels. Shared
code would change the order of operations, and so the rounding.

Matrices are float64 or float32, in C order. Only the lower triangle of a symmetric matrix is read
and written. For LAPACK, which uses column-major order, it is the upper triangle of the transpose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import get_blas_funcs, get_lapack_funcs

from lordjax.methods.column_selection import JITTER
from lordjax.methods.linalg import mean_unit, own_unit

PANEL = 512  # rows that are processed at a time, so that intermediate results fit the cache
PENDING = 256  # removed columns whose update of the inverse is one matrix product
SHRINK = 7 / 8  # fraction of remaining columns at which arrays are compacted


def cholesky(a: Float[np.ndarray, "n n"], first: float, unit: Any) -> None:
    """Replaces ``a`` by the lower Cholesky factor of ``a + τ diag(unit)`` (`linalg.jittered`)."""
    diagonal = a.diagonal().copy()
    share, index = first, np.arange(len(a))
    # The upper triangle keeps a copy of the lower one, to restore it after a failed attempt.
    for p, q in panels(len(a)):
        a[:p, p:q] = a[p:q, :p].T
        own = a[p:q, p:q]
        own[:] = np.tril(own) + np.tril(own, -1).T
    (potrf,) = get_lapack_funcs(("potrf",), (a,))
    while True:
        a[index, index] = diagonal + share * unit
        failed = potrf(a.T, lower=0, clean=0, overwrite_a=1)[1]
        if not failed and np.isfinite(a[-1, -1]):
            return
        if not share < 1:  # if a ridge of 1 does not help, the matrix holds NaN
            a.fill(np.nan)
            return
        for p, q in panels(len(a)):
            a[p:q, :p] = a[:p, p:q].T
            own = a[p:q, p:q]
            own[:] = np.triu(own) + np.triu(own, 1).T
        share *= 10


def panels(n: int) -> list[tuple[int, int]]:
    """Returns the first row and the end of every panel of n rows."""
    return [(p, min(p + PANEL, n)) for p in range(0, n, PANEL)]


def leverage_complement(gram: Float[np.ndarray, "n n"], ridge: float) -> Float[np.ndarray, "n"]:
    """Returns `column_selection.leverage_complement`; overwrites ``gram``."""
    empty = ~(gram.diagonal() > 0)
    cholesky(gram, ridge, mean_unit(gram.diagonal()))
    (trtri,) = get_lapack_funcs(("trtri",), (gram,))
    trtri(gram.T, lower=0, overwrite_c=1)
    h = np.zeros(len(gram))
    for p, q in panels(len(gram)):
        h[:p] += np.einsum("ij,ij->j", gram[p:q, :p], gram[p:q, :p])
        h[p:q] += (np.tril(gram[p:q, p:q]) ** 2).sum(axis=0)
    h[empty] = np.inf
    return h


def nested_refit(
    gram: Float[np.ndarray, "n n"], kernel: Float[np.ndarray, "n m"], ridge: float = JITTER
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, "n m"]]:
    """Returns `column_selection.nested_refit` in float32.

    Overwrites ``gram``, and ``kernel`` if it is in Fortran order.
    """
    cholesky(gram, ridge, own_unit(gram.diagonal()))
    (trmm,) = get_blas_funcs(("trmm",), (gram, kernel))
    right = trmm(1.0, gram.T, kernel, lower=0, overwrite_b=1)
    del kernel
    right = np.asarray(right, np.float32, order="C")
    # Pages of zeros that are never written take no memory.
    lower = np.zeros(gram.shape, np.float32)
    for p, q in panels(len(gram)):
        lower[p:q, :p] = gram[p:q, :p]
        lower[p:q, p:q] = np.tril(gram[p:q, p:q])
    return lower, right


def prefix_errors(
    lower: Float[np.ndarray, "n n"],
    gram: Float[np.ndarray, "n n"],
    weighted: Float[np.ndarray, "n m"],
) -> Float[np.ndarray, "n+1"]:
    """Returns `column_selection.prefix_errors`; overwrites ``gram``."""
    n = len(gram)
    for p, q in panels(n):
        gram[:p, p:q] = gram[p:q, :p].T
        own = gram[p:q, p:q]
        own[:] = np.tril(own) + np.tril(own, -1).T
    (trsm,) = get_blas_funcs(("trsm",), (lower, gram))
    # BLAS sees transposes: ``lower`` is an upper triangle there. ``gram`` is symmetric.
    half = trsm(1.0, lower.T, gram.T, side=0, lower=0, trans_a=1, overwrite_b=1)
    inner = trsm(1.0, lower.T, half, side=1, lower=0, trans_a=0, overwrite_b=1)
    terms = np.empty(n)
    for p, q in panels(n):
        products = inner[p:q, p:] * (weighted[p:q] @ weighted[p:].T)
        terms[p:q] = np.diagonal(products) + 2 * np.triu(products, 1).sum(axis=1, dtype=np.float64)
    tails = np.append(np.cumsum(terms[::-1])[::-1], 0.0)
    return np.maximum.accumulate(tails[::-1])[::-1]


def elimination_order(
    gram: Float[np.ndarray, "n n"],
    kernel: Float[np.ndarray, "n m"],
    ridge: float = JITTER,
    block: int = 32,
) -> Int[np.ndarray, "n"]:
    """Returns `column_selection.elimination_order`; overwrites ``gram`` and ``kernel``.

    ``kernel`` may be float32. Let A be the inverse, D the columns of a block, ``A_DD = L Lᵀ`` and
    ``B = L⁻¹ A_D``. Removing D subtracts ``Bᵀ B`` from the inverse and ``Bᵀ L⁻¹ W_D`` from the
    refit kernel. The update of the inverse is delayed until `PENDING` columns are removed; rows and
    diagonal entries that are read before are corrected. From time to time the remaining columns are
    compacted, which saves two thirds of the work on the inverse.
    """
    n = len(gram)
    floor = np.where(gram.diagonal() > 0, 0.0, -1.0)
    _invert(gram, ridge)
    order = np.full(n, -1, np.int32)
    if not np.isfinite(gram.diagonal()).all():
        return np.arange(n, dtype=np.int32)
    left = _Remaining(gram, kernel, floor)
    at, count, near = n, n % block or block, 2 * block - -n % block
    while at:
        order[at - count : at] = left.remove(count, near)[::-1]
        at -= count
        count, near = block, 2 * block
    return order


def _invert(gram: Float[np.ndarray, "n n"], ridge: float) -> None:
    """Replaces ``gram`` by the inverse of ``gram + τD``; see `column_selection.inverse_psd`."""
    cholesky(gram, ridge, own_unit(gram.diagonal()))
    (potri,) = get_lapack_funcs(("potri",), (gram,))
    potri(gram.T, lower=0, overwrite_c=1)


class _Remaining:
    """The remaining columns, with their part of the inverse and of the refit kernel."""

    def __init__(self, inverse: np.ndarray, kernel: np.ndarray, floor: np.ndarray):
        self._inverse, self._kernel, self._floor = inverse, kernel, floor
        self._names = np.arange(len(inverse))
        self._alive = np.ones(len(inverse), bool)
        self._diagonal = inverse.diagonal().copy()
        self._norms = _squared_norms(kernel)
        # Rows B of the pending update.
        self._rows = np.zeros((0, len(inverse)), inverse.dtype)

    def remove(self, count: int, near: int) -> np.ndarray:
        """Removes ``count`` columns one after the other, chosen among the ``near`` cheapest now.

        Returns:
          Original indices of the removed columns, in this order.
        """
        cost = np.where(self._floor < 0, self._floor, self._norms / self._diagonal)
        among = np.argsort(np.where(self._alive, cost, np.inf), kind="stable")[:near]
        among = among[self._alive[among]]
        own = self._kernel[among].astype(np.float64)
        upper, lower = np.maximum(*(pair := np.ix_(among, among))), np.minimum(*pair)
        pending = self._rows[:, among]
        inner = self._inverse[upper, lower] - pending.T @ pending
        drop = among[_removal_order(inner, own @ own.T, self._floor[among], count)]
        rows = self._columns(drop)
        root = np.linalg.cholesky(rows[:, drop])
        rows = np.linalg.solve(root, rows)
        target = np.linalg.solve(root, self._kernel[drop].astype(np.float64))
        self._alive[drop] = False
        self._diagonal = np.where(self._alive, self._diagonal - (rows**2).sum(axis=0), 1.0)
        self._refit(rows, target)
        self._rows = np.concatenate([self._rows, rows])
        names = self._names[drop]
        if len(self._rows) >= PENDING:
            self._apply_pending()
        return names

    def _columns(self, at: np.ndarray) -> np.ndarray:
        """Returns rows of the symmetric inverse, with the pending update."""
        rows = np.empty((len(at), len(self._inverse)), self._inverse.dtype)
        for row, i in zip(rows, at, strict=True):
            row[:i] = self._inverse[i, :i]
            row[i:] = self._inverse[i:, i]
        return rows - self._rows[:, at].T @ self._rows

    def _refit(self, rows: np.ndarray, target: np.ndarray) -> None:
        rows, target = (a.astype(self._kernel.dtype) for a in (rows, target))
        for p, q in panels(len(self._kernel)):
            self._kernel[p:q] -= rows[:, p:q].T @ target
            self._norms[p:q] = _squared_norms(self._kernel[p:q])

    def _apply_pending(self) -> None:
        """Applies the pending update, and compacts the arrays if few enough columns remain."""
        (syrk,) = get_blas_funcs(("syrk",), (self._rows, self._inverse))
        syrk(-1.0, self._rows.T, 1.0, self._inverse.T, lower=0, overwrite_c=1)
        keep = np.flatnonzero(self._alive)
        if len(keep) <= SHRINK * len(self._alive):
            self._inverse = _compact(self._inverse, keep)
            for p, q in panels(len(keep)):
                self._kernel[p:q] = self._kernel[keep[p:q]]
            self._kernel = self._kernel[: len(keep)]
            for name in ("_names", "_floor", "_diagonal", "_norms", "_alive"):
                setattr(self, name, getattr(self, name)[keep])
        self._rows = np.zeros((0, len(self._inverse)), self._inverse.dtype)


def _squared_norms(rows: np.ndarray) -> np.ndarray:
    """Returns the squared norms of rows, float64."""
    return np.einsum("ij,ij->i", rows, rows).astype(np.float64)


def _compact(a: Float[np.ndarray, "n n"], keep: Int[np.ndarray, "k"]) -> Float[np.ndarray, "k k"]:
    """Moves some rows and columns of a lower triangle to the start of its memory."""
    flat, k = a.reshape(-1), len(keep)
    for i, row in enumerate(keep):  # never overwrites what is still to be read
        flat[i * k : i * k + i + 1] = a[row, keep[: i + 1]]
    return flat[: k * k].reshape(k, k)


def _removal_order(
    inverse: np.ndarray, products: np.ndarray, floor: np.ndarray, count: int
) -> list:
    """Chooses the columns whose removal costs least, one after the other.

    Args:
      inverse: the columns' part of the inverse; overwritten.
      products: Gram matrix of the rows of the refit kernel; overwritten.
      floor: costs below 0 for columns that are removed first, otherwise 0.
      count: number of columns to choose.

    Returns:
      Positions of the chosen columns, in order.
    """
    alive, found = np.ones(len(floor), bool), []
    for _ in range(count):
        cost = np.diagonal(products) / np.where(alive, np.diagonal(inverse), 1)
        at = int(np.argmin(np.where(alive, np.where(floor < 0, floor, cost), np.inf)))
        alive[at] = False
        found.append(at)
        share = inverse[:, at] / inverse[at, at]
        taken = np.outer(share, products[at] - share * (products[at, at] / 2))
        products -= taken + taken.T
        inverse -= np.outer(share, inverse[at])
    return found
