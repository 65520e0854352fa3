"""The table of a function's parameters: which are matrices, and why others stay dense."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from lordjax.allocation.candidates import QUANTIZERS, Candidate, candidate_bytes
from lordjax.allocation.plan import Plan
from lordjax.functions.equations.views import Matrix
from lordjax.kernels.layout import Layout, length
from lordjax.kernels.normal_float import Format
from lordjax.names import did_you_mean


@dataclasses.dataclass(frozen=True)
class FunctionSite:
    """A parameter of a function, and what the function does with it.

    Attributes:
      path: its path in the parameter tree.
      shape: its shape.
      dtype: its dtype.
      matrix: its axes as matrices; None if it is in no product.
      uses: what uses it: ``product``, or names of primitives.
      operations: multiplications and additions of its products, for one call.
      reason: why it stays dense; None: it is a site.
      bias: path of the vector that is added to its outputs; None if there is none.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    matrix: Matrix | None
    uses: tuple[str, ...]
    operations: float
    reason: str | None = None
    bias: str | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading shape of the matrices: layers that are scanned over, experts."""
        return () if self.matrix is None else tuple(size for size, _ in self.matrix.stack)

    @property
    def fan_in(self) -> int:
        """Number of inputs of each matrix; 0 if there is none."""
        return 0 if self.matrix is None else length(self.matrix.rows)

    @property
    def fan_out(self) -> int:
        """Number of outputs of each matrix; 0 if there is none."""
        return 0 if self.matrix is None else length(self.matrix.cols)

    @property
    def layout(self) -> Layout:
        """Where the matrices are in the parameter."""
        assert self.matrix is not None  # a site has one
        return Layout.of(self.shape, *self.matrix)


@dataclasses.dataclass(frozen=True)
class FunctionModule:
    """An MLP: products whose outputs reach the inputs of one other product, neuron by neuron.

    Attributes:
      name: the longest common prefix of the paths, which names it in a plan.
      ups: paths of the parameters whose outputs are the neurons.
      down: path of the parameter whose inputs are the neurons.
      biases: paths of the vectors that have one number per neuron.
      width: number of neurons.
    """

    name: str
    ups: tuple[str, ...]
    down: str
    biases: tuple[str, ...]
    width: int


@dataclasses.dataclass(frozen=True)
class Sites(Mapping[str, FunctionSite]):
    """The parameters of a function by path; printed as a table.

    Attributes:
      rows: path -> what the function does with the parameter, in the order of the program.
      modules: its MLPs.
      refused: hidden axes that are no module: path of the last product, or of the first one if
        the axis ends in none -> reason.
    """

    rows: Mapping[str, FunctionSite]
    modules: tuple[FunctionModule, ...] = ()
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __getitem__(self, path: str) -> FunctionSite:
        if path not in self.rows:
            raise KeyError(f"no parameter {path!r}; {did_you_mean(path, self.rows)}")
        return self.rows[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def names(self) -> list[str]:
        """Returns the paths of all sites."""
        return [path for path, row in self.rows.items() if row.reason is None]

    @property
    def left_dense(self) -> dict[str, str]:
        """Path -> why the parameter stays dense, for all that do."""
        return {path: row.reason for path, row in self.rows.items() if row.reason is not None}

    @property
    def function(self) -> str:
        """A checksum of what the function does with its parameters."""
        text = [(path, row.shape, row.matrix, row.uses) for path, row in self.rows.items()]
        return hashlib.sha256(repr(text).encode()).hexdigest()[:16]

    def chosen(self, where: str | None, paths: Collection[str] | None) -> list[str]:
        """Returns the paths of some sites.

        Args:
          where: regular expression that is searched in the paths; None: all.
          paths: exact paths, which may name parameters with uses besides products; None: all sites.

        Raises:
          KeyError: if no site matches, or there is no parameter of that path; suggests paths.
          ValueError: if a named parameter is no matrix; says why.
        """
        for path in paths or ():
            row = self[path]
            if row.matrix is None:
                raise ValueError(
                    f"{path}: cannot be compressed, because of {row.reason}; expected a parameter "
                    "of a product; leave it out of sites"
                )
        found = self.names() if paths is None else list(dict.fromkeys(paths))
        if where is not None:
            found = [path for path in found if re.search(where, path)]
        if not found:
            what = "the function has no site" if where is None else f"no site matches {where!r}"
            dense = [f"{path} stays dense: {why}" for path, why in [*self.left_dense.items()][:4]]
            raise KeyError("; ".join([what, did_you_mean(where or "", self.names()), *dense]))
        return found

    def nbytes(self, plan: Plan, dtype: Any = "float16") -> int:
        """Returns the bytes of all sites of a plan after it, from shapes alone.

        Args:
          plan: a plan of `compress_params`.
          dtype: dtype of what a quantized plan does not quantize.

        Raises:
          KeyError: if an entry of the plan is neither a parameter nor an MLP.
        """
        modules = {module.name: module for module in self.modules}
        factors = None if plan.factors is None else Format.parse(plan.factors)
        total = 0
        for name, rank in plan.ranks.items():
            if name in modules:
                total += self._module_bytes(modules[name], rank)
                continue
            row = self[name]
            count, shape = math.prod(row.stack), (row.fan_in, row.fan_out)
            form = plan.formats.get(name)
            one = Candidate(None if form is None else Format.parse(form), rank)
            item = jnp.dtype(dtype if plan.method in QUANTIZERS else row.dtype).itemsize
            total += count * candidate_bytes(one, shape, item, factors)
        return total

    def _module_bytes(self, module: FunctionModule, width: int | None) -> int:
        """Returns the bytes of the matrices of an MLP with some neurons; None: all."""
        paths = (*module.ups, module.down)
        whole = sum(math.prod(self[p].shape) * jnp.dtype(self[p].dtype).itemsize for p in paths)
        return whole if width is None else whole // module.width * width

    def __str__(self) -> str:
        rows = [("parameter", "matrix", "operations", "uses", "stays dense because")]
        for row in self.rows.values():
            stack = "x".join(map(str, row.stack))
            matrix = f"{stack + ' x ' if stack else ''}{row.fan_in} -> {row.fan_out}"
            shown = matrix if row.matrix is not None else str(list(row.shape))
            uses = ", ".join(row.uses)
            rows.append((row.path, shown, f"{row.operations:.3g}", uses, row.reason or ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [
            f"MLP {module.name}: {', '.join(module.ups)} -> {module.down}, {module.width} neurons"
            for module in self.modules
        ]
        lines += [f"no MLP at {path}: {reason}" for path, reason in self.refused.items()]
        return "\n".join(lines)


def reason_of(
    shape: tuple[int, ...], matrices: Collection[Matrix], others: Collection[str]
) -> str | None:
    """Returns why a parameter stays dense, or None if it is a site.

    Args:
      shape: its shape.
      matrices: the different matrices that products see.
      others: names of its other uses.
    """
    names = ", ".join(sorted(set(others)))
    if not matrices:
        return f"no product uses it, but {names}" if names else "nothing uses it"
    if len(matrices) > 1:
        return "products see it as different matrices"
    (matrix,) = matrices
    if min(length(matrix.rows), length(matrix.cols)) == 1:
        return "one input or one output"
    if names:
        return f"also used by {names}; name it in sites= to compress it all the same"
    return None


def is_float(leaf: Any) -> bool:
    """Returns whether a leaf is an array of floating-point numbers with an axis."""
    return len(leaf.shape) >= 1 and jnp.issubdtype(leaf.dtype, jnp.floating)
