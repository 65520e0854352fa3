"""The checker's process: it runs the checks and decides whether a program passed.

The checks call functions of the program, which runs in another process. Only plain values come
from there, see `plain_data`, so the program does not decide how they compare. The verdict goes
through a pipe that the program never has.
"""

from __future__ import annotations

import builtins
import json
import os
import select
import sys
import types

from lordjax.evaluate.isolation.peer import Ended, Peer, Reference, line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MODULE = "checks"


class Unproven(Reference):
    """An object of the program; it may not say itself whether it is right."""

    __slots__ = ()

    def _refuse(self, *other: object) -> bool:
        raise TypeError(f"the program's answer is {self!r}; the checks can compare plain data only")

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _refuse
    __hash__ = object.__hash__


class CheckerPeer(Peer):
    """The checker's side.

    The program may call functions and read attributes of objects that the checks define and gave
    to it, but none whose name begins with an underscore, which would lead to everything.
    """

    refers = Unproven

    def __init__(self, reading: int, writing: int, alive: int):
        super().__init__(reading, writing)
        self.alive = alive

    def may(self, action: str, thing: Any, name: str) -> bool:
        """Returns whether the program may do this with an object of the checks."""
        if action == "call":
            return self.may_refer(thing)
        return not name.startswith("_") and type(thing).__module__ == MODULE

    def may_refer(self, thing: Any) -> bool:
        """Returns whether the checks define a thing, or its class."""
        if isinstance(thing, (type, types.FunctionType, types.MethodType)):
            return thing.__module__ == MODULE
        return type(thing).__module__ == MODULE

    def refer(self, thing: Any) -> list[Any]:
        """Returns a reference; a function of Python's own is named, and the program takes its."""
        name = getattr(thing, "__name__", None)
        if isinstance(name, str) and getattr(builtins, name, None) is thing:
            return ["builtin", name]
        return super().refer(thing)

    def wait_and_read(self, most: int) -> bytes:
        """Reads some bytes, until the program ended, even if its children hold the pipe."""
        ready = select.select([self.reading, self.alive], [], [])[0]
        if self.reading in ready and (data := os.read(self.reading, most)):
            return data
        os.read(self.alive, 1)  # returns when the keeper has seen how the program ended
        return b""

    def start(self) -> tuple[str, str] | None:
        """Waits until the program's text has run; returns outcome and error if it did not."""
        kind, *rest = self.receive()
        if kind == "failed":
            return "failed", str(rest[0])
        if kind == "out of memory":
            return "out of memory", "MemoryError"
        return None if kind == "loaded" else ("failed", "its first message is not one of ours")


def verdict(peer: CheckerPeer, setup: str, text: str, names: list[str]) -> tuple[str, str]:
    """Runs checks; returns the outcome and an error line.

    Args:
      peer: the channel to the program.
      setup: text that runs before ``names`` are taken from the program.
      text: the checks.
      names: the program's functions and classes that the checks use.
    """
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module
    exec(compile(setup, MODULE, "exec", dont_inherit=True), module.__dict__)
    if (early := peer.start()) is not None:
        return early
    for name in names:
        module.__dict__.pop(name, None)
        try:
            setattr(module, name, peer.ask("get", 0, name))
        except AttributeError:  # the checks will say that it is not defined
            continue
    exec(compile(text, MODULE, "exec", dont_inherit=True), module.__dict__)
    return "passed", ""


def check(reading: int, writing: int, alive: int, reply: int) -> None:
    """Reads checks from standard input, runs them and writes the verdict.

    Args:
      reading: descriptor of the program's messages.
      writing: descriptor of messages to the program.
      alive: descriptor of a pipe that is closed when the program has ended.
      reply: descriptor of the verdict.
    """
    peer = CheckerPeer(reading, writing, alive)
    try:
        with open(0, encoding="utf-8", closefd=False) as file:
            checks = json.load(file)
        outcome, error = verdict(peer, **checks)
    except Ended:
        outcome, error = "ended", ""
    except MemoryError:
        outcome, error = "out of memory", "MemoryError"
    except BaseException as problem:
        outcome, error = "failed", line(problem)
    os.write(reply, json.dumps([outcome, error]).encode())
    os._exit(0)
