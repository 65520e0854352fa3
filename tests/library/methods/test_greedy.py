"""The inner loop of backward elimination, as a loop and as a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.methods.greedy import removed

SIZE, COUNT = 16, 8


@pytest.fixture(scope="module")
def problem():
    """``C⁻¹``, W, costs that come first, and a column that is gone."""
    draw = np.random.default_rng(0)
    z, w = draw.normal(size=(60, SIZE)), draw.normal(size=(SIZE, 5))
    floor, alive = np.zeros(SIZE), np.ones(SIZE, bool)
    floor[3], floor[5], alive[7] = -1.0, -2.0, False
    return np.linalg.inv(z.T @ z / 60), w, floor, alive


def one_by_one(inverse, w, floor, alive):
    """Removals by the definition: W and C⁻¹ of the columns that are left, after every one."""
    inverse, w, alive, order = inverse.copy(), w.copy(), alive.copy(), []
    for _ in range(COUNT):
        costs = np.where(floor < 0, floor, (w**2).sum(1) / np.diag(inverse))
        at = int(np.argmin(np.where(alive, costs, np.inf)))
        share = inverse[:, at] / inverse[at, at]
        w, inverse = w - np.outer(share, w[at]), inverse - np.outer(share, inverse[at])
        # What is gone has neither energy nor variance.
        inverse[at, at] = 1.0
        alive[at] = False
        order.append(at)
    return order


@pytest.mark.parametrize("interpret", [None, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_columns_are_removed_by_their_costs(problem, dtype, interpret):
    inverse, w, floor, alive = problem
    with jax.enable_x64(dtype == "float64"):
        small = (
            jnp.asarray(inverse, dtype),
            jnp.asarray(w @ w.T, dtype),
            jnp.asarray(floor, dtype),
        )
        places, upper = removed(*small, jnp.asarray(alive), COUNT, interpret=interpret)
    assert places.tolist() == one_by_one(*problem)
    assert places[:2].tolist() == [5, 3] and 7 not in places.tolist()
    upper = np.asarray(upper, np.float64)
    np.testing.assert_array_equal(upper, np.triu(upper))
    own = upper.T @ np.diag(1 / np.diag(upper)) @ upper
    expected = inverse[np.asarray(places)][:, np.asarray(places)]
    np.testing.assert_allclose(own, expected, rtol=1e-4 if dtype == "float32" else 1e-10)


def test_the_first_of_equal_columns_is_removed():
    inverse = products = jnp.eye(4)
    places, _ = removed(inverse, products, jnp.zeros(4), jnp.ones(4, bool), 4)
    assert places.tolist() == [0, 1, 2, 3]
