"""How many floating-point operations programs make, and a compression by stages: from shapes alone.

A program is traced, not compiled, and its operations are added up by kind of work, which is what
their speed depends on. Multiply and add count as two. Counted are::

    product [dtype] [highest]    m×k by k×n    2·m·k·n
    thin [dtype] [highest]       the same, where a side is at most `THIN`
    eigh [dtype] [n]             n×n           9 n³ (an upper bound for LAPACK's syevd)
    cholesky [dtype]             n³/3; a triangle solved for m columns n²·m; LU ⅔ n³; QR 4 m·n²
    svd [dtype]                  m×n           22 m·n·min(m, n)

Counted besides, and no operations in the sums, are ``exp`` (numbers that a softmax or an
activation takes), ``select`` and ``gather`` (numbers that are chosen between two, or taken from a
table: what codes are found by), ``steps`` (of loops: each starts small programs), ``equations`` (of
the programs, each once: what compiling depends on), and by `stages` ``read``, ``put`` (on the
device) and ``write``, in bytes. Loops count as often as they run; those that end by a condition,
here retries after a failure, not at all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

OpCounts = Counter[str]  # kind of work -> operations
THIN = 128
# Kinds that are no operations.
COUNTS = ("exp", "select", "gather", "steps", "equations", "read", "put", "write")
EXPONENTIALS = ("exp", "logistic", "tanh", "erf", "exp2")


def count_ops(fn: Callable[..., Any], *args: Any) -> OpCounts:
    """Work of a function of arrays, or of their shapes; a jitted one is not compiled for it."""
    closed = jax.make_jaxpr(fn)(*args)
    return _walk(closed.jaxpr, [True] * len(closed.jaxpr.outvars))


def in_loops(fn: Callable[..., Any], *args: Any) -> OpCounts:
    """What of `of` is done in loops, which a compiler does not cut into parts for devices."""
    closed = jax.make_jaxpr(fn)(*args)
    return _walk(closed.jaxpr, [True] * len(closed.jaxpr.outvars), loops=True)


def total(ops: OpCounts) -> float:
    """Floating-point operations of all kinds."""
    return float(sum(count for kind, count in ops.items() if kind not in COUNTS))


def scaled(ops: OpCounts, factor: float) -> OpCounts:
    """The work of running programs so many times; they are compiled once."""
    return Counter({kind: n if kind == "equations" else n * factor for kind, n in ops.items()})


def merged(works: Sequence[OpCounts]) -> OpCounts:
    """Their sum."""
    found: OpCounts = Counter()
    for ops in works:
        found.update(ops)
    return found


def _walk(jaxpr: Any, used: Sequence[bool], *, loops: bool = False) -> OpCounts:
    """Work of a program, or of its loops alone, but for what leads to outputs that nobody uses."""
    live = {v for v, wanted in zip(jaxpr.outvars, used, strict=True) if wanted and _named(v)}
    found: OpCounts = Counter()
    for equation in reversed(jaxpr.eqns):
        wanted = [v in live for v in equation.outvars]
        if not any(wanted) and not equation.effects:
            continue
        live.update(v for v in equation.invars if _named(v))
        found.update(_equation(equation, wanted, loops))
    return found


def _named(variable: Any) -> bool:
    """Whether it is a variable, and no constant written in its place."""
    return not hasattr(variable, "val")


def _equation(equation: Any, wanted: Sequence[bool], loops: bool) -> OpCounts:
    name, params = equation.primitive.name, equation.params
    loops = loops and name != "scan"
    if name == "while":
        return Counter()
    if name == "cond":
        branches = [_walk(b.jaxpr, wanted, loops=loops) for b in params["branches"]]
        return max(branches, key=total)
    inner = [j for j in map(_program, params.values()) if j is not None]
    if inner:
        program = inner[0]
        same = name != "scan" and len(program.outvars) == len(wanted)
        used = wanted if same else [True] * len(program.outvars)
        ops = _walk(program, used, loops=loops)
        if name != "scan":
            return ops
        return scaled(ops, params["length"]) + Counter({"steps": params["length"]})
    if loops:
        return Counter()
    found: OpCounts = Counter({"equations": 1})
    if name in OPERATIONS:
        kind, count = OPERATIONS[name](equation)
        found[kind] += round(count)
    return found


def _program(parameter: Any) -> Any:
    """The program in a parameter of an equation, if it is one."""
    parameter = getattr(parameter, "jaxpr", parameter)
    return parameter if hasattr(parameter, "eqns") else None


def _dot(equation: Any) -> tuple[str, float]:
    a, b = (variable.aval for variable in equation.invars[:2])
    (left, right), (batch, _) = equation.params["dimension_numbers"]
    inner, outer = (math.prod(a.shape[i] for i in axes) for axes in (left, batch))
    rows, columns = a.size // (inner * outer), b.size // (inner * outer)
    precision, dtype = equation.params["precision"], jnp.result_type(a.dtype)
    exact = precision is not None and jax.lax.Precision.HIGHEST in tuple(precision)
    form = "thin" if min(inner, rows, columns) <= THIN else "product"
    name = f"{form} {dtype}" + (" highest" if exact and dtype == jnp.float32 else "")
    del right
    return name, 2.0 * inner * outer * rows * columns


def _matrices(equation: Any, argument: int = 0) -> tuple[float, int, int, str]:
    """How many matrices, their rows and columns, and their dtype."""
    a = equation.invars[argument].aval
    return math.prod(a.shape[:-2]), a.shape[-2], a.shape[-1], str(a.dtype)


def _square(kind: str, share: float) -> Callable[[Any], tuple[str, float]]:
    def count(equation: Any) -> tuple[str, float]:
        number, rows, columns, dtype = _matrices(equation)
        return f"{kind} {dtype}", number * share * rows * columns * min(rows, columns)

    return count


def _eigh(equation: Any) -> tuple[str, float]:
    number, rows, _, dtype = _matrices(equation)
    return f"eigh {dtype} {rows}", number * 9.0 * rows**3


def _triangle(equation: Any) -> tuple[str, float]:
    number, rows, _, dtype = _matrices(equation)
    return f"cholesky {dtype}", float(number * rows * equation.invars[1].aval.size)


def _numbers(kind: str) -> Callable[[Any], tuple[str, float]]:
    return lambda equation: (kind, float(equation.outvars[0].aval.size))


OPERATIONS: dict[str, Callable[[Any], tuple[str, float]]] = {
    "dot_general": _dot,
    "eigh": _eigh,
    "svd": _square("svd", 22.0),
    "cholesky": _square("cholesky", 1 / 3),
    "lu": _square("cholesky", 2 / 3),
    # The factor, and as much again for its columns.
    "qr": _square("cholesky", 4.0),
    "geqrf": _square("cholesky", 2.0),
    "householder_product": _square("cholesky", 2.0),
    "triangular_solve": _triangle,
    "select_n": _numbers("select"),
    "gather": _numbers("gather"),
    **dict.fromkeys(EXPONENTIALS, _numbers("exp")),
}
