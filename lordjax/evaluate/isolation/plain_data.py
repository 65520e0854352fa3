"""Values as JSON, for two processes of which one does not trust the other.

Numbers, texts and containers travel by value, and arrive as values of the types of Python itself:
a list whose class redefines ``==`` arrives as a list. Iterators arrive as iterators over their
items. All other objects stay where they are; the other process gets a reference, see `peer`.
"""

from __future__ import annotations

import builtins
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
BYTES = {"bytes": bytes, "bytearray": bytearray}
VIEWS = {
    "dict keys": type({}.keys()),
    "dict values": type({}.values()),
    "dict items": type({}.items()),
}
BIG = 10_000  # bits of an integer, above which it is written in hexadecimal digits
# Modules that are imported only by programs that use them: how to write and read their values.
OTHERS = {
    ("decimal", "Decimal"): (str, lambda kind, text: kind(text)),
    ("fractions", "Fraction"): (str, lambda kind, text: kind(text)),
    ("datetime", "date"): (lambda v: v.isoformat(), lambda kind, text: kind.fromisoformat(text)),
    ("datetime", "datetime"): (
        lambda v: v.isoformat(),
        lambda kind, text: kind.fromisoformat(text),
    ),
}


def encode(value: Any, refer: Callable[[Any], list[Any]]) -> Any:
    """Returns a value as what JSON can hold.

    Args:
      value: any object.
      refer: function from an object that is no plain data to a reference, a list that begins with
        a text.
    """
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() < BIG else ["int", hex(value)]
    for name, kind in (SEQUENCES | VIEWS).items():
        if isinstance(value, kind):
            return [name, [encode(item, refer) for item in value]]
    for name, kind in BYTES.items():
        if isinstance(value, kind):
            return [name, value.hex()]
    if isinstance(value, dict):
        return ["dict", [[encode(k, refer), encode(v, refer)] for k, v in value.items()]]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, range):
        return ["range", *(encode(n, refer) for n in (value.start, value.stop, value.step))]
    if value is Ellipsis or value is NotImplemented:
        return ["constant", repr(value)]
    kind = type(value)
    if (how := OTHERS.get((kind.__module__, kind.__qualname__))) is not None:
        return ["other", kind.__module__, kind.__qualname__, how[0](value)]
    if hasattr(kind, "__next__") and hasattr(kind, "__iter__"):
        return ["iterator", [encode(item, refer) for item in value]]
    return refer(value)


def decode(data: Any, resolve: Callable[[list[Any]], Any]) -> Any:
    """Returns the value that `encode` wrote.

    Args:
      data: what JSON held; it may come from a hostile process.
      resolve: function from a reference to an object.

    Raises:
      ValueError, TypeError: if the data are not as `encode` writes them.
    """
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise ValueError("a value is a JSON object; expected a list")
        return data
    if not data:
        raise ValueError("a value is an empty list; expected its type")
    name, *rest = data
    if not isinstance(name, str):
        raise ValueError("a value has no type")
    if name in SEQUENCES:
        return SEQUENCES[name](decode(item, resolve) for item in rest[0])
    if name in BYTES:
        return BYTES[name](bytes.fromhex(rest[0]))
    if name == "dict":
        return {decode(k, resolve): decode(v, resolve) for k, v in rest[0]}
    if name == "int":
        return int(rest[0], 16)
    if name in ("complex", "range"):
        return getattr(builtins, name)(*(decode(part, resolve) for part in rest))
    if name == "constant":
        return {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}[rest[0]]
    if name == "iterator":
        return iter([decode(item, resolve) for item in rest[0]])
    if name in VIEWS:
        return decode_view(name, [decode(item, resolve) for item in rest[0]])
    if name == "other":
        module, kind, text = rest
        read = OTHERS[module, kind][1]
        return read(getattr(__import__(module), kind), text)
    return resolve(data)


def decode_view(name: str, items: list[Any]) -> Any:
    """Returns a view of a new dictionary."""
    if name == "dict keys":
        return dict.fromkeys(items).keys()
    return dict(enumerate(items)).values() if name == "dict values" else dict(items).items()
