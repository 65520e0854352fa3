"""The GPU kernel for quantized products: interpreted, lowered for CUDA, and autotuned."""

import functools
import itertools
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from lordjax.kernels import nf_gpu, nf_gpu_autotune
from lordjax.kernels.base import materialize, matmul
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.nf_gpu import Tile
from lordjax.kernels.normal_float import BITS, Format
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized
from lordjax.runtime import target
from lordjax.scripts.benchmarks.gpu.kernels import main

# Unit roundoff; a result in bfloat16 is rounded once, and so are the weights and x @ left.
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-3}
ONE, FEW = Tile(1, 16, word_groups=16, splits=2), Tile(16, 32, word_groups=16)


@pytest.fixture(autouse=True)
def short_programs(request, monkeypatch):
    """Unrolls less, which compiles faster; programs lowered for a GPU unroll as usual."""
    if "cuda" not in request.node.name:
        monkeypatch.setattr(nf_gpu, "UNROLL", 2)


def normal(key, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(key).normal(size=shape), dtype)


encode = jax.jit(NFQuantized.encode, static_argnums=1)
interpreted = jax.jit(functools.partial(nf_gpu.matmul, interpret=True), static_argnames=("tile",))


def quantized(form=None, shape=(96, 40)):
    return encode(normal(0, shape), form or Format())


def low_rank(rank=5, shape=(96, 40), dtype="float32"):
    return LowRank(normal(1, (shape[0], rank), dtype), normal(2, (rank, shape[1]), dtype))


def exact(x, *parts):
    """Returns the product with the materialized matrices, in float32."""
    return sum(x.astype(jnp.float32) @ materialize(k).astype(jnp.float32) for k in parts)


def assert_near(y, expected, dtype="float32"):
    error = jnp.linalg.norm((y.astype(jnp.float32) - expected).reshape(-1))
    assert error <= TOLERANCE[dtype] * jnp.linalg.norm(expected.reshape(-1))


def assert_is_the_product(x, base, factors=None, **kwargs):
    y = interpreted(x, base, factors, **kwargs)
    assert y.shape == (*x.shape[:-1], base.shape[-1]) and y.dtype == x.dtype
    expected = exact(x, base) if factors is None else exact(x, base, factors)
    assert_near(y, expected, x.dtype.name)


@pytest.mark.quick("4-tile0", "3-tile1")
@pytest.mark.parametrize("tile", [ONE, FEW])
@pytest.mark.parametrize("bits", BITS)
def test_every_number_of_bits(bits, tile):
    assert_is_the_product(normal(3, (3, 96)), quantized(Format(bits)), low_rank(), tile=tile)


# Of 3 bits two blocks of 16 share a group; blocks of 80 go on in the next column.
@pytest.mark.parametrize(("bits", "scale_bits", "block"), [(3, 3, 16), (2, 4, 80)])
def test_blocks_that_groups_or_columns_do_not_divide(bits, scale_bits, block):
    form = Format(bits, scale_bits, "bfloat16", block, 5)
    assert_is_the_product(normal(3, (2, 96)), quantized(form), tile=FEW)


@pytest.mark.quick("17-*16")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 17])
def test_dtypes(dtype, rows):
    x = normal(3, (rows, 96), dtype)
    assert_is_the_product(x, quantized(), low_rank(dtype="float32"))


@pytest.mark.parametrize("gather", [True, False])
def test_levels_may_be_read_or_selected(gather):
    tile = Tile(16, 16, word_groups=16, gather=gather)
    y = interpreted(normal(3, (4, 96)), quantized(), tile=tile)
    other = interpreted(normal(3, (4, 96)), quantized(), tile=Tile(16, 16, word_groups=16))
    assert (y == other).all()


@pytest.mark.quick("shape1-*")
@pytest.mark.parametrize(
    ("shape", "lead", "tile"),
    [((8, 1), (), ONE), ((136, 33), (2, 3), ONE), ((136, 33), (19,), FEW), ((264, 16), (17,), FEW)],
)
def test_shapes_that_no_tile_divides(shape, lead, tile):
    x, factors = normal(3, (*lead, shape[0])), low_rank(rank=17, shape=shape)
    assert_is_the_product(x, quantized(shape=shape), factors, tile=tile)


