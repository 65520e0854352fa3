"""Products in tiles equal those with the decoded matrix, for every format and shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.kernels import base, nf_cpu, normal_float
from lordjax.kernels.quantized import NFQuantized
from lordjax.runtime import xla_scheduling

FORMATS = ["nf2", "nf3", "nf4", "nf8", "nf4-8-float32-16-16", "nf3-4-bfloat16-16-16"]
SHAPES = [(192, 24), (128, 7), (64, 1)]


def some(shape, form, seed=0):
    """Returns a quantized matrix and inputs for it."""
    rng = np.random.default_rng(seed)
    matrix = NFQuantized.encode(
        rng.normal(size=shape).astype(np.float32), normal_float.Format.parse(form)
    )
    return matrix, rng


def close(found, expected, rtol=1e-5):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    scale = np.abs(np.asarray(expected, np.float64)).max()
    difference = np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    assert difference.max() <= rtol * scale


@pytest.mark.quick("*-shape0-lead1")
@pytest.mark.parametrize("lead", [(), (2, 5)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMATS)
def test_is_the_product_with_the_decoded_matrix(form, shape, lead, monkeypatch):
    monkeypatch.setattr(nf_cpu, "TILE", 2048)  # so that there are several
    monkeypatch.setattr(nf_cpu, "ROW_TILE", 2048)
    matrix, rng = some(shape, form)
    assert nf_cpu.supported(matrix)
    x = jnp.asarray(rng.normal(size=(*lead, shape[0])), jnp.float32)
    g = jnp.asarray(rng.normal(size=(*lead, shape[1])), jnp.float32)
    dense = matrix.materialize()
    close(jax.jit(nf_cpu.product)(x, matrix), x @ dense)
    close(jax.jit(nf_cpu.transposed_product)(g, matrix), g @ dense.T)


@pytest.mark.quick("nf3-2048")
@pytest.mark.parametrize("tile", [2048, 2**18])  # three tiles, one
@pytest.mark.parametrize("form", ["nf3", "nf4"])
def test_many_rows_give_what_few_give(form, tile, monkeypatch):
    monkeypatch.setattr(nf_cpu, "TILE", tile)
    matrix, rng = some((192, 24), form)
    x = jnp.asarray(rng.normal(size=(nf_cpu.FEW + 1, 192)), jnp.float32)
    few = [nf_cpu.product(part, matrix) for part in (x[:1], x[1:])]
    close(nf_cpu.product(x, matrix), jnp.concatenate(few))


def test_what_is_computed_once_keeps_its_bits():
    x = jnp.asarray([0.0, -0.0, 1.5, -1e-30, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(np.signbit(xla_scheduling.compute_once(x)), np.signbit(x))
    np.testing.assert_array_equal(xla_scheduling.compute_once(x), x)


@pytest.mark.quick("1")
@pytest.mark.parametrize("rows", [1, 4])
def test_kernels_take_it_and_its_gradient(rows, monkeypatch):
    monkeypatch.setattr(nf_cpu, "TILE", 512)  # so that there are several
    matrix, rng = some((64, 40), "nf4")
    x = jnp.asarray(rng.normal(size=(rows, 64)), jnp.float32)
    target = jnp.asarray(rng.normal(size=(rows, 40)), jnp.float32)
    assert "scan" in str(jax.make_jaxpr(base.matmul)(jnp.ones((2, 64)), matrix))

    def loss(x, w):
        return jnp.sum((base.matmul(x, w) - target) ** 2)

    (value, gradient), (expected, direct) = (
        jax.value_and_grad(loss)(x, w) for w in (matrix, matrix.materialize())
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    close(gradient, direct)


@pytest.mark.parametrize("rows", [1, 4])
def test_other_dtypes_are_kept(rows):
    matrix, rng = some((64, 40), "nf4")
    x = jnp.asarray(rng.normal(size=(rows, 64)), jnp.bfloat16)
    expected = x @ matrix.materialize().astype(jnp.bfloat16)
    close(nf_cpu.product(x, matrix), expected, rtol=0.02)


def test_results_of_later_products_have_no_memory_before_their_turn(monkeypatch):
    """The compiled program's memory does not grow with the number of products that follow."""
    monkeypatch.setattr(nf_cpu, "TILE", 2048)
    matrix, _ = some((64, 64), "nf4")
    x = jnp.ones((512, 64), jnp.float32)

    def temporary(count):
        def chain(x, matrix):
            for _ in range(count):
                x = jnp.tanh(nf_cpu.product(x, matrix))
            return x

        return jax.jit(chain).lower(x, matrix).compile().memory_analysis().temp_size_in_bytes

    assert temporary(12) < temporary(4) + x.nbytes


def test_mapped_over_inputs():
    matrix, rng = some((64, 40), "nf4")
    x = jnp.asarray(rng.normal(size=(3, 1, 64)), jnp.float32)
    close(jax.vmap(lambda row: base.matmul(row, matrix))(x), x @ matrix.materialize())


@pytest.mark.quick("shape0-nf4")
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((60, 8), "nf4"),
        ((48, 8), "nf3"),
        ((96, 8), "nf4"),
        ((2**17, 11), "nf4"),
        ((16, 29), "nf4-4-bfloat16-16-256"),
    ],
)
def test_what_cannot_be_cut_is_decoded_whole(shape, form, monkeypatch):
    monkeypatch.setattr(nf_cpu, "product", None)  # must not be called
    matrix, rng = some(shape, form)
    assert not nf_cpu.supported(matrix)
    x = jnp.asarray(rng.normal(size=(2, shape[0])), jnp.float32)
    close(base.matmul(x, matrix), x @ matrix.materialize(), 1e-4)


@pytest.mark.full
def test_stacked_matrices_are_decoded_whole():
    rng = np.random.default_rng(0)
    stack = NFQuantized.encode(
        rng.normal(size=(2, 64, 8)).astype(np.float32), normal_float.Format()
    )
    assert not nf_cpu.supported(stack)
