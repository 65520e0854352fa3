"""What happens to parameters while the equations of a function are run."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lordjax.functions.equations.neurons import Neurons
from lordjax.functions.equations.views import View

Frame = dict[str, Any]


class Handler(abc.ABC):
    """What to do with parameters; see this module's docstring.

    Attributes:
      frame: what was noted in the current sub-program.
      trips: how often the current sub-program runs.
    """

    def __init__(self) -> None:
        self.frame: Frame = {}
        self.trips = 1

    @abc.abstractmethod
    def product(self, eqn: Any, view: View, other: Any, *, first: bool) -> Any:
        """Returns the result of a ``dot_general`` of a view and an array.

        Args:
          eqn: the equation.
          view: the operand that is a parameter.
          other: the other operand, an array or `Neurons`.
          first: whether the view is the first operand.
        """

    def dense(self, view: View, use: str) -> Any:
        """Returns a view as an array, where it is used in another way than in a product.

        Args:
          view: the view.
          use: what uses it.
        """
        del use
        return view.array()

    def expose(self, neurons: Neurons, use: str) -> Any:
        """Returns neurons as an array, where something else than elementwise equations uses them.

        Args:
          neurons: the neurons.
          use: what uses them.
        """
        del use
        return neurons.value

    def vector(self, view: View) -> Neurons | None:
        """Returns a view with one number per neuron, such as a bias, as neurons; None if it is not.

        Args:
          view: the view; all of its dimensions but one may have length 1.
        """
        del view

    def joined(self, eqn: Any, values: Sequence[Any]) -> None:
        """Is told of every elementwise equation on neurons."""
        del eqn, values

    def add(self, first: Any, second: Any) -> Any:
        """Returns the sum of two noted trees of one path."""
        del first, second
        raise NotImplementedError

    def note(self, frame: Mapping[str, Any]) -> None:
        """Adds noted trees to the current frame."""
        for path, tree in frame.items():
            self.frame[path] = self.add(self.frame[path], tree) if path in self.frame else tree

    @abc.abstractmethod
    def inner(self, jaxpr: Any, trips: int = 1) -> Callable[..., tuple[list[Any], Frame]]:
        """Returns a function that runs a sub-program and returns its outputs and its frame."""

    @property
    def notes(self) -> bool:
        """Whether products note anything."""
        return type(self).add is not Handler.add


def dense_all(handler: Handler, values: Sequence[Any], use: str) -> list[Any]:
    """Returns values with all views as arrays; ``use`` says what they are used for."""
    return [handler.dense(v, use) if isinstance(v, View) else v for v in values]


def expose_all(handler: Handler, values: Sequence[Any], use: str) -> list[Any]:
    """Returns values with all views and neurons as arrays."""
    values = dense_all(handler, values, use)
    return [handler.expose(v, use) if isinstance(v, Neurons) else v for v in values]