def test_scales_have_the_bits_of_the_materialised_matrix():
    # Rows of the identity: each sum has a single term.
    base = quantized(Format(4, 8, "float32", 16, 7))
    assert (interpreted(jnp.eye(96), base, tile=FEW) == base.materialize()).all()
    assert (interpreted(jnp.eye(96), base, tile=ONE) == base.materialize()).all()


@pytest.mark.quick("1", "40")
@pytest.mark.parametrize("rows", [1, 3, 5, 40, 64, 65, 1000])
def test_default_tiles_fit_the_rows(rows):
    tile = nf_gpu.default_tile(rows)
    assert tile.rows == 1 or tile.rows >= min(rows, 64)
    assert nf_gpu_autotune.candidates(rows)


@pytest.mark.parametrize("interpret", [True, None])
def test_derivatives_are_those_of_the_materialised_product(interpret):
    x, base, factors, g = normal(3, (2, 3, 96)), quantized(), low_rank(), normal(4, (2, 3, 40))

    def with_kernel(x, factors):
        return nf_gpu.matmul(x, base, factors, tile=FEW, interpret=interpret)

    def plain(x, factors):
        return x @ base.materialize() + x @ factors.left @ factors.right

    def pulled(fn):
        y, pull = jax.vjp(fn, x, factors)
        return y, pull(g)

    found, expected = (jax.jit(pulled, static_argnums=0)(fn) for fn in (with_kernel, plain))
    jax.tree.map(assert_near, found, expected)


def test_the_derivative_without_a_low_rank_term():
    x, base, g = normal(3, (3, 96)), quantized(), normal(4, (3, 40))
    of_x = jax.jit(jax.grad(lambda x: jnp.vdot(nf_gpu.matmul(x, base), g)))(x)
    assert_near(of_x, g @ base.materialize().T)


def test_below_vmap_and_scan():
    x, base = normal(3, (3, 2, 96)), quantized()
    run = functools.partial(nf_gpu.matmul, interpret=True)
    assert_near(jax.vmap(run, in_axes=(0, None))(x, base), exact(x, base))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), base)
    assert_near(jax.vmap(run)(x, stacked), exact(x, base))
    _, y = jax.lax.scan(lambda carry, pair: (carry, run(*pair)), None, (x, stacked))
    assert_near(y, exact(x, base))


def test_vmap_decodes_instead_of_running_the_kernel():
    run = jax.vmap(functools.partial(nf_gpu.matmul, interpret=False), in_axes=(0, None))
    x = normal(3, (3, 2, 96))  # would fail on CPU if it ran
    assert_near(run(x, quantized()), exact(x, quantized()))


def test_off_a_gpu_the_matrix_is_decoded():
    x, base = normal(3, (2, 96)), quantized()
    assert_near(nf_gpu.matmul(x, base, low_rank()), exact(x, base, low_rank()))
    assert_near(nf_gpu.decoded(x, base, low_rank()), exact(x, base, low_rank()))
    assert "triton" not in jax.jit(nf_gpu.matmul).lower(x, base).as_text()


