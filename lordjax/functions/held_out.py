"""Losses of a function on batches that no statistic has seen, whatever its parameters are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lordjax.allocation.measured_errors import mean_loss
from lordjax.functions.equations.tracing import Apply, Call, jitted_once, open_call

Loss = Callable[..., Any]

# Predicted errors are checked if there are this many batches, and this many losses to compare.
LEAST_BATCHES, LEAST_LOSSES = 8, 64
MOST_HELD_OUT = 2


def held_out_count(batches: int) -> int:
    """Returns how many batches are held out: the last one of 8 or more, two of 32 or more."""
    return 0 if batches < LEAST_BATCHES else 1 if batches < 4 * LEAST_BATCHES else MOST_HELD_OUT


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Batches on which the losses of a function are compared.

    Attributes:
      apply: the function.
      loss: function ``(outputs, *batch) -> losses`` of the targets, 0 where there is none.
      batches: the arguments that follow the parameters.
    """

    apply: Apply
    loss: Loss
    batches: Sequence[tuple[Any, ...]]


class Comparison:
    """Losses of a function with other parameters of the same shapes.

    Batches of one shape share a program, whatever the parameters are.

    Args:
      held_out: the batches.
      params: the parameters that others are compared with.

    Raises:
      ValueError: if a loss is not finite.
    """

    def __init__(self, held_out: HeldOut, params: Any) -> None:
        self.held_out = held_out
        self.programs: dict[Any, Callable[..., Any]] = {}
        self.dense = self._losses(params)
        if not np.isfinite(self.dense).all():
            raise ValueError(
                f"the loss of the last {len(held_out.batches)} batches, which are held out, is not "
                "finite; check these batches, the loss and the parameters"
            )
        self.targets = self.dense != 0

    @property
    def enough(self) -> bool:
        """Whether there are enough losses to compare."""
        return self.targets.sum() >= LEAST_LOSSES

    def added(self, params: Any) -> float:
        """Returns the mean loss that other parameters add, in the unit of the loss."""
        return mean_loss((self._losses(params) - self.dense)[self.targets])

    def _losses(self, params: Any) -> np.ndarray:
        found = []
        for batch in self.held_out.batches:
            call = open_call(params, batch, {}, kernels=False)
            program = jitted_once(self.programs, call.key, self._program(call))
            losses = program(call.leaves, call.inputs)
            found.append(np.asarray(losses, np.float64).reshape(-1))
        return np.concatenate(found)

    def _program(self, call: Call) -> Callable[..., Any]:
        def run(leaves: Any, inputs: Any) -> Any:
            args, kwargs = call.rebuild(leaves, inputs)
            return self.held_out.loss(self.held_out.apply(*args, **kwargs), *args[1:], **kwargs)

        return run
