"""How many floating-point operations a compression must cost: the yardstick of the benchmarks.

Multiply and add count as two. Counted is what the mathematics asks for, not what the code happens
to do: recomputed activations are left out, causal attention is counted at half of the square.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lordjax.methods import Method
    from lordjax.models.config import ModelConfig


def block_weights(config: ModelConfig) -> int:
    """Linear weights of one block."""
    heads = config.num_heads * config.head_size
    kv = config.num_kv_heads * config.head_size
    return config.hidden_size * (2 * heads + 2 * kv + (2 + config.gated) * config.mlp_size)


def forward(config: ModelConfig, windows: int, length: int) -> float:
    """One forward pass of all blocks, without embedding and head."""
    tokens = windows * length
    attention = 2 * tokens * length * config.num_heads * config.head_size  # QKᵀ and PV, causal
    return config.num_layers * (2.0 * block_weights(config) * tokens + attention)


def _block(config: ModelConfig) -> dict[str, Any]:
    """Shapes of one block's parameters by path."""
    import jax

    from lordjax import trees
    from lordjax.models import init

    shapes: Any = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    return trees.flatten(shapes["layer_0"])


def grams(config: ModelConfig, method: Method, windows: int, length: int) -> float:
    """Second moments that a method takes in a forward pass, each counted as a full product."""
    from lordjax.calibrate import activation_keys, statistic_width
    from lordjax.sites import sites_for
    from lordjax.trees import unflatten

    block, total = _block(config), 0.0
    keys = activation_keys(unflatten(block), sites_for(method.kinds, config), method)
    for key in {key for names in keys.values() for key in names.values()}:
        width = statistic_width(key, block, config)
        if key.endswith(":moments"):
            total += 2.0 * width**2
        elif key.endswith(":heads"):
            total += 2.0 * width[0] * width[1] ** 2
    return config.num_layers * total * windows * length


def factors(config: ModelConfig, method: Method) -> float:
    """Factorisations of all sites: 9 n³ per eigendecomposition (an upper bound for LAPACK's syevd).

    A gradient metric doubles them: its own square root comes first. A refit from n columns is a
    Cholesky factor and a product, n³/3 + 2 n² m; choosing the columns costs n³ by leverage and 3 n³
    by elimination, for an inverse and updates of it.
    """
    from lordjax.sites import sites_for

    block, total = _block(config), 0.0
    for site in sites_for(method.kinds, config):
        fan_in, fan_out = block[site.kernels[-1]].shape
        heads, width = config.num_kv_heads, config.head_size
        if site.kind == "linear":
            total += 9.0 * min(fan_in, fan_out) ** 3 * (2 if "gradients" in method.needs else 1)
            continue
        module = method.modules[site.kind]
        options: dict[str, Any] = getattr(module.factor, "keywords", {})
        if "gradients" in module.needs:
            total += 9.0 * fan_out**3
        if site.kind != "qk" and options.get("fit", True):
            total += fan_in**3 / 3 + 2.0 * fan_in**2 * fan_out
        if site.kind == "vo":
            total += 2 * 9.0 * heads * width**3
        total += {"leverage": 1.0, "elimination": 3.0}.get(options.get("score", ""), 0) * fan_in**3
    return config.num_layers * total


def gradients(config: ModelConfig, method: Method, windows: int, length: int) -> float:
    """Forward and backward to all places that a method reads gradients of, head included.

    Second moments are in the coordinates of the smaller side of a kernel, to which wider gradients
    have to be projected; row Fisher information needs the weight gradients of each window.
    """
    from lordjax.sites import sites_for

    block, tokens, extra = _block(config), windows * length, 0.0
    for site in sites_for(method.kinds, config):
        needs = method.needs if site.kind == "linear" else method.modules[site.kind].needs
        fan_in, fan_out = block[site.kernels[-1]].shape
        if "gradients" in needs:
            narrow = min(fan_in, fan_out) if site.kind == "linear" else fan_out
            extra += 2.0 * narrow**2 + (2.0 * fan_in * fan_out if fan_out > narrow else 0)
        if "row_fisher" in needs:
            extra += 2.0 * fan_in * fan_out
    linear = 2.0 * config.num_layers * block_weights(config) * tokens
    attention = forward(config, windows, length) - linear
    head = 2 * 2.0 * config.hidden_size * config.vocab_size * tokens
    # Backward a linear layer costs its forward again, attention twice its own.
    return 2 * linear + 3 * attention + head + config.num_layers * extra * tokens


def preparation(
    config: ModelConfig, method: Method, windows: int, length: int, gradient_windows: int
) -> float:
    """All that `lordjax.prepare` must spend on a method with statistics of the dense model."""
    from lordjax.gradients import needs_gradients

    total = factors(config, method)
    if method.modules or {"moments", "abs_mean"} & set(method.needs):
        total += forward(config, windows, length) + grams(config, method, windows, length)
    if needs_gradients(method, config):
        total += gradients(config, method, min(windows, gradient_windows), length)
    return total


def matmul_peak(size: int = 2048, repeats: int = 5) -> float:
    """Best float32 matmul rate of this machine in this process, operations per second."""
    import jax
    import jax.numpy as jnp

    a: Any = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
