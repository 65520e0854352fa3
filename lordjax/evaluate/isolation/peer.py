"""Two processes that call each other's functions over a pair of pipes.

Both sides are alike: each may ask to call a function, or to read or set an attribute, of an object
that the other side referred to. While one side waits for a reply it answers what it is asked. What
a side lets the other do is decided by `Peer.may`, which the checker narrows.

A message is its length in 4 bytes, then a JSON list.
"""

from __future__ import annotations

import builtins
import json
import os

from lordjax.evaluate.isolation import plain_data

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LARGEST = 1 << 26  # bytes of a message
LINE = 500  # largest number of characters of an error line


class Ended(BaseException):
    """The process on the other side ended."""


class Reference:
    """An object of the other process."""

    __slots__ = ("__kind", "__number", "__peer")

    def __init__(self, peer: Peer, number: int, kind: str):
        for name, value in (("peer", peer), ("number", number), ("kind", kind)):
            object.__setattr__(self, f"_Reference__{name}", value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the object in its process."""
        return self.__peer.ask("call", self.__number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__peer.ask("get", self.__number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__peer.ask("set", self.__number, name, value)

    def __repr__(self) -> str:
        return f"<{self.__kind} of another process>"


class Peer:
    """One side of a pair of processes.

    Args:
      reading: descriptor of the pipe from the other side.
      writing: descriptor of the pipe to it.
    """

    refers = Reference

    def __init__(self, reading: int, writing: int):
        self.reading, self.writing = reading, writing
        self.mine: list[Any] = []
        self.theirs: dict[int, Reference] = {}
        # Kept, because a program may replace them.
        self._read, self._write = os.read, os.write
        self._dumps, self._loads = json.dumps, json.loads

    def may(self, action: str, thing: Any, name: str) -> bool:
        """Returns whether the other side may call a thing, or get or set its attribute."""
        del action, thing, name
        return True

    def may_refer(self, thing: Any) -> bool:
        """Returns whether the other side may have a reference to a thing."""
        del thing
        return True

    def ask(self, action: str, number: int, *rest: Any) -> Any:
        """Lets the other side do something with an object of its; returns what it replies."""
        self.send([action, number, *map(self.encode, rest)])
        while True:
            kind, *message = self.receive()
            if kind == "value":
                return self.decode(message[0])
            if kind == "raised":
                raise raised(*message)
            if kind == "out of memory":
                raise MemoryError
            self.serve(kind, *message)

    def serve(self, action: str, number: int, *rest: Any) -> None:
        """Does what the other side asks for, and replies."""
        try:
            value = self.act(action, self.mine[number], *map(self.decode, rest))
            reply = ["value", self.encode(value)]
        except Ended:
            raise
        except MemoryError:
            reply = ["out of memory"]
        except BaseException as error:
            reply = ["raised", type(error).__name__, message_of(error)]
        self.send(reply)

    def act(self, action: str, thing: Any, first: Any, second: Any = None) -> Any:
        """Calls an object, or reads or sets an attribute of it."""
        name = "" if action == "call" else first
        if not isinstance(name, str) or not self.may(action, thing, name):
            raise TypeError(f"{action} of {type(thing).__name__} is not allowed from outside")
        if action == "call":
            return thing(*first, **second)
        return getattr(thing, name) if action == "get" else setattr(thing, name, second)

    def encode(self, value: Any) -> Any:
        """Returns a value for a message."""
        return plain_data.encode(value, self.refer)

    def decode(self, data: Any) -> Any:
        """Returns the value in a message."""
        return plain_data.decode(data, self.resolve)

    def refer(self, thing: Any) -> list[Any]:
        """Returns a reference to an object that is no plain data."""
        if isinstance(thing, Reference):
            return ["yours", object.__getattribute__(thing, "_Reference__number")]
        if not self.may_refer(thing):
            raise TypeError(f"{type(thing).__name__} cannot be given to another process")
        known = (i for i, other in enumerate(self.mine) if other is thing)
        if (number := next(known, None)) is None:
            number = len(self.mine)
            self.mine.append(thing)
        return ["mine", number, type(thing).__name__]

    def resolve(self, data: list[Any]) -> Any:
        """Returns the object of a reference."""
        if data[0] == "yours":
            return self.mine[data[1]]
        if data[0] != "mine":
            raise ValueError(f"no values of type {str(data[0])[:LINE]!r}")
        number, kind = int(data[1]), str(data[2])[:LINE]
        return self.theirs.setdefault(number, self.refers(self, number, kind))

    def send(self, message: list[Any]) -> None:
        """Writes a message."""
        text = self._dumps(message).encode()
        data = len(text).to_bytes(4, "little") + text
        try:
            while data:
                data = data[self._write(self.writing, data) :]
        except BrokenPipeError:
            raise Ended from None

    def receive(self) -> list[Any]:
        """Reads a message; raises Ended if the other side ended."""
        length = int.from_bytes(self.receive_bytes(4), "little")
        if length > LARGEST:
            raise ValueError(f"a message of {length} bytes; expected at most {LARGEST}")
        message = self._loads(self.receive_bytes(length))
        if not isinstance(message, list) or not message:
            raise ValueError("a message is no JSON list")
        return message

    def receive_bytes(self, count: int) -> bytes:
        """Reads exactly this many bytes."""
        parts = []
        while count:
            data = self.wait_and_read(min(count, 1 << 16))
            if not data:
                raise Ended
            parts.append(data)
            count -= len(data)
        return b"".join(parts)

    def wait_and_read(self, most: int) -> bytes:
        """Reads some bytes; none if the other side ended."""
        return self._read(self.reading, most)


def message_of(error: BaseException) -> str:
    """Returns the first line of an exception's message."""
    try:
        return (str(error).splitlines() or [""])[0][:LINE]
    except BaseException as other:
        return f"(its message raises {type(other).__name__})"


def line(error: BaseException) -> str:
    """Returns an exception in one line, as Python prints it."""
    name, text = type(error).__name__, message_of(error)
    return f"{name}: {text}"[:LINE] if text else name


def raised(name: str, text: str) -> BaseException:
    """Returns an exception like one of the other process: with its name and its message."""
    kind = getattr(builtins, name, None)
    base = kind if isinstance(kind, type) and issubclass(kind, Exception) else Exception
    like = type(name[:LINE], (base,), {"__str__": lambda self: text})
    return like.__new__(like)
