"""Every kernel kind, dtype and leading axes: a kernel behaves like its matrix."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.kernels.base import Kernel, materialize, matmul, nbytes
from lordjax.kernels.kinds import KINDS, check, kind_of, weights
from lordjax.kernels.layout import Layout, Rearranged
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.normal_float import Format
from lordjax.kernels.pruned import Pruned
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized

IN, OUT, RANK, INNER = 12, 10, 5, 3
ITEM = {"float32": 4, "bfloat16": 2}
# Unit roundoff: storage and every product in bfloat16 keep 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2}
# No block divides the matrices.
TWO = Format(2, 2, "float16", 16, 16)
THREE = Format(3, 4, "bfloat16", 16, 4)
FOUR = Format()


def normal(key, shape, dtype):
    return jnp.asarray(np.random.default_rng(key).normal(size=shape), dtype)


def dense(lead, dtype):
    return normal(0, (*lead, IN, OUT), dtype)


def low_rank(lead, dtype):
    return LowRank(normal(1, (*lead, IN, RANK), dtype), normal(2, (*lead, RANK, OUT), dtype))


def nested(lead, dtype):
    left = LowRank(normal(3, (*lead, IN, INNER), dtype), normal(4, (*lead, INNER, RANK), dtype))
    return LowRank(left, normal(5, (*lead, RANK, OUT), dtype))


# Compiled, to save time; that this changes nothing is tested below.
encode = jax.jit(NFQuantized.encode, static_argnums=1)
compiled_matmul = jax.jit(matmul)
compiled_materialize = jax.jit(materialize)


def quantized(form):
    return lambda lead, dtype: encode(normal(6, (*lead, IN, OUT), dtype), form)


def low_rank_plus_quantized(lead, dtype):
    return LowRankPlusQuantized(quantized(THREE)(lead, dtype), low_rank(lead, dtype))


def low_rank_of_quantized(lead, dtype):
    factors = low_rank(lead, dtype)
    return LowRank(encode(factors.left, FOUR), encode(factors.right, TWO))


def rearranged(lead, dtype):
    """A matrix whose inputs are the last axis of the parameter."""
    pair = LowRank(normal(1, (*lead, OUT, RANK), dtype), normal(2, (*lead, RANK, IN), dtype))
    return Rearranged(pair, Layout((IN, OUT), (), ((OUT, 1),), ((IN, OUT),)))


def pruned(rows):
    shape, size = ((INNER, OUT), IN) if rows else ((IN, INNER), OUT)
    return lambda lead, dtype: Pruned(normal(1, (*lead, *shape), dtype), rows, size)


class Row(NamedTuple):
    """A kind of kernel: how to make one, and the numbers and bytes that it holds."""

    make: Callable[[tuple[int, ...], str], Any]
    floats: int  # numbers in the dtype asked for; the rest is constant
    codes: int = 0
    packed: int = 0  # bytes of codes and of all scales; such a kernel is float32


# Words of codes for 120, 60 and 50 weights and of their scales, scales of scales, the offset.
BYTES_OF_TWO = 4 * (8 + 2) + 2 + 4
BYTES_OF_THREE = 4 * (12 + 4) + 2 * 2 + 4
BYTES_OF_FOUR = 4 * (16 + 8) + 4 + 4
LEFT, RIGHT = 4 * (8 + 8) + 4 + 4, 4 * (4 + 2) + 2 + 4

# A new kind is one more row.
KERNELS = {
    "array": Row(dense, IN * OUT),
    "low_rank": Row(low_rank, RANK * (IN + OUT)),
    "low_rank_of_low_rank": Row(nested, INNER * (IN + RANK) + RANK * OUT),
    "2_bits": Row(quantized(TWO), 0, IN * OUT, BYTES_OF_TWO),
    "3_bits": Row(quantized(THREE), 0, IN * OUT, BYTES_OF_THREE),
    "4_bits": Row(quantized(FOUR), 0, IN * OUT, BYTES_OF_FOUR),
    "low_rank_plus_3_bits": Row(
        low_rank_plus_quantized, RANK * (IN + OUT), IN * OUT, BYTES_OF_THREE
    ),
    "rearranged": Row(rearranged, RANK * (IN + OUT)),
    "pruned_outputs": Row(pruned(rows=False), IN * INNER),
    "pruned_inputs": Row(pruned(rows=True), INNER * OUT),
    "low_rank_of_quantized": Row(low_rank_of_quantized, 0, RANK * (IN + OUT), LEFT + RIGHT),
}
LEADS = [(), (3,), (2, 3)]

every_kernel = pytest.mark.parametrize("name", KERNELS)
every_trainable = pytest.mark.parametrize("name", [n for n, row in KERNELS.items() if row.floats])
every_packed = pytest.mark.parametrize("name", [n for n, row in KERNELS.items() if row.packed])
every_dtype = pytest.mark.parametrize("dtype", ITEM)
every_lead = pytest.mark.parametrize("lead", LEADS, ids=str)


@functools.cache
def made(name, lead=(), dtype="float32"):
    return KERNELS[name].make(lead, dtype)


def stored_dtype(name, dtype):
    return jnp.dtype("float32" if KERNELS[name].packed else dtype)


def trainable(kernel):
    """Returns a kernel's arrays outside quantized parts, and a function that replaces them."""
    parts, structure = jax.tree.flatten(kernel, is_leaf=lambda p: isinstance(p, NFQuantized))
    free = [i for i, part in enumerate(parts) if not isinstance(part, NFQuantized)]

    def rebuild(arrays):
        new = dict(zip(free, arrays, strict=True))
        return jax.tree.unflatten(structure, [new.get(i, part) for i, part in enumerate(parts)])

    return [parts[i] for i in free], rebuild