def lowered_for_cuda(fn, *args):
    """Returns the text of a program for CUDA; JAX 0.11 needs a GPU, and may drop Triton."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        try:
            return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        except RuntimeError as error:
            if "No supported GPU devices" in str(error):
                pytest.skip(f"jax {jax.__version__} lowers no kernel for CUDA here: {error}")
            raise


@pytest.mark.quick("4")
@pytest.mark.parametrize("bits", BITS)
def test_lowers_for_cuda(bits):
    base, factors = quantized(Format(bits, block=16)), low_rank(rank=20)
    for rows, dtype in ((1, "bfloat16"), (200, "float32")):
        tiles = (None, *nf_gpu_autotune.candidates(rows))
        for tile in tiles if bits == 4 else tiles[:2]:
            run = functools.partial(nf_gpu.matmul, tile=tile)
            text = lowered_for_cuda(run, normal(3, (rows, 96), dtype), base, factors)
            assert "triton" in text


def cases_of_wrong_input():
    x, base = jax.ShapeDtypeStruct((2, 96), "float32"), quantized()
    return {
        "float64": (jax.ShapeDtypeStruct((2, 96), "float64"), base, None),
        r"expected \[..., 96\]": (jax.ShapeDtypeStruct((2, 95), "float32"), base, None),
        "not empty": (jax.ShapeDtypeStruct((0, 96), "float32"), base, None),
        "8 at a time": (jax.ShapeDtypeStruct((2, 12), "float32"), quantized(shape=(12, 8)), None),
        "stacked": (x, encode(normal(0, (2, 96, 8)), Format()), None),
        "32-bit": (jax.ShapeDtypeStruct((2**25, 96), "float32"), base, None),
        "NFQuantized": (x, base, LowRank(encode(normal(1, (96, 8)), Format()), normal(2, (8, 40)))),
        r"low_rank is \(96, 41\)": (x, base, low_rank(shape=(96, 41))),
    }


def test_unsupported_products_are_refused():
    for words, case in cases_of_wrong_input().items():
        assert re.search(words, nf_gpu.unsupported(*case)), words
        with pytest.raises(ValueError, match=words):
            nf_gpu.matmul(*case)


@pytest.mark.parametrize("sizes", [(8, 16, 16), (1, 8, 16), (1, 16, 8), (24, 16, 16), (1, 48, 16)])
def test_tiles_that_no_gpu_takes_are_refused(sizes):
    with pytest.raises(ValueError, match="powers of 2"):
        Tile(*sizes)


def tiles(case):
    """Returns a tile, as if it had been the fastest."""
    return Tile(16, 16, word_groups=16)


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    timed = nf_gpu_autotune.fastest
    yield monkeypatch
    timed.cache_clear()


def test_kernels_take_the_faster_way(one_gpu):
    x, kernel = normal(3, (2, 96)), LowRankPlusQuantized(quantized(), low_rank())
    one_gpu.setattr(nf_gpu_autotune, "fastest", tiles)
    for chosen in (kernel, kernel.base):
        assert "triton" in lowered_for_cuda(matmul, x, chosen)
        assert_near(matmul(x, chosen), exact(x, chosen))  # compiled for CPU: no kernel
    one_gpu.setattr(nf_gpu_autotune, "fastest", lambda case: None)
    assert "triton" not in lowered_for_cuda(lambda x, k: matmul(x, k), x, kernel)


@pytest.mark.parametrize(("backend", "devices"), [("cpu", 1), ("gpu", 2)])
def test_nothing_is_timed_elsewhere(one_gpu, backend, devices):
    one_gpu.setattr(jax, "default_backend", lambda: backend)
    one_gpu.setattr(jax, "device_count", lambda: devices)
    one_gpu.setattr(nf_gpu_autotune, "fastest", lambda case: pytest.fail("timed"))
    assert_near(matmul(normal(3, (2, 96)), quantized()), exact(normal(3, (2, 96)), quantized()))


def test_a_jax_without_triton_decodes(one_gpu):
    one_gpu.setattr(target, "has_triton", lambda: False)
    one_gpu.setattr(nf_gpu_autotune, "fastest", lambda case: pytest.fail("timed"))
    assert_near(matmul(normal(3, (2, 96)), quantized()), exact(normal(3, (2, 96)), quantized()))


def test_products_without_a_kernel_are_decoded(one_gpu):
    one_gpu.setattr(nf_gpu_autotune, "fastest", lambda case: pytest.fail("timed"))
    x, base = normal(3, (2, 12)), quantized(shape=(12, 8))
    assert_near(matmul(x, base), exact(x, base))


@pytest.mark.parametrize("base", [normal(4, (96, 40)), low_rank(7)], ids=["dense", "low rank"])
def test_adapters_on_other_matrices_have_no_kernel(one_gpu, base):
    one_gpu.setattr(nf_gpu_autotune, "fastest", lambda case: pytest.fail("timed"))
    x = normal(3, (2, 96))
    assert_near(matmul(x, LowRankPlusQuantized(base, low_rank())), exact(x, base, low_rank()))


def test_the_default_tile_is_taken_for_a_gpu_that_is_absent(monkeypatch):
    monkeypatch.setattr(nf_gpu_autotune, "fastest", lambda case: pytest.fail("timed"))
    x, kernel = normal(3, (2, 96)), quantized()
    with target.absent_gpus():
        assert "triton" in lowered_for_cuda(lambda x, k: matmul(x, k), x, kernel)
    with target.absent_gpus(2):  # XLA cannot partition the kernel
        assert "triton" not in lowered_for_cuda(lambda x, k: matmul(x, k), x, kernel)


def test_the_fastest_is_chosen_and_must_be_faster_by_a_margin(one_gpu):
    case = nf_gpu_autotune.Case.for_operands(normal(3, (3, 96)), quantized(), None)
    for times, best in (
        ({None: 2.0, ONE: 1.0, FEW: 0.5}, FEW),
        ({None: 1.0, ONE: 0.99}, None),
        ({None: 1.0}, None),
        ({ONE: 1.0}, None),  # XLA's failed: nothing to compare with
    ):
        nf_gpu_autotune.fastest.cache_clear()
        one_gpu.setattr(nf_gpu_autotune, "time_tiles", lambda case, times=times: dict(times))
        assert nf_gpu_autotune.fastest(case) == best


def test_cases_round_rows_up_and_tell_formats_apart():
    x = [normal(3, (rows, 96)) for rows in (3, 4, 5)]
    three, four, five = (nf_gpu_autotune.Case.for_operands(y, quantized(), None) for y in x)
    assert three == four and hash(three) == hash(four) and five.rows == 8
    many = jax.ShapeDtypeStruct((70, 70, 96), "float32")
    assert nf_gpu_autotune.Case.for_operands(many, quantized(), None).rows == nf_gpu_autotune.ROWS
    others = [(quantized(Format(3)), None), (quantized(), low_rank())]
    found = [four, five, *(nf_gpu_autotune.Case.for_operands(x[0], *other) for other in others)]
    assert all(a != b for a, b in itertools.combinations(found, 2))
    base, factors = found[-1].operands(0)
    assert base.shape == (96, 40) and factors.shape == (96, 40)


def test_times_below_a_trace_and_warns_of_what_fails(one_gpu):
    one_gpu.setattr(nf_gpu_autotune, "candidates", lambda rows: [FEW, ONE])
    one_gpu.setattr(nf_gpu_autotune, "COPIES", 2)
    one = nf_gpu_autotune._one

    def failing(tile, interpret, x, operands):
        if tile == ONE:
            raise NotImplementedError("no such tile")
        return one(tile, True, x, operands)

    one_gpu.setattr(nf_gpu_autotune, "_one", failing)
    found = []

    @jax.jit
    def traced(x, base):
        found.append(nf_gpu_autotune.fastest(nf_gpu_autotune.Case.for_operands(x, base, None)))
        return x

    one_gpu.setattr(nf_gpu_autotune, "MARGIN", 1e-9)
    with pytest.warns(UserWarning, match="no such tile"):
        traced(normal(3, (2, 96)), quantized())
    assert found == [FEW]


@pytest.mark.slow
def test_the_script_times_every_way(monkeypatch):
    monkeypatch.setattr(nf_gpu_autotune, "candidates", lambda rows: [FEW])
    host = ["--shapes", "64x16", "--rows", "1", "--dtype", "float32", "--json"]
    rows = json.loads(CliRunner().invoke(main, host, catch_exceptions=False).output)["products"]
    assert [row["product"] for row in rows] == ["dense", "whole", "in tiles"]
    assert all(row["error"] < TOLERANCE["float32"] for row in rows)
    refused = CliRunner().invoke(main, ["--interpret", "--shapes", "big"])
    assert refused.exit_code == 1 and "'big'" in refused.output
    small = ["--interpret", "--shapes", "32x16", "--rows", "3", "--rank", "2", "--json"]
    rows = json.loads(CliRunner().invoke(main, small, catch_exceptions=False).output)["products"]
    assert [row["product"][:4] for row in rows] == ["dens", "XLA", "Tile"]
    assert all(row["error"] < TOLERANCE["bfloat16"] and row["share"] > 0 for row in rows)
    assert rows[0]["bytes"] - rows[1]["bytes"] > 32 * 16  # 2 bytes of a weight against half a one
