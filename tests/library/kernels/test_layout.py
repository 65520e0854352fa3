"""Layouts: a parameter's axes as a stack of matrices, and back."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lordjax.kernels.kinds import check
from lordjax.kernels.layout import (
    Layout,
    Rearranged,
    canonical,
    dimensions,
    length,
    merged,
    rearranged,
    reshaped,
)
from lordjax.kernels.pruned import Pruned


def test_axes_of_a_row_major_array():
    assert dimensions((2, 1, 3)) == (((2, 3),), (), ((3, 1),))
    assert merged([(2, 12), (3, 4), (4, 1)]) == ((24, 1),)
    assert merged([(3, 1), (2, 3)]) == ((3, 1), (2, 3))
    assert canonical([((3, 1),), ((2, 3),)]) == ((6, 1),)


def test_reshapes_split_and_merge_axes():
    dims = dimensions((4, 6))
    assert reshaped(dims, (2, 2, 6)) == (((2, 12),), ((2, 6),), ((6, 1),))
    assert reshaped(dims, (24,)) == (((24, 1),),)
    assert reshaped(dimensions((6,)), (2, 3)) == (((2, 3),), ((3, 1),))
    assert reshaped((((4, 1),), ((6, 4),)), (3, 8)) is None  # cuts an axis of a transpose unevenly


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(4)), st.integers(1, 3), st.integers(0, 1))
def test_arrays_are_rearranged_as_by_their_elements(order, cut, start):
    shape = (2, 3, 4, 5)
    array = np.arange(120).reshape(shape)
    dims = dimensions(shape)
    new = tuple(dims[i] for i in order)
    groups = (tuple(a for axes in new[:cut] for a in axes), tuple(a for x in new[cut:] for a in x))
    wanted = array.transpose(order).reshape(tuple(map(length, groups)))
    lead = (7,) * start
    given_array = np.broadcast_to(array, (*lead, *shape))
    found = rearranged(given_array, dims, groups, start)
    np.testing.assert_array_equal(found, np.broadcast_to(wanted, (*lead, *wanted.shape)))
    np.testing.assert_array_equal(rearranged(found, groups, dims, start), given_array)


@pytest.mark.parametrize("lead", [(), (3,)], ids=str)
def test_parameters_come_back_from_their_matrices(lead):
    layout = Layout.of((4, 2, 5, 3), ((2, 15),), ((5, 3),), ((4, 30), (3, 1)))
    leaf = np.random.default_rng(0).normal(size=(*lead, 4, 2, 5, 3))
    matrix = layout.to_matrix(leaf)
    assert matrix.shape == (*lead, 2, 5, 12)
    np.testing.assert_array_equal(matrix[..., 1, 4, 3 * 2 + 1], leaf[..., 2, 1, 4, 1])
    np.testing.assert_array_equal(layout.to_leaf(matrix), leaf)
    assert (
        Layout.parse(
            {"shape": [4, 2, 5, 3], "stack": [[2, 15]], "rows": [[5, 3]], "cols": [[4, 30], [3, 1]]}
        )
        == layout
    )


def test_leading_stacks_are_left_out():
    layout = Layout.of((7, 4, 5), ((7, 20),), ((4, 5),), ((5, 1),))
    assert layout.shape == (4, 5) and layout.plain
    assert not Layout.of((5, 4), (), ((4, 1),), ((5, 4),)).plain


def test_parts_that_do_not_fit_are_named():
    layout = Layout((4, 5), (), ((5, 1),), ((4, 5),))
    with pytest.raises(ValueError, match=r"a/b: has shape \(4, 5\); expected \(5, 4\)"):
        check(Rearranged(jnp.ones((4, 5)), layout), "a/b")
    with pytest.raises(ValueError, match="does not fill a parameter of shape"):
        check(Rearranged(jnp.ones((5, 4)), Layout((4, 6), (), ((5, 1),), ((4, 5),))), "a/b")
    with pytest.raises(ValueError, match="expected a matrix with 1 to 3 neurons"):
        check(Pruned(jnp.ones((4, 5)), False, 3), "a/b")
