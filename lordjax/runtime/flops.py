"""Floating-point operations of JAX programs, counted from the shapes of their arguments.

A program is traced and not compiled. Operations are added up by kind, because their speed depends
on the kind. A multiplication and an addition count as two operations. Kinds of operations::

    product [dtype] [highest]    m×k by k×n    2·m·k·n
    thin [dtype] [highest]       the same, where one side is at most `THIN`
    eigh [dtype] [n]             n×n           9 n³ (an upper bound for LAPACK's syevd)
    cholesky [dtype]             n³/3; triangular solve of m columns n²·m; LU ⅔ n³; QR 4 m·n²
    svd [dtype]                  m×n           22 m·n·min(m, n)

Also counted, but not added to the total of operations::

    exp                          elements of exponentials (softmax, activations)
    select, gather               elements that are selected or looked up (quantization)
    steps                        iterations of ``scan`` loops; each starts small programs
    equations                    jaxpr equations, each once; a proxy for compile time
    read, put, write             bytes from disk, to the device, to disk (`lordjax.forecast`)

The body of a ``scan`` counts once per iteration. ``while`` loops are ignored: here they only retry
failed factorizations. Of Pallas kernels those in `KERNELS` count.

Inside `recorded`, every counted program is kept, and its runs are counted like an operation. So the
same code that counts a job's operations says which programs the job compiles.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lordjax.runtime import target

OpCounts = Counter[str]  # kind -> number of operations
THIN = 128
# Kinds that are not floating-point operations.
COUNTS = ("exp", "select", "gather", "steps", "equations", "read", "put", "write")
EXPONENTIALS = ("exp", "logistic", "tanh", "erf", "exp2")
RUNS = "runs of "  # before the name of a recorded program
# Pallas kernel -> its products of queries and keys, or of as many multiplications. They are causal,
# so half of each is multiplied. The backward pass computes the logits twice.
KERNELS = {"mha_forward": 2, "mha_backward": 7}


class Program(NamedTuple):
    """A program that was counted.

    Attributes:
      fn: the function.
      args: shapes of its arguments.
      x64: whether it has 64-bit numbers.
      precision: JAX's default precision of matrix products.
      ops: its operations in one run.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    x64: bool
    precision: str | None
    ops: OpCounts


_programs: dict[str, Program] = {}
_recording = False


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Program]]:
    """Inside, `count_ops` also counts one run of its program, under a name of the yielded table."""
    global _recording
    before, _recording = _recording, True
    try:
        yield _programs
    finally:
        _recording = before


def mode() -> tuple[str, bool]:
    """Returns what counts depend on besides the program: the platform, and whether it is recorded.

    What remembers counts remembers them by this, too.
    """
    return target.platform(), _recording


def count_ops(fn: Callable[..., Any], *args: Any) -> OpCounts:
    """Returns the operations of a function of arrays.

    Args:
      fn: the function. It is traced; a jitted function is not compiled.
      *args: its arguments: arrays or ``ShapeDtypeStruct``.
    """
    closed = jax.make_jaxpr(fn)(*args)
    found = _count_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    if _recording:
        name, config = f"{RUNS}{len(_programs)}", jax.config
        modes = bool(config.jax_enable_x64), config.jax_default_matmul_precision
        _programs[name] = Program(fn, args, *modes, Counter(found))
        found[name] = 1
    return found


def count_loop_ops(fn: Callable[..., Any], *args: Any) -> OpCounts:
    """Returns those operations of `count_ops` that are in loops.

    The compiler does not divide loops among devices.
    """
    closed = jax.make_jaxpr(fn)(*args)
    return _count_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), loops=True)


def total(ops: OpCounts) -> float:
    """Returns the number of floating-point operations of all kinds."""
    others = [kind for kind in ops if kind in COUNTS or kind.startswith(RUNS)]
    return float(sum(ops.values()) - sum(ops[kind] for kind in others))


def scaled(ops: OpCounts, factor: float) -> OpCounts:
    """Returns the operations of running programs ``factor`` times. They are compiled once."""
    return Counter({kind: n if kind == "equations" else n * factor for kind, n in ops.items()})


def merged(counts: Sequence[OpCounts]) -> OpCounts:
    """Returns the sum of several counts."""
    found: OpCounts = Counter()
    for ops in counts:
        found.update(ops)
    return found


