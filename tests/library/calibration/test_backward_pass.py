"""Gradient statistics equal those of `jax.grad`: squared, weighted, and with padding."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import SMALL, shifted

from lordjax.calibration.backward_pass import gradient_statistics
from lordjax.calibration.calibration_set import Calibration
from lordjax.compression.low_rank import InMemory
from lordjax.kernels import trees
from lordjax.methods import METHODS
from lordjax.methods.linalg import row_space
from lordjax.models import Transformer
from lordjax.models.sites import LINEAR_SITES, site_path
from lordjax.runtime.progress import Clock

CONFIG = SMALL

TOKENS = np.random.default_rng(0).integers(0, 97, (6, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return shifted(CONFIG)


@pytest.fixture(scope="module")
def source(params):
    return InMemory(CONFIG, params)


def of_one_fold(found):
    """Returns layer -> statistics of a calibration set that is not split."""
    return {i: stats for i, (stats,) in found.items()}


@pytest.mark.full
def test_gradients_are_those_of_the_loss(source, params):
    """The sum of xᵀg over tokens at a linear output is the gradient of the loss by its kernel."""

    def loss(params):
        out = Transformer(CONFIG).apply({"params": params}, TOKENS[:1])[0, :-1]
        return -jnp.sum(jax.nn.log_softmax(out)[jnp.arange(39), TOKENS[0, 1:]])

    expected = jax.grad(loss)(params)
    both = dataclasses.replace(METHODS["svd"], needs=("row_fisher", "gradients"))
    given = source, Calibration(TOKENS[:1], None, 1), both, Clock()
    stats = of_one_fold(gradient_statistics(*given))
    for i in range(CONFIG.num_layers):
        flat = trees.flatten(expected[f"layer_{i}"])
        for site in LINEAR_SITES:
            # One sequence: the row Fisher is the squared weight gradient summed over outputs.
            rows = jnp.sum(flat[site.path] ** 2, axis=1)
            np.testing.assert_allclose(
                stats[i]["row_fisher"][site.path], rows, rtol=1e-3, atol=1e-6
            )


@pytest.mark.full
def test_gradient_coordinates_keep_the_metric(source, params):
    """Gradients are stored in the row space of a widening kernel, which keeps K M Kᵀ."""
    given = source, Calibration(TOKENS, None, 3), METHODS["lord"], Clock()
    stats = of_one_fold(gradient_statistics(*given))
    path = "mlp/up/kernel"
    kernel = params["layer_1"]["mlp"]["up"]["kernel"]
    narrow = kernel @ row_space(kernel)
    small = narrow @ stats[1]["gradients"][path].second_moment() @ narrow.T
    # The gradient at the layer's input through this kernel alone is g Kᵀ.
    taps = []
    for window in TOKENS:
        taps.append(_output_gradient(params, window, "layer_1/mlp/up/out") @ kernel.T)
    rows = jnp.concatenate(taps)
    np.testing.assert_allclose(small, rows.T @ rows / len(rows), rtol=2e-3, atol=1e-4)


def _output_gradient(params, window, tap):
    def loss(delta):
        variables = {"params": params, "perturbations": trees.unflatten({tap: delta})}
        out = Transformer(CONFIG).apply(variables, window[None])[0, :-1]
        return -jnp.sum(jax.nn.log_softmax(out)[jnp.arange(len(window) - 1), window[1:]])

    return jax.grad(loss)(jnp.zeros((1, len(window), CONFIG.mlp_size)))[0]


GRADIENTS = ("fisher", "weighted_inputs", "weighted_squares")


def gradient_sums(source, tokens, mask=None, batch_size=2):
    method = dataclasses.replace(METHODS["svd"], needs=GRADIENTS)
    given = source, Calibration(tokens, mask, batch_size), method, Clock()
    return of_one_fold(gradient_statistics(*given))


@pytest.fixture(scope="module")
def references(params):
    """For two sequences, by site: the layer's inputs, and the loss gradient at its output."""
    paths = [(i, site) for i in range(CONFIG.num_layers) for site in LINEAR_SITES]
    widths = {site_path(i, s): trees.flatten(params)[site_path(i, s)].shape[1] for i, s in paths}
    zero = {
        f"layer_{i}/{s.output_tap}": jnp.zeros((1, 40, widths[site_path(i, s)])) for i, s in paths
    }

    @jax.jit
    def run(window):
        def loss(delta):
            variables = {"params": params, "perturbations": trees.unflatten(delta)}
            out, state = Transformer(CONFIG).apply(variables, window[None], mutable=["taps"])
            chosen = jax.nn.log_softmax(out[0, :-1])[jnp.arange(39), window[1:]]
            return -jnp.sum(chosen), trees.flatten(state["taps"])

        return jax.grad(loss, has_aux=True)(zero)

    found = [run(window) for window in TOKENS[:2]]
    return {
        site_path(i, s): [
            tuple(
                np.asarray(a, np.float64)[0]
                for a in (taps[f"layer_{i}/{s.input_tap}"], grads[f"layer_{i}/{s.output_tap}"])
            )
            for grads, taps in found
        ]
        for i, s in paths
    }


