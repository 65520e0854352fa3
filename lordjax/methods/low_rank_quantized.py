"""W ≈ Q + L R: NormalFloat codes and a low-rank product that makes up for what they miss.

Alternates between the best product for the codes' error and the codes of what the product leaves::

    L R <- best of rank r for W - Q,    Q <- codes of W - L R

starting from Q = 0 (LQ-LoRA), and keeps the best iterate. "Best" is in the
measure ``Σ_j c_j e_jᵀ H e_j`` over the columns e_j of the error, for which the low-rank step has a
closed form; H and c are what `Weights` holds (x input, g loss gradient at the output, F sum over
windows of squared weight gradients):

==========  ==================  ================  =====================================
weighting   H (inputs)          c (outputs)       measure
==========  ==================  ================  =====================================
none        identity            1                 squared error of the weights
fisher      diag(mean_j F_ij)   mean_i F_ij       Σ F_ij E_ij² (LQ-LoRA)
input       E xxᵀ               1                 squared error of the output (QERA)
both        E ‖g‖² xxᵀ          E ‖x‖² g_j²       about the loss, to second order
==========  ==================  ================  =====================================

With `Weights.feedback` codes make up for each other (`feedback`); without, each is the nearest.

Beyond the paper: that; the best iterate instead of the one after it; the product is fitted last,
so that it is optimal for its codes; the quantised start is a candidate, so that no result is worse
than the codes alone; full H at no inverse; subspaces carried from one alternation to the next,
which saves most of an SVD; the rank is traced.

Sources: LQ-LoRA, arXiv 2311.12023; LoftQ, 2310.08659; QERA, 2410.06040; theory/lq_lora §2, §7.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lordjax import nf
from lordjax.linalg import mm, orthonormal_rows
from lordjax.methods.feedback import best_shares, quantize, scaled_by

STEPS = 10  # alternations; the first five gain most, at 2 bits more lose (theory/lq_lora §2.5)
OVERSAMPLING = 10  # columns of the subspace beyond the rank
FIRST_POWERS, POWERS = 3, 1  # power iterations from a random subspace, and from the last one
FLOOR = 1e-8  # share of their mean that weights are raised by: a weight of 0 has no inverse


class Weights(NamedTuple):
    """What an error of a kernel ``[in, out]`` costs.

    Attributes:
      inputs: ``[in, in]`` second moment of the inputs, its diagonal ``[in]``, or None.
      outputs: ``[out]``, or None.
      elements: ``[in, out]``, or None: measures errors in place of the others' product.
      feedback: `feedback.Feedback` of ``inputs``: how codes are found; None: each by itself.
    """

    inputs: Any = None
    outputs: Any = None
    elements: Any = None
    feedback: Any = None

    def times_inputs(self, a: Float[Array, "n in"]) -> Float[Array, "n in"]:
        """``a H``."""
        if self.inputs is None:
            return a
        return mm(a, self.inputs) if self.inputs.ndim == 2 else a * self.inputs[None]

    def root_outputs(self) -> Float[Array, "out 1"] | Float[Array, "1 1"]:
        """``√c``, all above 0."""
        if self.outputs is None:
            return jnp.ones((1, 1))
        mean = jnp.mean(self.outputs)
        return jnp.sqrt(self.outputs + FLOOR * jnp.where(mean > 0, mean, 1))[:, None]

    def measure(self, error: Float[Array, "in out"]) -> Float[Array, ""]:
        """What an error costs."""
        if self.elements is not None:
            return jnp.sum(self.elements * error**2)
        scaled = error.T * self.root_outputs()
        return jnp.sum(scaled * self.times_inputs(scaled))


class Product(NamedTuple):
    """``left @ right`` of a rank, the remaining columns zero, and where it was found.

    Attributes:
      left: ``[in, width]``.
      right: ``[width, out]``, of the same norms.
      basis: ``[k, out]`` orthonormal rows; a start for the next search.
      energies: ``[k]`` what each direction takes off the measure, falling if they were sorted.
      total: ``[]`` the measure of the matrix itself.
    """

    left: Any
    right: Any
    basis: Any
    energies: Any
    total: Any

    def transposed(self) -> Float[Array, "out in"]:
        """The product, outputs along rows."""
        return mm(self.right.T, self.left.T)


def start_basis(shape: tuple[int, ...], width: int, seed: int = 0) -> Float[Array, "k out"]:
    """A random subspace to begin with, wide enough for rank ``width``."""
    k = min(width + OVERSAMPLING, *shape)
    return jax.random.normal(jax.random.key(seed), (k, shape[1]))


def best_product(
    matrix: Float[Array, "in out"],
    rank: Int[Array, ""],
    weights: Weights,
    basis: Float[Array, "k out"],
    *,
    width: int,
    powers: int,
    sort: bool = True,
) -> Product:
    """The product of a rank that is closest to ``matrix``, by subspace iteration.

    With ``A = √c·matrixᵀ H matrix·√c`` and V its leading eigenvectors, it is
    ``matrix·√c V Vᵀ/√c``: no root of H and no inverse is needed (theory/lq_lora §7.3a).

    Args:
      matrix: what to approximate.
      rank: at most ``width``; may be traced.
      weights: the measure; ``elements`` are not used.
      basis: of the search; near the answer, one power is enough.
      width: columns of the result; those from ``rank`` on are zero.
      powers: power iterations.
      sort: turn the subspace so that its best directions come first; those of a sorted ``basis``
        stay in order by themselves.
    """
    # Outputs run along rows, as codes are stored, and subspaces are rows too: a product with the
    # transpose of a large matrix then reads it in order.
    root = weights.root_outputs()
    scaled = matrix.T * root
    heavy = weights.times_inputs(scaled)
    for _ in range(powers):
        basis = orthonormal_rows(mm(mm(basis, heavy), scaled.T))
    inner = mm(basis, scaled)
    within = mm(mm(basis, heavy), inner.T)
    energies = jnp.diagonal(within)
    if sort:
        energies, turn = jnp.linalg.eigh(within)
        energies, turn = energies[::-1], turn[:, ::-1].T
        basis, inner = mm(turn, basis), mm(turn, inner)
    energies = jnp.maximum(energies, 0)
    missing = ((0, max(0, width - len(basis))), (0, 0))
    left = jnp.pad(inner, missing)[:width].T
    right = jnp.pad(basis / root.T, missing)[:width]
    kept = jnp.arange(width) < rank
    norms = jnp.linalg.norm(left, axis=0), jnp.linalg.norm(right, axis=1)
    kept = kept & (norms[0] > 0) & (norms[1] > 0)
    balance = jnp.sqrt(jnp.where(kept, norms[1], 1) / jnp.where(kept, norms[0], 1))
    left = left * jnp.where(kept, balance, 0)[None]
    right = right * jnp.where(kept, 1 / balance, 0)[:, None]
    return Product(left, right, basis, energies, jnp.sum(scaled * heavy))


class Decomposition(NamedTuple):
    """A kernel as codes and a product.

    Attributes:
      codes: `nf.Codes` of the transposed kernel, flattened.
      left: ``[in, width]``; columns from the rank on are zero.
      right: ``[width, out]``.
      error: ``[]`` the measure of what is left.
      total: ``[]`` the measure of the kernel itself.
      history: ``[steps]`` error after each alternation from Q = 0.
    """

    codes: Any
    left: Any
    right: Any
    error: Any
    total: Any
    history: Any


def decompose(
    kernel: Float[Array, "in out"],
    rank: Int[Array, ""],
    weights: Weights,
    *,
    form: nf.Format,
    width: int,
    steps: int = STEPS,
) -> Decomposition:
    """Codes and a product for a kernel; see the module's docstring.

    Args:
      kernel: the matrix.
      rank: of the product, at most ``width``; traced, so that all ranks share one compilation.
      weights: the measure.
      form: of the codes.
      width: columns of the product that is returned.
      steps: alternations.
    """
    return _decompose(_as_rows(kernel), rank, weights, form=form, width=width, steps=steps)


@jax.jit
def _as_rows(kernel: Float[Array, "in out"]) -> Float[Array, "out in"]:
    """Outputs along rows, as codes are stored; a call of its own, lest all readers transpose."""
    return kernel.astype(jnp.float32).T


@functools.partial(jax.jit, static_argnames=("form", "width", "steps"))
def _decompose(
    rows: Float[Array, "out in"],
    rank: Int[Array, ""],
    weights: Weights,
    *,
    form: nf.Format,
    width: int,
    steps: int,
) -> Decomposition:
    """`decompose` of a transposed kernel."""

    def fit(left: Array, basis: Array, powers: int, sort: bool) -> tuple[Product, Array]:
        found = best_product(left.T, rank, weights, basis, width=width, powers=powers, sort=sort)
        if weights.elements is not None:
            return found, weights.measure((left - found.transposed()).T)
        kept = jnp.arange(len(found.energies)) < rank
        return found, found.total - jnp.sum(jnp.where(kept, found.energies, 0))

    def codes_of(target: Array) -> tuple[nf.Codes, Array]:
        codes = quantize(target, form, weights.feedback)
        return codes, missed(rows, codes, form)

    def step(state: tuple[Any, Any], _: Any) -> tuple[Any, Array]:
        product, best = state
        codes, left = codes_of(rows - product.transposed())
        product, error = fit(left, product.basis, POWERS, sort=False)
        new = (codes, product, error)
        best = jax.tree.map(lambda a, b: jnp.where(error < best[2], a, b), new, best)
        return (product, best), error

    random = start_basis(rows.shape[::-1], width)
    first = best_product(rows.T, rank, weights, random, width=width, powers=FIRST_POWERS)
    alone, left = codes_of(rows)
    (_, best), history = lax.scan(step, (first, (alone, first, jnp.inf)), None, length=steps)
    # Never worse than the codes alone: else their own product, which is LoftQ's start.
    codes, product, error = lax.cond(
        best[2] < weights.measure(left.T),
        lambda: best,
        lambda: (alone, *fit(left, random, FIRST_POWERS, sort=True)),
    )
    total = weights.measure(rows.T)
    return Decomposition(codes, product.left, product.right, error, total, history)


_stacked = functools.partial(jax.jit, static_argnames=("form", "width", "steps"))(
    lambda kernels, ranks, weights, **fixed: jax.vmap(functools.partial(decompose, **fixed))(
        kernels, ranks, weights
    )
)


def in_stacks() -> bool:
    """Whether like kernels are best decomposed together: an accelerator wants to be filled.

    A CPU is full, batched factorisations are slow there, and every length would compile again.
    """
    return jax.default_backend() != "cpu"


def decompose_all(
    kernels: Sequence[Float[Array, "in out"]],
    ranks: Sequence[int],
    weights: Sequence[Weights],
    *,
    form: nf.Format,
    width: int,
    steps: int = STEPS,
) -> list[Decomposition]:
    """`decompose` of kernels of one shape; of several as a stack where it is `in_stacks`."""
    fixed: dict[str, Any] = {"form": form, "width": width, "steps": steps}
    if not in_stacks() or len(kernels) == 1:
        rows = zip(kernels, ranks, weights, strict=True)
        return [decompose(kernel, jnp.asarray(rank), own, **fixed) for kernel, rank, own in rows]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *weights)
    found = _stacked(jnp.stack(kernels), jnp.asarray(ranks), stack, **fixed)
    return [jax.tree.map(lambda a, k=k: a[k], found) for k in range(len(kernels))]


def predict(
    kernel: Float[Array, "in out"],
    weights: Weights,
    *,
    forms: tuple[nf.Format | None, ...],
    ranks: tuple[int, ...],
) -> Float[Array, "forms ranks"]:
    """What will be left of a kernel, without alternation: about what `decompose` reaches, or above.

    Without feedback: the codes, then the best product for what they miss. With: rounding errors at
    their own prices, which takes no codes with feedback; and what a product saves of them, from
    the middle format for all. A program per format: one's arrays go before the next one's come.

    Args:
      kernel: the matrix.
      weights: the measure.
      forms: of the codes; None: there are none.
      ranks: of products; those that the kernel does not have count as the largest one it has.
    """
    rows = _as_rows(kernel)
    coded = tuple(form for form in forms if form is not None)
    if weights.feedback is None or not coded:
        return jnp.stack([_after_product(rows, weights, form=form, ranks=ranks) for form in forms])
    shares = {form: _best_shares(rows, weights.feedback, form=form) for form in coded}
    left = {form: _after_codes(rows, shares[form], weights, form=form) for form in coded}
    middle = coded[len(coded) // 2]
    saved = _saved(rows, shares[middle], left[middle], weights, form=middle, ranks=ranks)
    return jnp.stack(
        [
            _after_product(rows, weights, form=None, ranks=ranks)
            if form is None
            else left[form] * saved
            for form in forms
        ]
    )


_best_shares = jax.jit(
    lambda rows, feedback, form: best_shares(rows, form, feedback), static_argnames="form"
)


@functools.partial(jax.jit, static_argnames="form")
def _after_codes(
    target: Float[Array, "out in"],
    shares: Float[Array, "blocks"],
    weights: Weights,
    *,
    form: nf.Format,
) -> Float[Array, ""]:
    """What codes of such scales lose at their own prices."""
    flat = target.reshape(-1)
    codes = nf.round_to(flat, scaled_by(flat, shares, form), form)
    priced = Weights(weights.feedback.prices, weights.outputs)
    return priced.measure(missed(target, codes, form).T)


@functools.partial(jax.jit, static_argnames=("form", "ranks"))
def _saved(
    rows: Float[Array, "out in"],
    shares: Float[Array, "blocks"],
    alone: Float[Array, ""],
    weights: Weights,
    *,
    form: nf.Format,
    ranks: tuple[int, ...],
) -> Float[Array, "ranks"]:
    """Shares of the loss of codes alone that are left with products of some ranks."""
    width = max(ranks)
    if width == 0:
        return jnp.ones(len(ranks))
    found = _widest_product(rows, weights, width)

    def left_at(rank: Array) -> Array:
        kept = jnp.where(jnp.arange(width, dtype=jnp.float32)[:, None] < rank, found.right, 0)
        # A product that is fitted to what codes miss takes its own share of a white error.
        free = jnp.prod(1 - rank / jnp.asarray(rows.shape, jnp.float32))
        return free * _after_codes(rows - mm(kept.T, found.left.T), shares, weights, form=form)

    most = jnp.where(alone > 0, alone, 1)
    return lax.map(left_at, jnp.asarray(ranks, jnp.float32)) / most


def _widest_product(rows: Float[Array, "out in"], weights: Weights, width: int) -> Product:
    """The best product of a rank, from a random start."""
    basis, most = start_basis(rows.shape[::-1], width), jnp.asarray(width)
    return best_product(rows.T, most, weights, basis, width=width, powers=FIRST_POWERS)


def _after_product(
    rows: Float[Array, "out in"],
    weights: Weights,
    *,
    form: nf.Format | None,
    ranks: tuple[int, ...],
) -> Float[Array, "ranks"]:
    """What the best product leaves of a kernel, or of what codes miss of it."""
    error = rows if form is None else _missed_alone(rows, form=form)
    return _left_by_products(error, weights, ranks=ranks)


@functools.partial(jax.jit, static_argnames="form")
def _missed_alone(rows: Float[Array, "out in"], *, form: nf.Format) -> Float[Array, "out in"]:
    """What codes miss that know nothing of each other."""
    return missed(rows, nf.quantize(rows.reshape(-1), form), form)


@functools.partial(jax.jit, static_argnames="ranks")
def _left_by_products(
    error: Float[Array, "out in"], weights: Weights, *, ranks: tuple[int, ...]
) -> Float[Array, "ranks"]:
    """What the best products of some ranks leave of a matrix.

    Knows no format: it takes longest to compile, and one program serves all of them.
    """
    width = max(ranks)
    if width == 0:
        return jnp.full(len(ranks), weights.measure(error.T))
    found = _widest_product(error, weights, width)
    left = found.total - jnp.cumsum(found.energies)[:width]
    left = jnp.concatenate([found.total[None], left])
    left = jnp.pad(left, (0, width + 1 - len(left)), mode="edge")
    # Measured on elements, the shares are those of the two-sided approximation.
    share = weights.measure(error.T) / jnp.where(found.total > 0, found.total, 1)
    return (jnp.maximum(left, 0) * share)[jnp.asarray(ranks)]


def missed(
    rows: Float[Array, "out in"], codes: nf.Codes, form: nf.Format
) -> Float[Array, "out in"]:
    """What codes of a transposed kernel miss."""
    return rows - nf.dequantize(codes, form).reshape(rows.shape)
