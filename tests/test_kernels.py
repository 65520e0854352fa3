"""Every kind of kernel × dtype × leading axes: it behaves as the matrix it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.kernels import KINDS, Kernel, LowRank, check, kind_of, materialize, matmul, nbytes

IN, OUT, RANK, INNER = 12, 10, 5, 3
ITEM = {"float32": 4, "bfloat16": 2}
# Unit roundoff: storage and every product in bfloat16 keep 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2}


def normal(key, shape, dtype):
    return jnp.asarray(np.random.default_rng(key).normal(size=shape), dtype)


def dense(lead, dtype):
    return normal(0, (*lead, IN, OUT), dtype)


def low_rank(lead, dtype):
    return LowRank(normal(1, (*lead, IN, RANK), dtype), normal(2, (*lead, RANK, OUT), dtype))


def nested(lead, dtype):
    left = LowRank(normal(3, (*lead, IN, INNER), dtype), normal(4, (*lead, INNER, RANK), dtype))
    return LowRank(left, normal(5, (*lead, RANK, OUT), dtype))


# name -> (constructor, weights per matrix). A new kind is one more row.
KERNELS = {
    "array": (dense, IN * OUT),
    "low_rank": (low_rank, RANK * (IN + OUT)),
    "low_rank_of_low_rank": (nested, INNER * (IN + RANK) + RANK * OUT),
}
LEADS = [(), (3,), (2, 3)]

every_kernel = pytest.mark.parametrize("name", KERNELS)
every_dtype = pytest.mark.parametrize("dtype", ITEM)
every_lead = pytest.mark.parametrize("lead", LEADS, ids=str)


def wide(x):
    return np.asarray(x, np.float64)


def assert_close(actual, expected, dtype):
    scale = np.abs(wide(expected)).max()
    np.testing.assert_allclose(wide(actual), wide(expected), rtol=0, atol=TOLERANCE[dtype] * scale)


def test_every_kind_on_disk_is_tested():
    assert {kind_of(make((), "float32")) for make, _ in KERNELS.values()} >= set(KINDS)


@every_kernel
@every_dtype
@every_lead
def test_is_the_matrix_it_stands_for(name, dtype, lead):
    make, weights = KERNELS[name]
    kernel = make(lead, dtype)
    assert kernel.shape == (*lead, IN, OUT)
    assert kernel.dtype == jnp.dtype(dtype)
    assert nbytes(kernel) == int(np.prod(lead)) * weights * ITEM[dtype]

    matrix = materialize(kernel)
    assert isinstance(matrix, jax.Array) and matrix.shape == kernel.shape
    assert matrix.dtype == kernel.dtype
    x = normal(9, (*lead, 4, IN), dtype)
    y = matmul(x, kernel)
    assert y.shape == (*lead, 4, OUT) and y.dtype == x.dtype
    assert_close(y, wide(x) @ wide(matrix), dtype)


@every_kernel
def test_matmul_takes_the_dtype_of_the_activations(name):
    make, _ = KERNELS[name]
    kernel, x = make((), "bfloat16"), normal(9, (4, IN), "float32")
    y = matmul(x, kernel)
    assert y.dtype == jnp.float32
    # Only the stored numbers are rounded, not the computation.
    exact = materialize(jax.tree.map(lambda a: a.astype(jnp.float32), kernel))
    assert_close(y, wide(x) @ wide(exact), "float32")


@every_kernel
@pytest.mark.parametrize("shape", [(IN,), (2, 3, IN)], ids=str)
def test_any_number_of_token_axes(name, shape):
    kernel, x = KERNELS[name][0]((), "float32"), normal(9, shape, "float32")
    assert_close(matmul(x, kernel), wide(x) @ wide(materialize(kernel)), "float32")


@every_kernel
def test_vmap_over_a_stack_is_the_stack_of_results(name):
    stack, x = KERNELS[name][0]((3,), "float32"), normal(9, (3, 4, IN), "float32")
    shapes = []

    def one(x, kernel):
        shapes.append(kernel.shape)
        return matmul(x, kernel)

    y = jax.vmap(one)(x, stack)
    assert shapes == [(IN, OUT)]  # derived from the leaves, so right inside vmap
    for i in range(3):
        single = jax.tree.map(lambda a, i=i: a[i], stack)
        assert_close(y[i], wide(x[i]) @ wide(materialize(single)), "float32")


@every_kernel
@every_dtype
@every_lead
def test_size_is_known_without_memory(name, dtype, lead):
    make, _ = KERNELS[name]
    promised = jax.eval_shape(lambda: make(lead, dtype))
    assert nbytes(promised) == nbytes(make(lead, dtype))
    assert promised.shape == (*lead, IN, OUT) and promised.dtype == jnp.dtype(dtype)


@every_kernel
def test_jit_takes_and_returns_kernels(name):
    kernel, x = KERNELS[name][0]((), "float32"), normal(9, (4, IN), "float32")
    doubled = jax.jit(lambda k: jax.tree.map(lambda a: 2 * a, k))(kernel)
    assert type(doubled) is type(kernel) and doubled.shape == kernel.shape
    assert_close(jax.jit(matmul)(x, kernel), matmul(x, kernel), "float32")
    assert_close(jax.jit(materialize)(kernel), materialize(kernel), "float32")


@every_kernel
@pytest.mark.parametrize("value", [None, True, 1.5, "name"], ids=str)
def test_leaves_may_be_anything_to_tree_map(name, value):
    kernel = KERNELS[name][0]((), "float32")
    marks = jax.tree.map(lambda _: value, kernel)
    assert jax.tree.leaves(marks) == [value] * len(jax.tree.leaves(kernel)) * (value is not None)
    back = jax.tree.map(lambda old, _: old, kernel, marks, is_leaf=lambda leaf: leaf is None)
    assert nbytes(back) == nbytes(kernel)


@every_kernel
def test_gradients_reach_every_factor(name):
    with jax.enable_x64(True):
        kernel = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float64), KERNELS[name][0]((), "float32")
        )
        x = jnp.asarray(normal(9, (4, IN), "float32"), jnp.float64)

        def loss(kernel):
            return jnp.sum(jnp.sin(matmul(x, kernel)))

        gradient = jax.grad(loss)(kernel)
        leaves, structure = jax.tree.flatten(kernel)
        assert jax.tree.structure(gradient) == structure
        for i, slope in enumerate(jax.tree.leaves(gradient)):
            direction = jnp.asarray(normal(20 + i, slope.shape, "float32"), jnp.float64)
            step = 1e-6

            def moved(t, i=i, direction=direction):
                new = [*leaves[:i], leaves[i] + t * direction, *leaves[i + 1 :]]
                return loss(jax.tree.unflatten(structure, new))

            difference = (moved(step) - moved(-step)) / (2 * step)
            expected = jnp.sum(slope * direction)
            assert abs(expected) > 1e-3
            np.testing.assert_allclose(difference, expected, rtol=1e-6)


def test_materialize_and_nbytes_walk_trees():
    table = {name: make((), "float32") for name, (make, _) in KERNELS.items()}
    tree = {"block": table, "scale": jnp.ones(7)}
    plain = materialize(tree)
    assert not any(isinstance(leaf, Kernel) for leaf in plain["block"].values())
    assert all(leaf.shape == (IN, OUT) for leaf in plain["block"].values())
    np.testing.assert_array_equal(plain["scale"], tree["scale"])
    assert nbytes(tree) == sum(nbytes(kernel) for kernel in table.values()) + 7 * 4
    assert isinstance(tree["block"]["low_rank"], LowRank)  # the input is untouched


@every_lead
def test_rank_is_the_inner_dimension(lead):
    assert low_rank(lead, "float32").rank == RANK
    assert nested(lead, "float32").rank == RANK


def spec(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


BROKEN = {
    "ranks": (LowRank(spec(IN, 4), spec(5, OUT)), "a/kernel"),
    "dtypes": (LowRank(spec(IN, 4), spec(4, OUT, dtype="bfloat16")), "a/kernel"),
    "leading axes": (LowRank(spec(2, IN, 4), spec(3, 4, OUT)), "a/kernel"),
    "vector": (LowRank(spec(IN, 4), spec(4)), "a/kernel/right"),
    "inner ranks": (
        LowRank(LowRank(spec(IN, 2), spec(3, 4)), spec(4, OUT)),
        "a/kernel/left",
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
    check(KERNELS[name][0](lead, "float32"), "a/kernel")


def test_a_kind_without_a_name_on_disk_is_not_taken_for_an_array():
    class Other(LowRank):
        pass

    with pytest.raises(TypeError, match="Other"):
        kind_of(Other(spec(IN, 4), spec(4, OUT)))
    assert kind_of(spec(IN, OUT)) == "dense"