def wide(x):
    return np.asarray(x, np.float64)


def assert_close(actual, expected, dtype):
    scale = np.abs(wide(expected)).max()
    np.testing.assert_allclose(wide(actual), wide(expected), rtol=0, atol=TOLERANCE[dtype] * scale)


def test_every_kind_on_disk_is_tested():
    assert {kind_of(made(name)) for name in KERNELS} >= set(KINDS)


@pytest.mark.quick("()-float32-*")
@every_kernel
@every_dtype
@every_lead
def test_is_the_matrix_it_stands_for(name, dtype, lead):
    kernel, row, count = made(name, lead, dtype), KERNELS[name], int(np.prod(lead))
    assert kernel.shape == (*lead, IN, OUT)
    assert kernel.dtype == stored_dtype(name, dtype)
    assert nbytes(kernel) == count * (row.floats * ITEM[dtype] + row.packed)
    assert weights(kernel) == count * (row.floats + row.codes)

    matrix = compiled_materialize(kernel)
    assert isinstance(matrix, jax.Array) and matrix.shape == kernel.shape
    assert matrix.dtype == kernel.dtype
    x = normal(9, (*lead, 4, IN), dtype)
    y = compiled_matmul(x, kernel)
    assert y.shape == (*lead, 4, OUT) and y.dtype == x.dtype
    assert_close(y, wide(x) @ wide(matrix), dtype)


@every_kernel
def test_matmul_takes_the_dtype_of_the_activations(name):
    kernel, x = made(name, dtype="bfloat16"), normal(9, (4, IN), "float32")
    y = compiled_matmul(x, kernel)
    assert y.dtype == jnp.float32
    # Only the stored numbers are rounded, not the computation.
    arrays, rebuild = trainable(kernel)
    exact = compiled_materialize(rebuild([a.astype(jnp.float32) for a in arrays]))
    assert_close(y, wide(x) @ wide(exact), "float32")


@every_kernel
@pytest.mark.parametrize("shape", [(IN,), (2, 3, IN)], ids=str)
def test_any_number_of_token_axes(name, shape):
    kernel, x = made(name), normal(9, shape, "float32")
    product = wide(x) @ wide(compiled_materialize(kernel))
    assert_close(compiled_matmul(x, kernel), product, "float32")


