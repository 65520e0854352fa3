"""One program of a job, compiled for the devices of a card."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lordjax.forecast.job import CalibrationSpec
from lordjax.runtime import hlo
from lordjax.runtime.flops import Program
from lordjax.runtime.hlo import ProgramFacts
from lordjax.runtime.mesh import DATA_AXIS


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program as it is compiled; bytes are those of one device.

    Attributes:
      arguments: bytes of its arguments.
      outputs: bytes of its results that take no donated memory.
      temporaries: bytes beside them.
      facts: what it does.
    """

    arguments: int
    outputs: int
    temporaries: int
    facts: ProgramFacts

    @property
    def nbytes(self) -> int:
        """Device memory while it runs."""
        return self.arguments + self.outputs + self.temporaries


class Compiler:
    """Compiles programs for some devices; equal ones once.

    Args:
      mesh: devices that are described; see `gpu_compiler.absent_mesh`.
      spec: the job, which says what a batch is.
    """

    def __init__(self, mesh: Mesh, spec: CalibrationSpec):
        self.mesh, self.spec = mesh, spec
        self.known: dict[str, Compiled] = {}

    def splits(self, args: Any) -> bool:
        """Returns whether devices split a batch among the arguments of a program."""
        return self.mesh.size > 1 and any(map(self._is_batch, jax.tree.leaves(args)))

    def compiled(self, program: Program) -> Compiled:
        """Returns a program of one device, or of all of them if they split its batch.

        Each device then gets a batch as large as that of one device alone.
        """
        split, fn = self.splits(program.args), program.fn
        args: Any = jax.tree.map(functools.partial(self._placed, split), program.args)
        fixed: dict[str, Any] = {}
        if isinstance(fn, functools.partial) and hasattr(fn.func, "trace"):
            # Jitted, perhaps with donated arguments.
            fn, args, fixed = fn.func, (*fn.args, *args), fn.keywords
        jitted: Any = fn if hasattr(fn, "trace") else jax.jit(fn)
        with jax.enable_x64(program.x64), jax.default_matmul_precision(program.precision):
            return self.compile_traced(jitted.trace(*args, **fixed))

    def compile_traced(self, traced: Any) -> Compiled:
        """Compiles a traced program, unless an equal one was compiled."""
        lowered = traced.lower(lowering_platforms=("cuda",))
        key = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        if key not in self.known:
            made = lowered.compile()
            memory = made.memory_analysis()
            self.known[key] = Compiled(
                memory.argument_size_in_bytes,
                memory.output_size_in_bytes - memory.alias_size_in_bytes,
                memory.temp_size_in_bytes,
                hlo.read(made.as_text()),
            )
        return self.known[key]

    def placed(self, tree: Any) -> Any:
        """Returns shapes that lie on the first device."""
        return jax.tree.map(functools.partial(self._placed, False), tree)

    def _placed(self, split: bool, leaf: Any) -> Any:
        """A shape on the first device, or, if a batch is split, on all of them."""
        shape = tuple(leaf.shape)
        if not split:
            one = jax.sharding.SingleDeviceSharding(self.mesh.devices.flat[0])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=one)
        axes = PartitionSpec()
        if self._is_batch(leaf):
            shape, axes = (shape[0] * self.mesh.size, *shape[1:]), PartitionSpec(DATA_AXIS)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(self.mesh, axes))

    def _is_batch(self, leaf: Any) -> bool:
        """Whether an argument is a batch: token ids, or the residual stream."""
        shape, length = tuple(leaf.shape), self.spec.length
        ids = len(shape) == 2 and jnp.issubdtype(leaf.dtype, jnp.integer) and shape[1] == length
        return ids or (len(shape) == 3 and shape[1:] == (length, self.spec.config.hidden_size))


def extrapolated(few: int, more: int, blocks: tuple[int, int], layers: int) -> int:
    """Returns a number of all blocks, from its values at two numbers of blocks, by a line.

    Args:
      few: the value at ``blocks[0]``.
      more: the value at ``blocks[1]``.
      blocks: two numbers of blocks.
      layers: the number of all blocks.
    """
    each = (more - few) / (blocks[1] - blocks[0])
    return math.ceil(few + each * (layers - blocks[0]))
