"""Tables are read row by row, as they would be if all of them were decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.kernels.base import materialize, matmul, nbytes
from lordjax.kernels.kinds import astype, check, weights
from lordjax.kernels.normal_float import Format
from lordjax.kernels.quantized import NFQuantized
from lordjax.kernels.table import parse, quantized_table, scores, smaller_table, take_rows

ROWS, COLUMNS = 61, 20  # no block divides a row
TABLE = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
IDS = np.array([[0, ROWS - 1, 7], [7, 7, 1]], np.int32)
X = np.random.default_rng(1).normal(size=(3, COLUMNS)).astype(np.float32)
FORMATS = ("nf2-2-float16-16-16", "nf3-3-bfloat16-32-4", "nf4", "nf8-4-bfloat16-16-16")
encode = jax.jit(NFQuantized.encode, static_argnums=1)


def coded(form, dtype="float32"):
    return quantized_table(encode(TABLE.T, Format.parse(form)), dtype)


@pytest.mark.quick("nf3-3-bfloat16-32-4")
@pytest.mark.parametrize("form", FORMATS)
def test_rows_are_those_of_the_decoded_table(form):
    """Bit for bit, so that a gather is not another model than the whole table."""
    table = coded(form)
    check(table, "table")
    assert (table.shape, weights(table)) == ((ROWS, COLUMNS), ROWS * COLUMNS)
    assert nbytes(table) == Format.parse(form).nbytes(ROWS * COLUMNS)
    whole = np.asarray(materialize(table))
    np.testing.assert_array_equal(jax.jit(take_rows)(table, IDS), whole[IDS])
    np.testing.assert_allclose(scores(X, table), X @ whole.T, atol=1e-5)


def test_the_dtype_of_rows_is_not_that_of_the_codes():
    half = coded("nf4", "bfloat16")
    assert take_rows(half, IDS).dtype == jnp.bfloat16
    assert take_rows(astype(half, jnp.float32), IDS).dtype == jnp.float32
    small = smaller_table(jnp.asarray(TABLE), "float16")
    assert nbytes(small) == TABLE.size * 2
    assert take_rows(small, IDS).dtype == jnp.float32
    np.testing.assert_array_equal(take_rows(small, IDS), TABLE.astype(np.float16)[IDS])
    assert scores(X, small).dtype == jnp.float32


def test_a_row_that_is_not_there_is_nan():
    for table in (jnp.asarray(TABLE), coded("nf4")):
        found = np.asarray(take_rows(table, np.array([ROWS, 0])))
        assert np.isnan(found[0]).all()
        assert np.isfinite(found[1]).all()


def test_the_head_multiplies_with_the_same_codes():
    table = coded("nf4")
    np.testing.assert_array_equal(scores(X, table), matmul(X, table.kernel))
    gradient = jax.grad(lambda x: jnp.sum(scores(x, table)))(X)
    whole = np.asarray(materialize(table)).sum(0)
    np.testing.assert_allclose(gradient, np.broadcast_to(whole, X.shape), atol=1e-4)


def test_formats_of_tables_have_names():
    assert parse("float16") == "float16"
    assert parse("nf4") == Format(4)
    with pytest.raises(ValueError, match=r"'int8' is no format; .* or a dtype: bfloat16, float16"):
        parse("int8")
