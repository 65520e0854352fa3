"""What errors of a matrix cost: the statistics that a weighting reads, and a function of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lordjax.methods.base import Method
from lordjax.methods.linalg import mm

# Share of the mean added to the inputs' second moment. GPTQ's 0.01 of a mean that a few huge
# activations make is more than all the others have, and misleads the choice of formats.
DAMPING = 1e-3

# Weighting -> statistics it reads; see `methods.low_rank_quantized`.
WEIGHTINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "fisher": ("fisher",),
    "input": ("inputs",),
    "both": ("weighted_inputs", "weighted_squares"),
}
MOMENTS = ("input", "both")  # weightings with a second moment of inputs, which feedback needs


def make_weights(kernel: Any, stats: Mapping[str, Any]) -> Weights:
    """What errors of a kernel cost, from the statistics that its weighting reads."""
    del kernel
    if "fisher" in stats:
        fisher = stats["fisher"]
        return Weights(jnp.mean(fisher, axis=1), jnp.mean(fisher, axis=0), fisher)
    if not stats:
        return Weights()
    inputs, outputs = stats.get("inputs"), None
    if inputs is None:
        # Of all tokens' products of x xᵀ and g gᵀ the closest Kronecker product: each weighted by
        # the other's energy, and the trace that of the sum. Attention sinks have huge activations
        # and next to no gradient.
        inputs, squares = stats["weighted_inputs"], stats["weighted_squares"].total
        total = jnp.trace(inputs.total)
        outputs = squares * (inputs.count / jnp.where(total > 0, total, 1))
    moment = inputs.second_moment()
    mean = jnp.mean(jnp.diagonal(moment))
    return Weights(moment + DAMPING * mean * jnp.eye(len(moment)), outputs)


def weighting_method(weighting: str) -> Method:
    """A weighting as what the calibration passes know: statistics, and a function of them."""
    cost: Any = make_weights
    return Method(weighting, cost, WEIGHTINGS[weighting])


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

    def weighted_error(self, error: Float[Array, "in out"]) -> Float[Array, ""]:
        """What an error costs."""
        if self.elements is not None:
            return jnp.sum(self.elements * error**2)
        scaled = error.T * self.root_outputs()
        return jnp.sum(scaled * self.times_inputs(scaled))
