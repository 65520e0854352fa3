"""Error weightings: the statistics that each of them needs, and the weights computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.methods.base import Method
from lordjax.methods.linalg import INERT, inert_unit, mm

# Fraction of the mean that is added to the diagonal of the inputs' second moment. The mean comes
# from a few huge activations. GPTQ's 0.01 of it exceeds the energy of all other inputs, and leads
# to a bad choice of formats.
DAMPING = 1e-3
# Correlations of inputs that were estimated from few tokens do not hold on other text: rounding
# errors that compensate each other there add up. So all correlations are divided by 1 + λ, as for
# MLPs (`modular.mlp`), with λ in units of inputs per token.
SHRINKAGE = 3.0

# Weighting -> statistics that it needs; `lordjax.methods.quantized.lq` describes them.
WEIGHTINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "fisher": ("fisher",),
    "input": ("inputs",),
    "both": ("weighted_inputs", "weighted_squares"),
}
MOMENTS = ("input", "both")  # weightings with a second moment of inputs: allow error feedback


def make_weights(kernel: Any, stats: Mapping[str, Any]) -> Weights:
    """Returns the error weights of a kernel.

    Where no error has an effect, such as before a matrix of zeros, all errors weigh the same, and
    little: see `linalg.INERT`.

    Args:
      kernel: not used; all functions of `lordjax.methods.base.Method` take it.
      stats: the statistics of one weighting (`WEIGHTINGS`); empty for ``none``.
    """
    del kernel
    if "fisher" in stats:
        fisher = stats["fisher"]
        fisher = jnp.where(jnp.any(fisher > 0), fisher, INERT)
        return Weights(jnp.mean(fisher, axis=1), jnp.mean(fisher, axis=0), fisher)
    if not stats:
        return Weights()
    inputs, outputs = stats.get("inputs"), None
    if inputs is None:
        # The Kronecker product closest to the sum of x xᵀ ⊗ g gᵀ over all tokens: each factor is
        # weighted by the other's energy, and the trace is that of the sum. It discounts attention
        # sinks, which have huge activations and almost no gradient.
        inputs, squares = stats["weighted_inputs"], stats["weighted_squares"].total
        total = jnp.trace(inputs.total)
        outputs = squares * (inputs.count / jnp.where(total > 0, total, 1))
    moment = inputs.second_moment()
    energies = jnp.diagonal(moment)
    ridge = SHRINKAGE * len(energies) / jnp.maximum(inputs.count, 1)
    shrunk = (moment + ridge * jnp.diag(energies)) / (1 + ridge)
    unit = inert_unit(jnp.mean(energies))
    return Weights(shrunk + DAMPING * unit * jnp.eye(len(moment)), outputs)


def weighting_method(weighting: str) -> Method:
    """Returns a weighting as a `Method`, so that calibration collects its statistics."""
    factor: Any = make_weights
    return Method(weighting, factor, WEIGHTINGS[weighting])


FLOOR = 1e-8  # fraction of their mean that is added to output weights: 0 has no inverse


class Weights(NamedTuple):
    """Weights of the errors of a kernel ``[in, out]``. None stands for weights of 1.

    Attributes:
      inputs: second moment of the inputs ``[in, in]``, or its diagonal ``[in]``, or None.
      outputs: weights of the outputs ``[out]``, or None.
      elements: weights of the elements ``[in, out]``, or None. If given, they define the weighted
        error instead of ``inputs`` and ``outputs``.
      feedback: `Feedback` of ``inputs`` for error compensation; None rounds to nearest.
    """

    inputs: Any = None
    outputs: Any = None
    elements: Any = None
    feedback: Any = None

    def times_inputs(self, a: Float[Array, "n in"]) -> Float[Array, "n in"]:
        """Returns ``a H``, H being the second moment of the inputs."""
        if self.inputs is None:
            return a
        return mm(a, self.inputs) if self.inputs.ndim == 2 else a * self.inputs[None]

    def root_outputs(self) -> Float[Array, "out 1"] | Float[Array, "1 1"]:
        """Returns ``√c``, the roots of the output weights, as a column; all are above 0."""
        if self.outputs is None:
            return jnp.ones((1, 1))
        mean = jnp.mean(self.outputs)
        return jnp.sqrt(self.outputs + FLOOR * jnp.where(mean > 0, mean, 1))[:, None]

    def weighted_error(self, error: Float[Array, "in out"]) -> Float[Array, ""]:
        """Returns the weighted squared error ``[]`` of an error matrix."""
        if self.elements is not None:
            return jnp.sum(self.elements * error**2)
        scaled = error.T * self.root_outputs()
        return jnp.sum(scaled * self.times_inputs(scaled))