def _count_jaxpr(jaxpr: Any, used: Sequence[bool], *, loops: bool = False) -> OpCounts:
    """Returns the operations of a jaxpr, or of its loops, without those of unused outputs."""
    live = {v for v, wanted in zip(jaxpr.outvars, used, strict=True) if wanted and _is_variable(v)}
    found: OpCounts = Counter()
    for equation in reversed(jaxpr.eqns):
        wanted = [v in live for v in equation.outvars]
        if not any(wanted) and not equation.effects:
            continue
        live.update(v for v in equation.invars if _is_variable(v))
        found.update(_count_equation(equation, wanted, loops))
    return found


def _is_variable(variable: Any) -> bool:
    """Returns whether an operand of a jaxpr is a variable, not a literal."""
    return not hasattr(variable, "val")


def _count_equation(equation: Any, wanted: Sequence[bool], loops: bool) -> OpCounts:
    """Returns the operations of one equation, jaxprs inside it included."""
    name, params = equation.primitive.name, equation.params
    loops = loops and name != "scan"
    if name == "while":
        return Counter()
    if name == "cond":
        branches = [_count_jaxpr(b.jaxpr, wanted, loops=loops) for b in params["branches"]]
        return max(branches, key=total)
    inner = [j for j in map(_inner_jaxpr, params.values()) if j is not None]
    if inner and name != "pallas_call":
        program = inner[0]
        same = name != "scan" and len(program.outvars) == len(wanted)
        used = wanted if same else [True] * len(program.outvars)
        ops = _count_jaxpr(program, used, loops=loops)
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


def _inner_jaxpr(parameter: Any) -> Any:
    """Returns the jaxpr in a parameter of an equation, or None."""
    parameter = getattr(parameter, "jaxpr", parameter)
    return parameter if hasattr(parameter, "eqns") else None


def _dot(equation: Any) -> tuple[str, float]:
    a, b = (variable.aval for variable in equation.invars[:2])
    (left, _), (batch, _) = equation.params["dimension_numbers"]
    inner, outer = (math.prod(a.shape[i] for i in axes) for axes in (left, batch))
    rows, columns = a.size // (inner * outer), b.size // (inner * outer)
    precision, dtype = equation.params["precision"], jnp.result_type(a.dtype)
    exact = precision is not None and jax.lax.Precision.HIGHEST in tuple(precision)
    kind = "thin" if min(inner, rows, columns) <= THIN else "product"
    name = f"{kind} {dtype}" + (" highest" if exact and dtype == jnp.float32 else "")
    return name, 2.0 * inner * outer * rows * columns


def _matrices(equation: Any, argument: int = 0) -> tuple[float, int, int, str]:
    """Returns the number of matrices of an argument, their rows, columns and dtype."""
    a = equation.invars[argument].aval
    return math.prod(a.shape[:-2]), a.shape[-2], a.shape[-1], str(a.dtype)


def _factorization(kind: str, factor: float) -> Callable[[Any], tuple[str, float]]:
    def count(equation: Any) -> tuple[str, float]:
        number, rows, columns, dtype = _matrices(equation)
        return f"{kind} {dtype}", number * factor * rows * columns * min(rows, columns)

    return count


def _eigh(equation: Any) -> tuple[str, float]:
    number, rows, _, dtype = _matrices(equation)
    return f"eigh {dtype} {rows}", number * 9.0 * rows**3


def _triangular_solve(equation: Any) -> tuple[str, float]:
    number, rows, _, dtype = _matrices(equation)
    return f"cholesky {dtype}", float(number * rows * equation.invars[1].aval.size)


def _kernel(equation: Any) -> tuple[str, float]:
    """The operations of a kernel whose first argument are queries ``[..., positions, h, d]``."""
    queries = equation.invars[0].aval
    products = KERNELS.get(equation.params["name"], 0)
    length = queries.shape[-3] if products else 0
    return f"product {jnp.result_type(queries.dtype)}", float(products * queries.size * length)


def _elements(kind: str) -> Callable[[Any], tuple[str, float]]:
    return lambda equation: (kind, float(equation.outvars[0].aval.size))


OPERATIONS: dict[str, Callable[[Any], tuple[str, float]]] = {
    "dot_general": _dot,
    "eigh": _eigh,
    "svd": _factorization("svd", 22.0),
    "cholesky": _factorization("cholesky", 1 / 3),
    "lu": _factorization("cholesky", 2 / 3),
    # The R factor, and as much again for the columns of Q.
    "qr": _factorization("cholesky", 4.0),
    "geqrf": _factorization("cholesky", 2.0),
    "householder_product": _factorization("cholesky", 2.0),
    "triangular_solve": _triangular_solve,
    "pallas_call": _kernel,
    "select_n": _elements("select"),
    "gather": _elements("gather"),
    **dict.fromkeys(EXPONENTIALS, _elements("exp")),
}
