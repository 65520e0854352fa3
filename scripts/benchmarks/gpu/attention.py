"""Error and time of fused attention, as a line of the benchmark of a GPU."""

from __future__ import annotations

from typing import Any

from lordjax.scripts.benchmarks.gpu.lines import Line, Row, median_seconds, row
from lordjax.scripts.benchmarks.gpu.sizes import Sizes

LIMIT = 2e-2  # largest relative error of outputs and gradients: rounding to bfloat16


def attention(sizes: Sizes, interpret: bool) -> Line:
    """Returns the line that compares fused attention with float32 and with attention in chunks.

    Args:
      sizes: the shapes.
      interpret: whether the kernel is interpreted, which any device can do.
    """

    def run(seconds: float) -> list[Row]:
        import jax
        import jax.numpy as jnp

        from lordjax.models.attention import fused, in_chunks

        config = sizes.llama
        shape = (1, sizes.length, config.num_heads, config.head_size)
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
        scale = config.head_size**-0.5

        def chunks(*arrays: Any) -> Any:
            return in_chunks(*arrays, scale=scale)

        def whole(*arrays: Any) -> Any:
            return fused(*arrays, scale=scale, interpret=interpret)

        def gradients(fn: Any) -> Any:
            def loss(arrays: Any) -> Any:
                return jnp.sum(fn(*arrays).astype(jnp.float32) ** 2)

            return jax.jit(jax.grad(loss))

        def apart(one: Any, other: Any) -> float:
            one, other = jax.tree.map(lambda a: a.astype(jnp.float32), (one, other))
            pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
            return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)

        exact = jax.tree.map(lambda a: a.astype(jnp.float32), arrays)
        with jax.default_matmul_precision("highest"):
            right = chunks(*exact), gradients(chunks)(exact)
        errors = apart(whole(*arrays), right[0]), apart(gradients(whole)(arrays), right[1])
        if not max(errors) < LIMIT:
            raise ValueError(
                f"fused attention: the outputs have a relative error of {errors[0]:.2e}, the "
                f"gradients of {errors[1]:.2e}; expected less than {LIMIT:.0e}"
            )
        found = [row("error of outputs, of gradients", max(errors), "relative error")]
        for name, fn in (("in chunks", chunks), ("fused", whole)):
            forward, backward = jax.jit(fn), gradients(fn)
            took = median_seconds(lambda f=forward: f(*arrays))
            both = median_seconds(lambda f=backward: f(arrays))
            found.append(row(f"{name}, forward", 1e6 * took, "µs"))
            found.append(row(f"{name}, forward and backward", 1e6 * both, "µs"))
        return found

    return Line("attention", 30, run)
