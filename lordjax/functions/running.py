"""`compressed`: a function that takes kernels in place of its parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lordjax.functions.equations.interpreter import Interpreter, bind
from lordjax.functions.equations.neurons import Neurons
from lordjax.functions.equations.tracing import Apply, Call, jitted_once, open_call, trace
from lordjax.functions.equations.views import (
    Matrix,
    View,
    inputs_of,
    product_of,
    result_of,
    view_of,
)
from lordjax.kernels.base import Kernel, is_kernel, materialize
from lordjax.kernels.kinds import check
from lordjax.kernels.layout import Layout, Rearranged, dimensions, rearranged
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.pruned import Pruned


def compressed(apply: Apply) -> Apply:
    """Returns a function like ``apply`` whose parameters may be kernels.

    The products with a kernel are computed from its factors or codes, along the axes that the
    program itself contracts. Where a kernel is used in another way than in a product, it is
    multiplied out there; `lordjax.find_sites` lists such uses. All other equations are the
    original's, custom derivatives and rematerialization included.

    Args:
      apply: function ``(params, *args, **kwargs) -> outputs``. Its first argument is a pytree of
        arrays. Other arguments that are not arrays, such as flags, are constants.

    Returns:
      A function of the same signature. It works under ``jit``, ``grad``, ``vmap``, ``scan``,
      ``remat``, ``pmap`` and ``shard_map``; called alone it is jitted. It also takes parameters
      that are all arrays. Gradients of `LowRank` factors are arrays in the same places.

    Raises:
      ValueError: when called, if the arrays of a kernel do not fit each other, or the function
        fails with a tree that lacks leaves of the first call; names their paths.
    """
    programs: dict[Any, Callable[..., Any]] = {}
    first: list[frozenset[str]] = []  # paths of the first call that succeeded

    @functools.wraps(apply)
    def run(params: Any, *args: Any, **kwargs: Any) -> Any:
        call = open_call(params, args, kwargs, kernels=True)
        for path, leaf in zip(call.paths, call.leaves, strict=True):
            check(leaf, path)
        program = _program(programs, apply, call)
        try:
            found = program(call.leaves, call.inputs)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            _check_structure(call.paths, first, error)
            raise
        first[:] = first or [frozenset(call.paths)]
        return found

    return run


def _check_structure(
    paths: Collection[str], first: Collection[frozenset[str]], error: Exception
) -> None:
    """Raises ValueError if a function failed with a tree of another structure than before."""
    for known in first:
        if known != set(paths):
            missing, new = (sorted(a)[:4] for a in (known - {*paths}, {*paths} - known))
            raise ValueError(
                f"the function fails with this tree ({type(error).__name__}: {error}); expected "
                f"the structure of the first call: missing {', '.join(missing) or 'nothing'}, new "
                f"{', '.join(new) or 'nothing'}"
            ) from error


def _program(programs: dict[Any, Any], apply: Apply, call: Call) -> Callable[..., Any]:
    """Returns the jitted function of one structure; not jitted with unhashable constants."""

    def interpret(leaves: list[Any], inputs: list[Any]) -> Any:
        own = call._replace(leaves=leaves, inputs=inputs)
        views = [kernel_view(*pair) for pair in zip(call.paths, leaves, strict=True)]
        return trace(apply, own).run(Runner(), [*views, *inputs])

    return jitted_once(programs, call.key, interpret)


def kernel_view(path: str, leaf: Any) -> Any:
    """Returns the view of a parameter if it is a kernel, else the parameter itself."""
    if not isinstance(leaf, Kernel):
        return leaf
    if isinstance(leaf, Rearranged):
        kernel, layout = leaf.kernel, leaf.layout
    else:
        kernel, layout = leaf, Layout.of(leaf.shape[-2:], (), *dimensions(leaf.shape[-2:]))
    if not isinstance(kernel, Kernel):  # an array in another dtype or layout
        return leaf.materialize()
    lead = leaf.shape[: len(leaf.shape) - len(layout.shape)]
    stack = (*layout.lead(lead), *layout.stack)
    matrix = Matrix(stack, layout.rows, layout.cols)
    return view_of(path, kernel, leaf.shape, leaf.dtype, matrix)


class Runner(Interpreter):
    """Multiplies with kernels."""

    def product(self, eqn: Any, view: View, other: Any, *, first: bool) -> Any:
        """Returns the product with a kernel from its factors or codes."""
        if isinstance(view.value, Pruned):
            return self._pruned(eqn, view, view.value, other, first)
        if isinstance(other, Neurons):
            other = self.expose(other, f"the product with {view.path}")
        found = product_of(view, other.ndim, eqn.params, first=first)
        kernel = _as_seen(view.value, view.matrix, found.inner)
        if kernel is None:
            dense = self.dense(view, "dot_general")
            return bind(eqn, [dense, other] if first else [other, dense])[0]
        x = inputs_of(other, view, found)
        multiply = functools.partial(times, params=eqn.params, dtype=view.dtype)
        for _ in found.inner.stack:
            multiply = jax.vmap(multiply)
        y = result_of(multiply(x, kernel), view, found)
        return y.astype(eqn.outvars[0].aval.dtype)

    def _pruned(self, eqn: Any, view: View, kernel: Pruned, other: Any, first: bool) -> Any:
        """Returns the product with a pruned matrix: `Neurons`, or what these end in."""
        narrow = narrowed(view, kernel)
        if narrow is None:
            other = self.expose(other, view.path) if isinstance(other, Neurons) else other
            dense = self.dense(view, "dot_general")
            return bind(eqn, [dense, other] if first else [other, dense])[0]
        found = product_of(view, other.ndim, eqn.params, first=first)
        x = other.value if isinstance(other, Neurons) else other
        y = bind(eqn, [narrow, x] if first else [x, narrow])[0]
        if kernel.rows:
            return y
        dim = len(found.batch) + (0 if first else len(found.tokens))
        return Neurons(y, dim, frozenset([view.path]))

    def vector(self, view: View) -> Neurons | None:
        """Returns a pruned bias."""
        narrow = narrowed(view, view.value) if isinstance(view.value, Pruned) else None
        if narrow is None:
            return None
        place = next(i for i, axes in enumerate(view.dims) if axes)
        return Neurons(narrow, place, frozenset([view.path]))

    def expose(self, neurons: Neurons, use: str) -> Any:
        """Refuses: neurons that are gone cannot be used otherwise."""
        raise ValueError(
            f"{', '.join(sorted(neurons.paths))}: was pruned, but {use} uses its neurons; expected "
            "elementwise functions up to one product; compress it for this function again"
        )


def narrowed(view: View, kernel: Pruned) -> Any:
    """Returns a pruned matrix in the shape of the view, with fewer neurons; None if it cannot."""
    assert view.matrix is not None  # set for every kernel
    own = view.matrix.rows if kernel.rows else view.matrix.cols
    if len(own) != 1 or own not in view.dims:
        return None
    new = ((kernel.width, own[0][1]),)
    dims = [new if axes == own else axes for axes in view.dims]
    matrix = [new if axes == own else axes for axes in view.matrix.dims]
    return rearranged(materialize(kernel.kernel), matrix, dims).astype(view.dtype)


def _as_seen(kernel: Any, own: Matrix | None, seen: Matrix) -> Any:
    """Returns a kernel of the matrices that a product sees; None if it must be multiplied out."""
    if own == seen:
        return kernel
    pair = isinstance(kernel, LowRank) and not any(map(is_kernel, (kernel.left, kernel.right)))
    if pair and own is not None and own.transposed == seen:
        return LowRank(kernel.right.mT, kernel.left.mT)
    return None


def times(x: Any, kernel: Any, params: dict[str, Any], dtype: Any) -> Any:
    """Returns ``x @ kernel`` as a ``dot_general`` would compute it.

    Args:
      x: inputs ``[..., in]``.
      kernel: a kernel ``[in, out]``.
      params: parameters of the equation: precision and dtype of the result.
      dtype: dtype in which the program has the parameter.
    """
    precision, wide = params["precision"], params["preferred_element_type"]
    if isinstance(kernel, LowRank) and not any(map(is_kernel, (kernel.left, kernel.right))):
        for factor in (kernel.left, kernel.right):
            # The inner product stays in the dtype of the result, which may be the wider one.
            factor = factor.astype(_wider(dtype, x.dtype))
            dims = (((x.ndim - 1,), (0,)), ((), ()))
            x = lax.dot_general(x, factor, dims, precision, preferred_element_type=wide)
        return x
    x = x if wide is None else x.astype(_wider(wide, x.dtype))
    if precision is None:
        return kernel.matmul(x)
    with jax.default_matmul_precision(_precision(precision)):
        return kernel.matmul(x)


def _wider(first: Any, second: Any) -> Any:
    """Returns the wider of two floating-point dtypes; also where JAX would not mix them."""
    return max(jnp.dtype(first), jnp.dtype(second), key=lambda dtype: dtype.itemsize)


def _precision(precision: Any) -> str:
    """Returns the name of the higher precision of a pair, or of an algorithm."""
    pair = precision if isinstance(precision, tuple) else (precision,)
    return max(pair, key=lambda each: getattr(each, "value", 0)).name.lower()
