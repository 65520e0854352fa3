"""How many floating-point operations a compression must cost: the yardstick of the benchmarks.

Multiply and add count as two. Counted is what the mathematics asks for, not what the code happens
to do: recomputed activations are left out, causal attention is counted at half of the square.
"""

from __future__ import annotations

import time
from typing import Any

from lordjax.models.config import ModelConfig


def block_weights(config: ModelConfig) -> int:
    """Linear weights of one block."""
    heads = config.num_heads * config.head_size
    kv = config.num_kv_heads * config.head_size
    return config.hidden_size * (2 * heads + 2 * kv + 3 * config.mlp_size)


def forward(config: ModelConfig, windows: int, length: int) -> float:
    """One forward pass of all blocks, without embedding and head."""
    tokens = windows * length
    attention = 2 * tokens * length * config.num_heads * config.head_size  # QKᵀ and PV, causal
    return config.num_layers * (2.0 * block_weights(config) * tokens + attention)


def grams(config: ModelConfig, windows: int, length: int) -> float:
    """Second moments of the four places per block, each of the smaller side's width."""
    heads = config.num_heads * config.head_size
    widths = [
        config.hidden_size,
        heads,
        config.hidden_size,
        min(config.hidden_size, config.mlp_size),
    ]
    return config.num_layers * sum(2.0 * w * w for w in widths) * windows * length


def eigh(config: ModelConfig, per_site: int = 1) -> float:
    """Eigendecompositions of all linear sites at 9 n³ (an upper bound for LAPACK's syevd)."""
    kv = config.num_kv_heads * config.head_size
    narrow = min(config.hidden_size, config.mlp_size)
    sizes = [config.hidden_size, kv, kv, config.hidden_size, narrow, narrow, narrow]
    return config.num_layers * per_site * sum(9.0 * n**3 for n in sizes)


def gradients(
    config: ModelConfig, windows: int, length: int, *, moments: bool, rows: bool
) -> float:
    """Forward, backward to all linear outputs, head included.

    With ``moments`` their second moments, in the coordinates of the smaller side; with ``rows``
    the weight gradients of each window.
    """
    kv = config.num_kv_heads * config.head_size
    narrow = min(config.hidden_size, config.mlp_size)
    sizes = [config.hidden_size, kv, kv, config.hidden_size, narrow, narrow, narrow]
    tokens = windows * length
    linear = 2.0 * config.num_layers * block_weights(config) * tokens
    attention = forward(config, windows, length) - linear
    # Backward a linear layer costs its forward again, attention twice its own.
    total = 2 * linear + 3 * attention + 2 * 2.0 * config.hidden_size * config.vocab_size * tokens
    if moments:
        total += config.num_layers * sum(2.0 * n * n for n in sizes) * tokens
        total += config.num_layers * 2 * 2.0 * config.hidden_size * config.mlp_size * tokens
    return total + linear if rows else total


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
