"""`find_sites`: which parameters of a function are matrices, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from lordjax.functions.equations.interpreter import Interpreter, bind
from lordjax.functions.equations.neurons import Neurons
from lordjax.functions.equations.tracing import Apply, Call, Traced, open_call, trace
from lordjax.functions.equations.views import Matrix, Product, View, product_of, view_of
from lordjax.functions.modules import SEVERAL_AXES, modules_of
from lordjax.functions.sites import FunctionSite, Sites, is_float, reason_of
from lordjax.kernels.layout import Axes, length, merged


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a parameter in a program.

    Attributes:
      path: path of the parameter.
      name: ``product``, or what else uses it.
      matrix: the matrices that a product sees.
      operations: multiplications and additions of a product.
      picks: see `View`.
    """

    path: str
    name: str
    matrix: Matrix | None = None
    operations: float = 0.0
    picks: tuple[tuple[int, int, int], ...] = ()


class Recorder(Interpreter):
    """Notes every use of a parameter; each sub-program has a list of its own inside the list.

    Attributes:
      uses: the uses.
      flows: path of a matrix -> paths whose outputs are its inputs, for each of its products.
      exposed: path -> what uses its outputs besides elementwise functions.
      biases: path of a matrix -> paths of the vectors that are added to its outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[Any] = []
        self.flows: dict[str, set[frozenset[str]]] = {}
        self.exposed: dict[str, str] = {}
        self.biases: dict[str, set[str]] = {}
        self._matrices: set[str] = set()

    def product(self, eqn: Any, view: View, other: Any, *, first: bool) -> Any:
        """Notes a product and computes it."""
        found = product_of(view, other.ndim, eqn.params, first=first)
        size = math.prod(other.shape) * math.prod(length(view.dims[i]) for i in found.free)
        operations = 2.0 * size * self.trips
        self.uses.append(Use(view.path, "product", found.matrix, operations, view.picks))
        self._matrices.add(view.path)
        if isinstance(other, Neurons):
            other = self._ended(view, other, found)
        y = bind(eqn, [view.value, other] if first else [other, view.value])[0]
        if len(found.free) != 1 or not _whole(view.dims[found.free[0]], found.matrix.cols):
            self.exposed[view.path] = SEVERAL_AXES
            return y
        dim = len(found.batch) + (0 if first else len(found.tokens))
        return Neurons(y, dim, frozenset([view.path]), view.path)

    def _ended(self, view: View, neurons: Neurons, product: Product) -> Any:
        """Notes the product in which neurons end; returns their array."""
        pairs = product.contracted
        one = len(pairs) == 1 and pairs[0][1] == neurons.dim
        if not one or not _whole(view.dims[pairs[0][0]], product.matrix.rows):
            return self.expose(neurons, f"another axis of the product with {view.path}")
        self.flows.setdefault(view.path, set()).add(neurons.paths)
        return neurons.value

    def vector(self, view: View) -> Neurons | None:
        """Notes a vector that meets neurons: it may be a bias."""
        places = [i for i, axes in enumerate(view.dims) if axes]
        if len(places) != 1:
            return None
        self.uses.append(Use(view.path, "broadcast"))
        return Neurons(view.value, places[0], frozenset([view.path]), view.path)

    def joined(self, eqn: Any, values: Sequence[Any]) -> None:
        """Notes the vector that is added to a product's outputs."""
        fresh = [value.fresh for value in values if isinstance(value, Neurons)]
        matrices = [path for path in fresh if path in self._matrices]
        vectors = [path for path in fresh if path and path not in self._matrices]
        if eqn.primitive.name == "add" and len(matrices) == len(vectors) == 1:
            self.biases.setdefault(matrices[0], set()).add(vectors[0])

    def expose(self, neurons: Neurons, use: str) -> Any:
        """Notes what uses neurons otherwise."""
        for path in neurons.paths:
            self.exposed.setdefault(path, use)
        return neurons.value

    def dense(self, view: View, use: str) -> Any:
        """Notes a use that is no product."""
        self.uses.append(Use(view.path, use))
        return view.array()

    def inner(self, jaxpr: Any, trips: int = 1) -> Callable[..., Any]:
        """Runs a sub-program; if it is run again, its uses are noted once."""
        base, own = super().inner(jaxpr, trips), []
        self.uses.append(own)

        def run(*args: Any) -> Any:
            outside, self.uses = self.uses, own
            own.clear()
            try:
                return base(*args)
            finally:
                self.uses = outside

        return run