@every_kernel
def test_vmap_over_a_stack_is_the_stack_of_results(name):
    stack, x = made(name, (3,)), normal(9, (3, 4, IN), "float32")
    shapes = []

    def one(x, kernel):
        shapes.append(kernel.shape)
        return matmul(x, kernel)

    y = jax.jit(jax.vmap(one))(x, stack)
    assert shapes == [(IN, OUT)]  # derived from the leaves, so right inside vmap
    for i in range(3):
        single = jax.tree.map(lambda a, i=i: a[i], stack)
        assert_close(y[i], wide(x[i]) @ wide(compiled_materialize(single)), "float32")


@every_kernel
@every_dtype
@every_lead
def test_size_is_known_without_memory(name, dtype, lead):
    promised = jax.eval_shape(lambda: KERNELS[name].make(lead, dtype))
    kernel = made(name, lead, dtype)
    assert nbytes(promised) == nbytes(kernel) and weights(promised) == weights(kernel)
    assert promised.shape == (*lead, IN, OUT) and promised.dtype == stored_dtype(name, dtype)


@pytest.mark.quick("low_rank", "4_bits")
@every_kernel
def test_jit_takes_and_returns_kernels(name):
    kernel, x = made(name), normal(9, (4, IN), "float32")
    doubled = jax.jit(lambda k: jax.tree.map(lambda a: 2 * a, k))(kernel)
    assert type(doubled) is type(kernel) and doubled.shape == kernel.shape
    assert_close(compiled_matmul(x, kernel), matmul(x, kernel), "float32")
    assert_close(compiled_materialize(kernel), materialize(kernel), "float32")


@every_kernel
@pytest.mark.parametrize("value", [None, True, 1.5, "name"], ids=str)
def test_leaves_may_be_anything_to_tree_map(name, value):
    kernel = made(name)
    marks = jax.tree.map(lambda _: value, kernel)
    assert jax.tree.leaves(marks) == [value] * len(jax.tree.leaves(kernel)) * (value is not None)
    back = jax.tree.map(lambda old, _: old, kernel, marks, is_leaf=lambda leaf: leaf is None)
    assert nbytes(back) == nbytes(kernel)


@every_trainable
def test_gradients_reach_every_factor(name):
    with jax.enable_x64(True):
        arrays, rebuild = trainable(made(name))
        assert sum(a.size for a in arrays) == KERNELS[name].floats
        arrays = [jnp.asarray(a, jnp.float64) for a in arrays]
        x = jnp.asarray(normal(9, (4, IN), "float32"), jnp.float64)

        @jax.jit
        def loss(arrays):
            return jnp.sum(jnp.sin(matmul(x, rebuild(arrays))))

        for i, slope in enumerate(jax.grad(loss)(arrays)):
            direction = jnp.asarray(normal(20 + i, slope.shape, "float32"), jnp.float64)
            step = 1e-6

            def moved(t, i=i, direction=direction):
                return loss([*arrays[:i], arrays[i] + t * direction, *arrays[i + 1 :]])

            difference = (moved(step) - moved(-step)) / (2 * step)
            expected = jnp.sum(slope * direction)
            assert abs(expected) > 1e-3
            np.testing.assert_allclose(difference, expected, rtol=1e-6)


@every_packed
def test_what_is_quantised_is_constant(name):
    def norm(kernel):
        return jnp.sum(matmul(normal(9, (4, IN), "float32"), kernel) ** 2)

    slopes = jax.grad(jax.jit(norm), allow_int=True)(made(name))
    slopes, _ = jax.tree.flatten(slopes, is_leaf=lambda part: isinstance(part, NFQuantized))
    constant = [part for part in slopes if isinstance(part, NFQuantized)]
    assert constant
    for part in constant:
        assert part.codes.dtype == part.scales.dtype == jax.dtypes.float0
        np.testing.assert_array_equal(np.asarray(part.supers, np.float32), 0)
        np.testing.assert_array_equal(part.offset, 0)
    for slope in (part for part in slopes if not isinstance(part, NFQuantized)):
        assert jnp.all(slope != 0)


