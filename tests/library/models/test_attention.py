"""The forms of attention for a GPU agree with the one for CPUs."""

import jax
import jax.numpy as jnp
import pytest

from lordjax.kernels.base import matmul
from lordjax.models import attention
from lordjax.runtime import target


def inputs(length, heads, kv_heads, width, value_width, dtype=jnp.bfloat16):
    shapes = [(heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width)]
    keys = jax.random.split(jax.random.key(0), 4)
    made = (jax.random.normal(k, (2, length, *s), dtype) for k, s in zip(keys, shapes, strict=True))
    *arrays, weights = made
    return tuple(arrays), weights


def apart(x, exact):
    """Relative distance of an array or of a tuple of arrays."""
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(exact), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


@pytest.mark.full
@pytest.mark.parametrize(
    "sizes", [(128, 4, 2, 64, 64), (70, 2, 2, 24, 40)], ids=["grouped", "odd sizes"]
)
def test_the_fused_kernel_is_as_exact_as_the_chunks(sizes):
    arrays, weights = inputs(*sizes)

    def losses(fn, dtype, **how):
        def loss(arrays):
            y = fn(*arrays, scale=0.2, **how).astype(jnp.float32)
            return jnp.sum(y * weights.astype(jnp.float32)), y

        given = tuple(a.astype(dtype) for a in arrays)
        gradients, y = jax.grad(loss, has_aux=True)(given)
        return y, jax.tree.map(lambda a: a.astype(jnp.float32), gradients)

    exact = losses(attention.in_chunks, jnp.float32)
    chunks = losses(attention.in_chunks, jnp.bfloat16)
    fused = losses(attention.fused, jnp.bfloat16, interpret=True)
    for one, other, right in zip(fused, chunks, exact, strict=True):
        assert apart(one, right) < 1.5 * apart(other, right)


def lowered(fn, *args):
    with target.absent_gpus():
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("change", "dtype", "used"),
    [
        ({}, jnp.bfloat16, True),
        ({}, jnp.float32, False),
        ({"cap": 30.0}, jnp.bfloat16, False),
        ({"sliding_window": 64}, jnp.bfloat16, False),
        ({"causal": False}, jnp.bfloat16, False),
        ({"mask": jnp.ones((2, 128), bool)}, jnp.bfloat16, False),
    ],
    ids=["plain", "float32", "cap", "window", "both directions", "mask"],
)
def test_a_gpu_fuses_plain_causal_attention(change, dtype, used):
    arrays, _ = inputs(128, 4, 2, 64, 64, dtype)
    text = lowered(lambda *a: attention.attend(*a, scale=0.2, **change), *arrays)
    assert ("triton" in text) == used


def test_a_gpu_does_not_fuse_heads_that_exceed_its_shared_memory():
    arrays, _ = inputs(128, 2, 2, 64, attention.FUSED_WIDTH + 8)
    assert "triton" not in lowered(lambda *a: attention.attend(*a, scale=0.2), *arrays)


def test_several_gpus_do_not_fuse_attention():
    arrays, _ = inputs(128, 4, 2, 64, 64)
    with target.absent_gpus(2):
        traced = jax.jit(lambda *a: attention.attend(*a, scale=0.2)).trace(*arrays)
        assert "triton" not in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("heads", [2, 4])
def test_a_query_over_a_cache_is_the_last_row_of_attention(monkeypatch, heads):
    """With a row of zeros beside a single query, as on a GPU, and without."""
    (q, k, v), _ = inputs(16, heads, 2, 8, 12, jnp.float32)
    exact = attention.attend(q, k, v, scale=0.2)[:, -1:]
    cached = q[:, -1:], k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), jnp.full((2, 1), 15)
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(target, "platform", lambda name=platform: name)
        assert apart(attention.attend_cached(*cached, scale=0.2), exact) < 1e-6


@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1, 6)])
def test_a_product_with_one_row_gets_a_second_row_on_a_gpu(shape):
    x, kernel = jnp.arange(6.0).reshape(shape), jnp.ones((6, 4))
    with target.absent_gpus():
        assert "f32[2,6]" in str(jax.make_jaxpr(matmul)(x, kernel))
        y = matmul(x, kernel)
    assert y.shape == (*shape[:-1], 4)
    assert jnp.all(y == 15.0)
    assert "f32[2,6]" not in str(jax.make_jaxpr(matmul)(x, kernel))
