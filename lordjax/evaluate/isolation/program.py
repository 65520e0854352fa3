"""The program's process: it runs the text, then answers the checker's calls."""

from __future__ import annotations

import builtins
import os
import sys
import types

from lordjax.evaluate.isolation.peer import Ended, Peer, line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


class ProgramPeer(Peer):
    """The program's side; a process that the program forked must not answer."""

    def __init__(self, reading: int, writing: int):
        super().__init__(reading, writing)
        self._number, self._leave, self._own = os.getpid, os._exit, os.getpid()

    def leave(self) -> NoReturn:
        """Ends the process, whatever the program's threads still do."""
        self._leave(0)

    def resolve(self, data: list[Any]) -> Any:
        """Returns the object of a reference; the checks may name a function of Python's own."""
        return getattr(builtins, data[1]) if data[0] == "builtin" else super().resolve(data)

    def send(self, message: list[Any]) -> None:
        """Writes a message, in the program's first process only."""
        if self._number() != self._own:
            self.leave()
        super().send(message)


def run(text: str, reading: int, writing: int) -> NoReturn:
    """Runs a program and answers calls until the checker ends.

    Args:
      text: the program.
      reading: descriptor of the checker's messages.
      writing: descriptor of messages to the checker.
    """
    peer = ProgramPeer(reading, writing)
    module = types.ModuleType("program")
    peer.mine.append(module)
    forget()
    sys.modules["program"] = module
    try:
        exec(compile(text, "program", "exec", dont_inherit=True), module.__dict__)
        reply = ["loaded"]
    except MemoryError:
        reply = ["out of memory"]
    except BaseException as error:
        reply = ["failed", line(error)]
    try:
        peer.send(reply)
        while True:
            peer.serve(*peer.receive())
    except (Ended, OSError):  # the checker ended, or the program closed its own channel
        peer.leave()


def forget() -> None:
    """Empties what the program would find of this package and its caller."""
    os.environ.clear()
    sys.argv, sys.orig_argv, sys.dont_write_bytecode = [""], [""], True
    for name in [name for name in sys.modules if name.split(".")[0] in ("lordjax", "__main__")]:
        del sys.modules[name]
