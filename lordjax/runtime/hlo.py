"""What a compiled program does, read from its scheduled HLO text.

Every instruction that starts work on the device is a *launch*: a fusion, a library call, a copy, a
collective. Instructions in a loop count once per iteration. Bytes are those of operands and
results; of an array of which a fusion reads or replaces a slice, those of the slice.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

# Instructions that start nothing: names of values, and the ends of asynchronous ones.
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency"),
    *("all-reduce-done", "all-gather-done", "collective-permute-done", "async-done", "copy-done"),
)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
CONTAINERS = ("while", "conditional", "call")
SLICES = ("dynamic-slice", "slice", "gather")
# Instructions that replace a part of their first operand in place -> the operand that holds it.
REPLACE = {"dynamic-update-slice": 1, "scatter": 2}
BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}

_TENSOR = re.compile(r"(pred|bf16|token|opaque|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = (.*)$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|branch_computations|(?:true|false)_computation)="
    r"\{?((?:%[\w.\-]+(?:, )?)+)\}?"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation.

    Attributes:
      name: its name.
      type: type of its result, such as ``f32[8,4]{1,0}``.
      opcode: what it does.
      arguments: names of its operands; of a parameter its number.
      rest: the rest of its line.
      root: whether it is the result of its computation.
    """

    name: str
    type: str
    opcode: str
    arguments: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of its operands."""
        return _NAME.findall(self.arguments)

    @property
    def nbytes(self) -> int:
        """Bytes of its result."""
        return type_bytes(self.type)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        return [name for m in _CALLED.finditer(self.rest) for name in _NAME.findall(m[1])]

    @property
    def trips(self) -> int | None:
        """Number of iterations of a loop; None if it is not known."""
        found = _TRIPS.search(self.rest)
        return int(found[1]) if found else None


@dataclasses.dataclass
class ProgramFacts:
    """What a program does in one run.

    Attributes:
      launches: opcode -> number of launches.
      calls: library function -> number of calls.
      nbytes: bytes that launches read and write.
      wide_bytes: those of launches whose result is float64.
      copied_bytes: bytes of the results of copies.
      sent: collective -> bytes of its results.
      loops: iterations and launches per iteration of every loop.
      unknown_loops: number of loops whose iterations are not known; they count once.
      host_transfers: number of transfers to or from the host.
    """

    launches: Counter[str] = dataclasses.field(default_factory=Counter)
    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    nbytes: float = 0.0
    wide_bytes: float = 0.0
    copied_bytes: float = 0.0
    sent: Counter[str] = dataclasses.field(default_factory=Counter)
    loops: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    unknown_loops: int = 0
    host_transfers: float = 0.0

    @property
    def total_launches(self) -> float:
        """Number of launches of all kinds."""
        return float(sum(self.launches.values()))


def type_bytes(text: str) -> int:
    """Returns the bytes of an array's type or of all arrays of a tuple's type."""
    total = 0
    for kind, bits, sizes in _TENSOR.findall(text):
        width = BITS.get(kind, int(bits or 0))
        total += math.ceil(width * math.prod(int(n) for n in sizes.split(",") if n) / 8)
    return total


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of every computation, and the name of the one that runs first.

    Args:
      text: ``Compiled.as_text()``.

    Raises:
      ValueError: if the text has no entry computation.
    """
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (body := _INSTRUCTION.match(line)):
            current.append(_instruction(body[2], body[3], bool(body[1])))
    if not entry:
        raise ValueError("the text is no scheduled HLO module: it has no ENTRY computation")
    return found, entry


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _matching(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end:].strip().partition("(")
    rest = "(" + rest
    close = _matching(rest, 0)
    return Instruction(name, text[:end], opcode, rest[1:close], rest[close:], root)


def _matching(text: str, start: int) -> int:
    """Returns the place of the parenthesis that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    raise ValueError(f"no closing parenthesis in {text[start : start + 60]!r}")


def read(text: str) -> ProgramFacts:
    """Returns what a program does, from ``Compiled.as_text()``; raises as `computations` does."""
    table, entry = computations(text)
    facts = ProgramFacts()
    _add(facts, table, entry, 1.0)
    return facts


def _add(
    facts: ProgramFacts, table: dict[str, list[Instruction]], name: str, times: float
) -> float:
    """Adds what a computation does ``times`` times; returns its launches in one run."""
    sizes = {each.name: each for each in table[name]}
    launched = 0.0
    for each in table[name]:
        if each.opcode in CONTAINERS:
            trips = 1 if each.opcode != "while" else each.trips
            facts.unknown_loops += trips is None
            count = 1 if trips is None else trips
            inside = [_add(facts, table, inner, times * count) for inner in each.called]
            if each.opcode == "while":
                facts.loops.append((count, sum(inside)))
            launched += count * sum(inside)
        elif each.opcode not in FREE:
            launched += 1
            _add_launch(facts, table, sizes, each, times)
    return launched


def _add_launch(
    facts: ProgramFacts,
    table: dict[str, list[Instruction]],
    sizes: dict[str, Instruction],
    each: Instruction,
    times: float,
) -> None:
    moved = times * _moved(table, sizes, each)
    kind = each.opcode.removesuffix("-start")
    facts.launches[kind] += round(times)
    facts.nbytes += moved
    facts.wide_bytes += moved * ("f64[" in each.type)
    facts.copied_bytes += times * each.nbytes * (kind == "copy")
    facts.host_transfers += times * (kind in ("infeed", "outfeed", "send", "recv"))
    if kind in COLLECTIVES:
        facts.sent[kind] += round(times * each.nbytes)
    if target := _TARGET.search(each.rest):
        facts.calls[target[1]] += round(times)


def _moved(
    table: dict[str, list[Instruction]], sizes: dict[str, Instruction], each: Instruction
) -> float:
    """Bytes that a launch reads and writes."""
    operands = [sizes[name].nbytes for name in each.operands if name in sizes]
    if each.opcode in SLICES:
        return 2.0 * each.nbytes
    if each.opcode in REPLACE:
        return 2.0 * operands[REPLACE[each.opcode]]
    if each.opcode != "fusion" or not each.called:
        return float(sum(operands) + each.nbytes)
    inner, total = table[each.called[0]], float(each.nbytes)
    for parameter in (i for i in inner if i.opcode == "parameter"):
        whole = operands[int(parameter.arguments)]
        users = [i for i in inner if parameter.name in i.operands]
        replaced = [i for i in users if _replaces(i, parameter.name)]
        sliced = [i for i in users if i.opcode in SLICES and i.operands[0] == parameter.name]
        if not users or len(replaced) + len(sliced) < len(users):
            total += whole
            continue
        total += min(whole, sum(i.nbytes for i in sliced))
        if replaced:  # in place: of the result only the slices are written
            total += sum(_size(inner, i.operands[REPLACE[i.opcode]]) for i in replaced) - whole
    return max(total, 0.0)


def _replaces(each: Instruction, name: str) -> bool:
    """Returns whether an instruction replaces a slice of the array ``name``."""
    return each.opcode in REPLACE and each.operands[0] == name


def _size(inner: list[Instruction], name: str) -> int:
    return next(each.nbytes for each in inner if each.name == name)