def _whole(dim: Axes, axes: Axes) -> bool:
    """Returns whether a dimension is all of some axes, in their order, as one axis."""
    return merged(dim) == axes and len(axes) == 1


def _flat(uses: Sequence[Any]) -> Iterator[Use]:
    for use in uses:
        if isinstance(use, Use):
            yield use
        else:
            yield from _flat(use)


def find_sites(apply: Apply, params: Any, *args: Any, **kwargs: Any) -> Sites:
    """Finds the products of a function with its parameters, from shapes alone.

    Nothing is computed. Trees of ``jax.ShapeDtypeStruct`` are enough.

    Args:
      apply: function ``(params, *args, **kwargs) -> outputs``.
      params: its parameters, a pytree of arrays: dicts, tuples, ``nnx.State``, dataclasses.
      *args: its other arguments, such as a batch. Arguments that are not arrays are constants.
      **kwargs: its keyword arguments.

    Returns:
      A table of the parameters with two axes or more. It says which matrix ``[in, out]`` the
      products see, in which stack, and why a parameter stays dense. ``print`` shows it.

    Raises:
      ValueError: if two leaves of ``params`` have the same path.
    """
    call = open_call(params, args, kwargs, kernels=False)
    return sites_of(call, trace(apply, call))


def sites_of(call: Call, traced: Traced) -> Sites:
    """Returns the table of a function that was traced."""
    twice = {path for path in call.paths if call.paths.count(path) > 1}
    if twice:
        raise ValueError(f"two leaves at {min(twice)!r}; expected one path for each leaf")
    recorder = Recorder()

    def run(leaves: Sequence[Any], inputs: Sequence[Any]) -> Any:
        views = [
            view_of(path, leaf, leaf.shape, leaf.dtype) if is_float(leaf) else leaf
            for path, leaf in zip(call.paths, leaves, strict=True)
        ]
        return traced.run(recorder, [*views, *inputs])

    jax.eval_shape(run, call.leaves, call.inputs)
    uses: dict[str, list[Use]] = {}
    for use in _flat(recorder.uses):
        uses.setdefault(use.path, []).append(use)
    shapes = dict(zip(call.paths, call.leaves, strict=True))
    biases = {
        path: min(found)
        for path, found in recorder.biases.items()
        if len(found) == 1 and len(uses[min(found)]) == 1
    }
    rows = {
        path: _row(path, shapes[path], uses.get(path, []), biases.get(path))
        for path in dict.fromkeys([*uses, *shapes])  # in the order of the program
        if len(shapes[path].shape) >= 2
    }
    counts = {path: len(found) for path, found in uses.items()}
    return Sites(rows, *modules_of(rows, recorder.flows, recorder.exposed, counts))


def _covered(picks: Sequence[tuple[tuple[int, int, int], ...]]) -> bool:
    """Returns whether products with slices of a stack use every matrix of it."""
    if not all(picks):  # a product with the whole stack
        return True
    sizes = {tuple((place, size) for place, size, _ in each) for each in picks}
    return len(sizes) == 1 and len(set(picks)) == math.prod(size for _, size in sizes.pop())


def _row(path: str, leaf: Any, uses: Sequence[Use], bias: str | None) -> FunctionSite:
    """Returns the row of one parameter."""
    matrices = {use.matrix for use in uses if use.matrix is not None}
    others = [use.name for use in uses if use.matrix is None]
    reason = reason_of(tuple(leaf.shape), matrices, others)
    if reason is None and not _covered([use.picks for use in uses]):
        matrices, reason = set(), "only some of its slices are in products"
    if not is_float(leaf):
        reason = f"{leaf.dtype}, which is no floating-point dtype"
    return FunctionSite(
        path,
        tuple(leaf.shape),
        leaf.dtype,
        next(iter(matrices)) if len(matrices) == 1 else None,
        tuple(use.name for use in uses),
        sum(use.operations for use in uses),
        reason,
        bias,
    )
