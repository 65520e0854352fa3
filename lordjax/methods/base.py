"""The interface of a method: the statistics it needs, and a factorization for all ranks.

Methods work on matrices and statistics. They know nothing of models, files or devices.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
from jaxtyping import Array, Float

from lordjax.kernels.low_rank import LowRank
from lordjax.methods.linalg import mm

STOCK = "stock"  # allocation policy of methods whose results a family's own config can describe


@flax.struct.dataclass
class Factors:
    """A factorization of a kernel for all ranks at once; rank r is a slice.

    Attributes:
      left: left factor ``[in, m]``, columns by decreasing importance.
      right: right factor ``[m, out]``.
      spectrum: ``[m]``, non-increasing. The error at rank r is ``sum(spectrum[r:])``, in the unit
        of the method.
      mean_in: ``[m]`` mean of ``x @ left``, or None if the method does not change the bias.
      mean_out: ``[out]`` mean of the layer's output without its bias, or None.
      held_out: ``[m + 1]`` error at every rank on tokens that the factors have not seen, or None.
    """

    left: Any
    right: Any
    spectrum: Any
    mean_in: Any = None
    mean_out: Any = None
    held_out: Any = None


@flax.struct.dataclass
class ModuleFactors:
    """A factorization of a module for all widths at once.

    Attributes:
      spectrum: ``[widths]``. The error at width r is ``sum(spectrum[r:])``, in the unit of the
        method.
      parts: the arrays that `Module.prune` reads, by name.
      held_out: ``[widths + 1]`` error at every width on tokens that the factors have not seen, or
        None.
    """

    spectrum: Any
    parts: dict[str, Any]
    held_out: Any = None


Kernels = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Module:
    """How a method compresses layers that share an inner width.

    Attributes:
      factor: function ``(kernels in head form, stats) -> ModuleFactors``; pure and jittable.
      prune: function ``(kernels, factors, width) -> dict`` of the kernels that change, by name.
        ``out_bias`` is added to the last layer's bias.
      needs: names of the statistics that ``factor`` reads: ``moments`` (inputs of the last layer),
        ``queries``, ``keys``, ``values`` (second moments of heads), ``gradients`` (at the module's
        output), ``gates`` (saliency of rotary pairs).
      bias: whether the result has a bias correction.
      host: a version of ``factor`` for arrays on the host that takes less memory and time, and
        empties its ``stats``; None if there is none. ``dtype=`` is the dtype in which it computes.
      host_work: function ``(kernels, stats, folds=) -> Counter`` of the operations of ``host`` and
        ``host_errors``, by the kinds of `lordjax.runtime.flops`.
      errors: function ``(kernels, factors, stats) -> [widths + 1]``: the errors of factors at
        every width, by statistics of other tokens; pure and jittable.
      host_errors: a version of ``errors`` for arrays on the host.
    """

    factor: Callable[[Kernels, Mapping[str, Any]], ModuleFactors]
    prune: Callable[[Kernels, ModuleFactors, int], dict[str, Any]]
    needs: tuple[str, ...]
    bias: bool = False
    host: Callable[..., ModuleFactors] | None = None
    host_work: Callable[..., Counter[str]] | None = None
    errors: Callable[[Kernels, ModuleFactors, Mapping[str, Any]], Any] | None = None
    host_errors: Callable[[Kernels, ModuleFactors, dict[str, Any]], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """A compression method; `lordjax.methods.METHODS` lists all of them.

    Attributes:
      summary: one line for tables and ``--help``.
      factor: function ``(kernel [in, out], stats) -> Factors`` for single linear layers; pure and
        jittable, compiled once per shape. With None, layers outside ``modules`` stay dense.
      needs: names of the statistics that ``factor`` reads: ``moments`` (of inputs or outputs,
        whichever is smaller), ``inputs`` (moments of the inputs), ``abs_mean``, and from the
        backward pass ``gradients``, ``row_fisher``, ``fisher``, ``weighted_inputs``,
        ``weighted_squares``.
      bias: whether the result of ``factor`` has a bias correction.
      modules: kind of module (``mlp``, ``qk``, ``vo``) -> how its layers are compressed together.
      allocation: the default policy of `lordjax.allocate`.
      prefix: how statistics are collected. ``dense``: from the original model, in one pass;
        ``compressed``: block by block, from the model compressed so far; ``corrective``: as
        ``compressed``, and the original model's outputs are the target.
      errors: function ``(kernel, factors, stats) -> [m + 1]``: the errors of factors at every rank,
        by statistics of other tokens; pure and jittable.
      exceptions: layer in the block (``attention/v``) -> name of the method that is used there
        instead. Its ``needs`` must be among this method's.
      multiple: ranks are multiples of this by default, because engines want such widths; None:
        the default of `allocate`.
    """

    summary: str
    factor: Callable[[Array, Mapping[str, Any]], Factors] | None
    needs: tuple[str, ...] = ()
    bias: bool = False
    modules: Mapping[str, Module] = dataclasses.field(default_factory=dict)
    allocation: str = "uniform"
    prefix: str = "dense"
    exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    errors: Callable[[Array, Factors, Mapping[str, Any]], Any] | None = None
    multiple: int | None = None

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of sites that the method compresses; ``linear`` stands for single layers."""
        alone = () if self.factor is None else ("linear",)
        return frozenset((*self.modules, *alone))

    @property
    def stock(self) -> bool:
        """Whether the result is a model of the same class with smaller sizes."""
        return self.allocation == STOCK

    @property
    def in_nats(self) -> bool:
        """Whether predicted errors estimate the loss in nats, so that they compare across sites."""
        needs = [module.needs for module in self.modules.values()]
        needs += [] if self.factor is None else [self.needs]
        return all({"gradients", "gates"} & set(names) for names in needs)


def truncate(factors: Factors, rank: int) -> tuple[LowRank, Float[Array, "out"] | None]:
    """Returns the kernel of one rank, and the correction of the layer's bias.

    Args:
      factors: the factorization for all ranks.
      rank: the rank, at least 1.

    Returns:
      The low-rank kernel, and what to add to the bias ``[out]``; None if the method does not change
      it.
    """
    left, right = factors.left[:, :rank], factors.right[:rank]
    kernel = LowRank(left, right)
    if factors.mean_out is None:
        return kernel, None
    return kernel, factors.mean_out - mm(factors.mean_in[None, :rank], right)[0]
