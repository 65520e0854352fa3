"""Column selection on the host, in place: `linalg`'s, by LAPACK in one triangle of one array.

XLA keeps a matrix, its factor and its inverse side by side, and knows no symmetric product. Where
the arrays are the host's anyway, LAPACK needs one of them, half of the operations and no compiler;
on accelerators `linalg` runs. Both choose the same columns.

Matrices are float64 in C order, and of a symmetric one only the lower triangle is read and
written. To LAPACK, which counts along columns, that is the upper one of the transpose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import blas, lapack

from lordjax.methods.column_selection import JITTER
from lordjax.methods.linalg import mean_unit, own_unit

PANEL = 512  # rows that are worked on at a time: what they make fits the cache
PENDING = 256  # removed columns whose effect on the inverse is carried out in one product
SHRINK = 7 / 8  # of the columns are left: time to move them together


def cholesky(a: Float[np.ndarray, "n n"], first: float, unit: Any) -> None:
    """The lower factor of ``a + τ diag(unit)`` in place of ``a``; as `linalg.jittered`."""
    diagonal = a.diagonal().copy()
    share, index = first, np.arange(len(a))
    # The other triangle keeps what a failed attempt has to be undone with.
    for p, q in panels(len(a)):
        a[:p, p:q] = a[p:q, :p].T
        own = a[p:q, p:q]
        own[:] = np.tril(own) + np.tril(own, -1).T
    while True:
        a[index, index] = diagonal + share * unit
        failed = lapack.dpotrf(a.T, lower=0, clean=0, overwrite_a=1)[1]
        if not failed and np.isfinite(a[-1, -1]):
            return
        if not share < 1:  # larger than the matrix itself: it holds NaN
            a.fill(np.nan)
            return
        for p, q in panels(len(a)):
            a[p:q, :p] = a[:p, p:q].T
            own = a[p:q, p:q]
            own[:] = np.triu(own) + np.triu(own, 1).T
        share *= 10


def panels(n: int) -> list[tuple[int, int]]:
    """Begin and end of the panels of n rows."""
    return [(p, min(p + PANEL, n)) for p in range(0, n, PANEL)]


def leverage_complement(gram: Float[np.ndarray, "n n"], ridge: float) -> Float[np.ndarray, "n"]:
    """`column_selection.leverage_complement`; ``gram`` is lost."""
    empty = ~(gram.diagonal() > 0)
    cholesky(gram, ridge, mean_unit(gram.diagonal()))
    lapack.dtrtri(gram.T, lower=0, overwrite_c=1)
    h = np.zeros(len(gram))
    for p, q in panels(len(gram)):
        h[:p] += np.einsum("ij,ij->j", gram[p:q, :p], gram[p:q, :p])
        h[p:q] += (np.tril(gram[p:q, p:q]) ** 2).sum(axis=0)
    h[empty] = np.inf
    return h


def nested_refit(
    gram: Float[np.ndarray, "n n"], kernel: Float[np.ndarray, "n m"], ridge: float = JITTER
) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, "n m"]]:
    """`column_selection.nested_refit` in float32; destroys ``gram`` (and an order-F ``kernel``)."""
    cholesky(gram, ridge, own_unit(gram.diagonal()))
    right = blas.dtrmm(1.0, gram.T, kernel, lower=0, overwrite_b=1)
    del kernel
    right = right.astype(np.float32, order="C")
    # What is not written of zeros takes no memory.
    lower = np.zeros(gram.shape, np.float32)
    for p, q in panels(len(gram)):
        lower[p:q, :p] = gram[p:q, :p]
        lower[p:q, p:q] = np.tril(gram[p:q, p:q])
    return lower, right


def elimination_order(
    gram: Float[np.ndarray, "n n"],
    kernel: Float[np.ndarray, "n m"],
    ridge: float = JITTER,
    block: int = 32,
) -> Int[np.ndarray, "n"]:
    """`column_selection.elimination_order`; ``gram`` and ``kernel`` (float32 will do) are lost.

    With A the inverse, D the columns of a block, ``A_DD = L Lᵀ`` and ``B = L⁻¹ A_D``, removing
    them takes ``Bᵀ B`` off the inverse and ``Bᵀ L⁻¹ W_D`` off the refit kernel. The former waits
    until `PENDING` columns are gone, and the rows and diagonal that are read before are mended;
    those that are left move together from time to time, so that a third of the work is saved twice.
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
    """``gram`` becomes the inverse of ``gram + τD``; as `column_selection.inverse_psd`."""
    cholesky(gram, ridge, own_unit(gram.diagonal()))
    lapack.dpotri(gram.T, lower=0, overwrite_c=1)


class _Remaining:
    """Columns that are left, and their part of the inverse and of the refit kernel."""

    def __init__(self, inverse: np.ndarray, kernel: np.ndarray, floor: np.ndarray):
        self._inverse, self._kernel, self._floor = inverse, kernel, floor
        self._names = np.arange(len(inverse))
        self._alive = np.ones(len(inverse), bool)
        self._diagonal = inverse.diagonal().copy()
        self._norms = _squared_norms(kernel)
        self._rows = np.zeros((0, len(inverse)))  # B of what is pending

    def remove(self, count: int, near: int) -> np.ndarray:
        """Removes the ``count`` cheapest, one after the other, of the ``near`` cheapest now."""
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
        """Rows of the symmetric inverse, with what is pending."""
        rows = np.empty((len(at), len(self._inverse)))
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
        """Carries out what is pending, and moves together what is left if that is much less."""
        blas.dsyrk(-1.0, self._rows.T, 1.0, self._inverse.T, lower=0, overwrite_c=1)
        keep = np.flatnonzero(self._alive)
        if len(keep) <= SHRINK * len(self._alive):
            self._inverse = _compact(self._inverse, keep)
            for p, q in panels(len(keep)):
                self._kernel[p:q] = self._kernel[keep[p:q]]
            self._kernel = self._kernel[: len(keep)]
            for name in ("_names", "_floor", "_diagonal", "_norms", "_alive"):
                setattr(self, name, getattr(self, name)[keep])
        self._rows = np.zeros((0, len(self._inverse)))


def _squared_norms(rows: np.ndarray) -> np.ndarray:
    """Squared norms of rows."""
    return np.einsum("ij,ij->i", rows, rows).astype(np.float64)


def _compact(a: Float[np.ndarray, "n n"], keep: Int[np.ndarray, "k"]) -> Float[np.ndarray, "k k"]:
    """Some rows and columns of a lower triangle, at the beginning of its memory."""
    flat, k = a.reshape(-1), len(keep)
    for i, row in enumerate(keep):  # never behind what is still to be read
        flat[i * k : i * k + i + 1] = a[row, keep[: i + 1]]
    return flat[: k * k].reshape(k, k)


def _removal_order(
    inverse: np.ndarray, products: np.ndarray, floor: np.ndarray, count: int
) -> list:
    """Of a few columns those whose removal costs least, each after those before it.

    Args:
      inverse: their part of the inverse; is lost.
      products: of the rows of the refit kernel with each other; are lost.
      floor: costs below 0, of columns that go first.
      count: how many.
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
