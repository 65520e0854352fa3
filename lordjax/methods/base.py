"""What a method is: statistics it needs, a rank-free factorisation, and a slice.

A method sees matrices and statistics; it knows no model, no file, no device.
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


@flax.struct.dataclass
class Factors:
    """A factorisation for all ranks at once; rank r is a slice.

    Attributes:
      left: ``[in, m]``, columns by falling importance.
      right: ``[m, out]``.
      spectrum: ``[m]``, non-increasing; the error at rank r is ``sum(spectrum[r:])`` in the
        method's own measure.
      mean_in: ``[m]`` mean of ``x @ left``, or None if the method keeps the bias as it is.
      mean_out: ``[out]`` mean of the layer's output without its bias, or None.
    """

    left: Any
    right: Any
    spectrum: Any
    mean_in: Any = None
    mean_out: Any = None


@flax.struct.dataclass
class ModuleFactors:
    """What a module needs to be cut to any width.

    Attributes:
      spectrum: ``[widths]``; the error at width r is ``sum(spectrum[r:])`` in the method's measure.
      parts: arrays that the module's ``narrow`` reads.
    """

    spectrum: Any
    parts: dict[str, Any]


Kernels = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Module:
    """How a method compresses layers that share an inner width.

    Attributes:
      factor: ``(kernels in head form, stats) -> ModuleFactors``; pure, jittable.
      narrow: ``(kernels, factors, width) -> `` the kernels that change, by name; ``out_bias`` is
        what to add to the last layer's bias.
      needs: names of the statistics that ``factor`` reads: ``moments`` (of what the last layer is
        fed), ``queries``, ``keys``, ``values`` (second moments of heads), ``gradients`` (at the
        module's output), ``gates`` (of rotary pairs).
      bias: whether the result carries a bias correction.
      host: ``factor`` for arrays that are the host's, in less memory and time; empties its
        ``stats``. None: there is no such form.
      host_work: operations of ``host`` on arrays of some shapes, by the kinds of `flops`.
    """

    factor: Callable[[Kernels, Mapping[str, Any]], ModuleFactors]
    narrow: Callable[[Kernels, ModuleFactors, int], dict[str, Any]]
    needs: tuple[str, ...]
    bias: bool = False
    host: Callable[[Kernels, dict[str, Any]], ModuleFactors] | None = None
    host_work: Callable[[Mapping[str, Any], Mapping[str, Any]], Counter[str]] | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of `METHODS`.

    Attributes:
      summary: one line for tables and ``--help``.
      factor: ``(kernel [in, out], stats) -> Factors`` for linear layers on their own; pure,
        jittable, one compile per shape. None: those that no module covers stay as they are.
      needs: names of the statistics that ``factor`` reads: ``moments`` (of inputs or outputs,
        whichever is smaller), ``inputs`` (moments of the inputs), ``abs_mean``, and of
        `collect.observe_gradients` ``gradients``, ``row_fisher``, ``fisher``, ``weighted_inputs``,
        ``weighted_squares``.
      bias: whether ``factor``'s result carries a bias correction.
      modules: kind of module (``mlp``, ``qk``, ``vo``) -> how it is compressed as one.
      allocation: the default policy of `allocate`.
      prefix: ``dense``: statistics from the untouched model, in one pass; ``compressed``: block
        after block from the model compressed so far; ``corrective``: likewise, fitting the
        untouched model's outputs.
      exceptions: layer in the block (``attention/v``) -> name of the method used there instead;
        its ``needs`` are among this method's.
    """

    summary: str
    factor: Callable[[Array, Mapping[str, Any]], Factors] | None
    needs: tuple[str, ...] = ()
    bias: bool = False
    modules: Mapping[str, Module] = dataclasses.field(default_factory=dict)
    allocation: str = "uniform"
    prefix: str = "dense"
    exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of site that it compresses; ``linear`` are those on their own."""
        alone = () if self.factor is None else ("linear",)
        return frozenset((*self.modules, *alone))

    @property
    def in_nats(self) -> bool:
        """Whether predicted errors are estimates of the loss, which compare across sites."""
        needs = [module.needs for module in self.modules.values()]
        needs += [] if self.factor is None else [self.needs]
        return all({"gradients", "gates"} & set(names) for names in needs)


def truncate(factors: Factors, rank: int) -> tuple[LowRank, Float[Array, "out"] | None]:
    """The kernel of one rank, and what to add to the layer's bias (None for most methods)."""
    left, right = factors.left[:, :rank], factors.right[:rank]
    kernel = LowRank(left, right)
    if factors.mean_out is None:
        return kernel, None
    return kernel, factors.mean_out - mm(factors.mean_in[None, :rank], right)[0]
