"""Scales that are trained beside frozen codes: the same matrix before, the same size after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.kernels import trees
from lordjax.kernels.base import materialize, matmul, nbytes
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.normal_float import Format
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized
from lordjax.kernels.trained_scales import ShiftedScales, packed, unpacked

RNG = np.random.default_rng(0)
FORM = Format.parse("nf3-8-float32-24-16")  # a block spans columns, and the last one is short
PATH = "layer_0/mlp/up/kernel"


def matrix(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def tree(kernel):
    return trees.unflatten({PATH: kernel, "embed/embedding": matrix(3, 4)})


def kernels():
    base, form = NFQuantized.encode(matrix(20, 13), FORM), Format(8)
    pair = LowRank(*(NFQuantized.encode(matrix(*s), form) for s in ((20, 3), (3, 13))))
    return {"codes": base, "pair of codes": pair, "sum": LowRankPlusQuantized(base, pair)}


@pytest.mark.parametrize("name", ["codes", "pair of codes", "sum"])
def test_nothing_changes_without_training(name):
    kernel = kernels()[name]
    before = tree(kernel)
    new = trees.flatten(unpacked(before))[PATH]
    np.testing.assert_array_equal(materialize(new), materialize(kernel))
    x = matrix(5, 20)
    np.testing.assert_allclose(matmul(x, new), matmul(x, kernel), rtol=1e-5, atol=1e-5)
    after = packed(unpacked(before), before)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert nbytes(after) == nbytes(before)
    again = trees.flatten(after)[PATH]
    np.testing.assert_allclose(materialize(again), materialize(kernel), atol=0.02)


def test_trained_scales_are_kept_with_the_codes():
    kernel = kernels()["codes"]
    before = tree(kernel)
    shifts = jnp.asarray(0.1 * RNG.normal(size=FORM.blocks(260)[0]), jnp.float32)
    trained = trees.update(unpacked(before), {PATH: ShiftedScales(kernel, shifts)})
    after = trees.flatten(packed(trained, before))[PATH]
    np.testing.assert_array_equal(after.codes, kernel.codes)
    wanted = materialize(ShiftedScales(kernel, shifts))
    moved = np.abs(wanted - kernel.materialize()).max()
    assert np.abs(after.materialize() - wanted).max() < 0.05 * moved


def test_the_gradient_of_a_shift_is_that_of_its_block():
    kernel, x, g = kernels()["codes"], matrix(5, 20), matrix(5, 13)
    count = FORM.blocks(260)[0]

    def loss(shifts):
        return jnp.sum(matmul(x, ShiftedScales(kernel, shifts)) * g)

    found = jax.grad(loss)(jnp.zeros(count))
    by_weight = np.asarray((x.T @ g) * kernel.materialize()).T.reshape(-1)
    blocks = np.pad(by_weight, (0, count * 24 - 260)).reshape(count, 24)
    np.testing.assert_allclose(found, blocks.sum(1), rtol=1e-4, atol=1e-4)