@pytest.mark.quick("False-jit")
@pytest.mark.parametrize("jit", [lambda fn: fn, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("base", [False, True])
def test_backward_keeps_no_decoded_matrix(base, jit):
    fan_in, fan_out, rank = 96, 64, 4
    kernel = encode(normal(0, (fan_in, fan_out), "float32"), FOUR)
    factors = LowRank(jnp.ones((fan_in, rank)), jnp.ones((rank, fan_out)))
    x = normal(1, (8, fan_in), "float32")
    kernel = LowRankPlusQuantized(kernel, factors) if base else kernel
    arrays, rebuild = trainable(kernel)

    @jit
    def pull_back(x, arrays):
        return jax.vjp(lambda x, arrays: matmul(x, rebuild(arrays)), x, arrays)[1]

    # x, the packed kernel, x @ left, and the table of 16 levels.
    enough = nbytes(x) + nbytes(kernel) + 4 * (8 * rank + 16)
    kept = nbytes(pull_back(x, arrays))
    assert nbytes(kernel) - nbytes(arrays) <= kept <= enough < 4 * fan_in * fan_out
    # It is the pull-back of the product.
    by_x, _ = pull_back(x, arrays)(jnp.ones((8, fan_out)))
    assert_close(by_x, np.ones((8, fan_out)) @ wide(materialize(kernel)).T, "float32")


def test_materialize_and_nbytes_walk_trees():
    table = {name: made(name) for name in KERNELS}
    tree = {"block": table, "scale": jnp.ones(7)}
    plain = materialize(tree)
    assert not any(isinstance(leaf, Kernel) for leaf in plain["block"].values())
    assert all(leaf.shape == (IN, OUT) for leaf in plain["block"].values())
    np.testing.assert_array_equal(plain["scale"], tree["scale"])
    assert nbytes(tree) == sum(nbytes(kernel) for kernel in table.values()) + 7 * 4
    assert isinstance(tree["block"]["2_bits"], NFQuantized)
    assert isinstance(tree["block"]["low_rank"], LowRank)  # the input is untouched


@every_lead
def test_rank_is_the_inner_dimension(lead):
    assert low_rank(lead, "float32").rank == RANK
    assert nested(lead, "float32").rank == RANK
    assert low_rank_of_quantized(lead, "float32").rank == RANK
    assert low_rank_plus_quantized(lead, "float32").rank == RANK


# --- quantised -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "error"), [(TWO, 0.6), (THREE, 0.25), (FOUR, 0.12)], ids=str)
def test_quantised_is_near(form, error):
    matrix = dense((), "float32")
    away = wide(encode(matrix, form).materialize()) - wide(matrix)
    assert error / 3 < np.linalg.norm(away) / np.linalg.norm(wide(matrix)) < error


@every_packed
def test_a_stack_is_encoded_matrix_by_matrix(name):
    stack = compiled_materialize(made(name, (2, 3)))
    again = encode(stack, THREE)
    for i, j in np.ndindex(2, 3):
        single = encode(stack[i, j], THREE)
        for have, want in zip(jax.tree.leaves(again), jax.tree.leaves(single), strict=True):
            np.testing.assert_array_equal(have[i, j], want)
        assert single.shape == (IN, OUT)


def test_blocks_run_along_the_inputs_of_an_output():
    # A scale for 8 weights, a scale of scales for the 4 scales of an output.
    form, fan_in, fan_out = Format(8, 8, "float32", 8, 4), 32, 6
    matrix = np.random.default_rng(0).uniform(0.5, 1, (fan_in, fan_out)).astype(np.float32)
    matrix[:, 0] = 0.25  # the least scale, which all outputs share
    scaled = matrix.copy()
    scaled[:, 3] *= 4
    before = encode(jnp.asarray(matrix), form)
    after = encode(jnp.asarray(scaled), form)
    others = [0, 1, 2, 4, 5]
    old, new = np.asarray(before.materialize()), np.asarray(after.materialize())
    np.testing.assert_array_equal(new[:, others], old[:, others])
    np.testing.assert_allclose(new[:, 3], scaled[:, 3], atol=0.1)
    codes, again = (np.asarray(k.codes).reshape(fan_out, -1) for k in (before, after))
    np.testing.assert_array_equal(again[others], codes[others])
    assert before.supers.shape == (fan_out,)
    assert np.flatnonzero(np.asarray(before.supers != after.supers)).tolist() == [3]


# --- checks --------------------------------------------------------------------------------------


def spec(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


CODED = jax.eval_shape(lambda: quantized(FOUR)((), "float32"))
BROKEN = {
    "ranks": (LowRank(spec(IN, 4), spec(5, OUT)), "a/kernel"),
    "dtypes": (LowRank(spec(IN, 4), spec(4, OUT, dtype="bfloat16")), "a/kernel"),
    "leading axes": (LowRank(spec(2, IN, 4), spec(3, 4, OUT)), "a/kernel"),
    "vector": (LowRank(spec(IN, 4), spec(4)), "a/kernel/right"),
    "inner ranks": (
        LowRank(LowRank(spec(IN, 2), spec(3, 4)), spec(4, OUT)),
        "a/kernel/left",
    ),
    "too few codes": (CODED.replace(codes=spec(15, dtype="uint32")), "a/kernel/codes"),
    "type of codes": (CODED.replace(codes=spec(16, dtype="int32")), "a/kernel/codes"),
    "too few scales": (CODED.replace(scales=spec(7, dtype="uint32")), "a/kernel/scales"),
    "type of scales": (CODED.replace(scales=spec(8)), "a/kernel/scales"),
    "number of supers": (CODED.replace(supers=spec(2)), "a/kernel/supers"),
    "type of supers": (CODED.replace(supers=spec(1, dtype="bfloat16")), "a/kernel/supers"),
    "shape of the offset": (CODED.replace(offset=spec(1)), "a/kernel/offset"),
    "leading axes of scales": (
        CODED.replace(codes=spec(3, 16, dtype="uint32")),
        "a/kernel/scales",
    ),
    "other format": (CODED.replace(format=THREE), "a/kernel/codes"),
    "other fan": (CODED.replace(fan_in=IN + 4), "a/kernel/codes"),
    "negative fans": (CODED.replace(fan_in=-IN, fan_out=-OUT), "a/kernel"),
    "fan is no integer": (CODED.replace(fan_in=float(IN)), "a/kernel"),
    "quantised factor": (
        LowRank(CODED.replace(scales=spec(8)), spec(OUT, OUT)),
        "a/kernel/left/scales",
    ),
    "one factor quantised, dtypes": (
        LowRank(CODED, spec(OUT, OUT, dtype="bfloat16")),
        "a/kernel",
    ),
    "shapes of a sum": (
        LowRankPlusQuantized(CODED, LowRank(spec(IN, 4), spec(4, OUT + 1))),
        "a/kernel",
    ),
    "leading axes of a sum": (
        LowRankPlusQuantized(CODED, LowRank(spec(2, IN, 4), spec(2, 4, OUT))),
        "a/kernel",
    ),
    "base of a sum": (
        LowRankPlusQuantized(CODED.replace(offset=spec(1)), LowRank(spec(IN, 4), spec(4, OUT))),
        "a/kernel/base/offset",
    ),
    "factors of a sum": (
        LowRankPlusQuantized(CODED, LowRank(spec(IN, 4), spec(5, OUT))),
        "a/kernel/low_rank",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_check_names_the_path(case):
    kernel, where = BROKEN[case]
    with pytest.raises(ValueError, match=f"^{where}: "):
        check(kernel, "a/kernel")


@every_kernel
@every_lead
def test_check_accepts_what_fits(name, lead):
    check(made(name, lead), "a/kernel")
    check(jax.eval_shape(lambda: KERNELS[name].make(lead, "bfloat16")), "a/kernel")


def test_a_kind_without_a_name_on_disk_is_not_taken_for_an_array():
    class Other(LowRank):
        pass

    with pytest.raises(TypeError, match="Other"):
        kind_of(Other(spec(IN, 4), spec(4, OUT)))
    assert kind_of(spec(IN, OUT)) == "dense"