def assert_gradient_sums(stats, references):
    """Compares: Fisher is squared per sequence, then summed; the others are summed by token."""
    for path, windows in references.items():
        layer, inside = path.split("/", 1)
        own = stats[int(layer[6:])]
        fisher = sum((x.T @ g) ** 2 for x, g in windows)
        x, g = (np.concatenate([pair[k] for pair in windows]) for k in range(2))
        x_energy, g_energy = (np.sum(a**2, axis=1) for a in (x, g))
        expected = [
            (own["fisher"][inside], fisher),
            (own["weighted_inputs"][inside].total, (x * g_energy[:, None]).T @ x),
            (own["weighted_inputs"][inside].count, g_energy.sum()),
            (own["weighted_squares"][inside].total, x_energy @ g**2),
            (own["weighted_squares"][inside].count, x_energy.sum()),
        ]
        for have, want in expected:
            np.testing.assert_allclose(have, want, rtol=2e-3, atol=1e-4 * np.max(want))
        together = sum(x.T @ g for x, g in windows) ** 2
        assert not np.allclose(own["fisher"][inside], together, rtol=0.1)


@pytest.mark.full
@pytest.mark.parametrize("batch_size", [1, 2])
def test_squared_and_weighted_gradients(source, references, batch_size):
    assert_gradient_sums(gradient_sums(source, TOKENS[:2], batch_size=batch_size), references)


@pytest.mark.full
def test_padding_adds_nothing_to_squared_and_weighted_gradients(source, references):
    garbage = np.full((2, 10), 3, np.int32)
    mask = np.repeat([[True, False]], 2, axis=0).repeat([40, 10], axis=1)
    tokens = np.concatenate([TOKENS[:2], garbage], axis=1)
    assert_gradient_sums(gradient_sums(source, tokens, mask), references)


@pytest.mark.full
def test_fisher_is_that_of_weight_gradients(source, params):
    """Fisher equals squared gradients of the whole model, by sequence; two halves add up."""

    @jax.jit
    def squares(window):
        def loss(params):
            out = Transformer(CONFIG).apply({"params": params}, window[None])[0, :-1]
            return -jnp.sum(jax.nn.log_softmax(out)[jnp.arange(39), window[1:]])

        return jax.tree.map(lambda g: g**2, jax.grad(loss)(params))

    each = [trees.flatten(squares(window)) for window in TOKENS[:2]]
    stats = gradient_sums(source, TOKENS[:2], batch_size=2)
    halves = [gradient_sums(source, TOKENS[k : k + 1], batch_size=1) for k in range(2)]
    for i, site in itertools.product(range(CONFIG.num_layers), LINEAR_SITES):
        have = stats[i]["fisher"][site.path]
        want = sum(squared[site_path(i, site)] for squared in each)
        np.testing.assert_allclose(have, want, rtol=2e-3, atol=1e-4 * float(want.max()))
        added = sum(half[i]["fisher"][site.path] for half in halves)
        np.testing.assert_allclose(added, have, rtol=1e-4, atol=1e-5 * float(want.max()))
        assert np.min(have) >= 0
