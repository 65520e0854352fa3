"""Coordinate descent on codes and scales: the loss falls until no single change is better."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.kernels import normal_float
from lordjax.methods.quantized import coordinate_descent, error_feedback
from lordjax.methods.quantized.coordinate_descent import refine
from lordjax.methods.quantized.lq import decompose
from lordjax.methods.quantized.weightings import Weights

# in, out, format: whole blocks; several blocks a row; padded inputs; blocks across rows.
SHAPES = [
    (64, 24, "nf3"),
    (96, 20, "nf2-8-bfloat16-32-256"),
    (80, 12, "nf3-4-bfloat16-16-64"),
    (70, 13, "nf4"),
]


def problem(fan_in, fan_out, seed=0):
    """Rows of a kernel, and the second moment of inputs that are strongly correlated."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(3 * fan_in, fan_in)) @ random.normal(size=(fan_in, fan_in))
    moment = jnp.asarray(x.T @ x / len(x) / fan_in, jnp.float32)
    return jnp.asarray(random.normal(size=(fan_out, fan_in)), jnp.float32), moment


def weights_of(moment, searches=True):
    return Weights(moment, feedback=error_feedback.make_feedback(moment, searches))


def damped(moment):
    unit = error_feedback.DAMPING * jnp.mean(jnp.diagonal(moment))
    return moment + unit * jnp.eye(len(moment))


def loss(rows, codes, form, moment):
    error = np.asarray(rows - normal_float.dequantize(codes, form).reshape(rows.shape), np.float64)
    return float(np.sum(error @ np.asarray(damped(moment), np.float64) * error))


@pytest.mark.parametrize(("fan_in", "fan_out", "name"), SHAPES)
def test_the_loss_falls(fan_in, fan_out, name):
    form = normal_float.Format.parse(name)
    rows, moment = problem(fan_in, fan_out)
    codes = error_feedback.quantize(rows, form, error_feedback.make_feedback(moment))
    new = jax.jit(functools.partial(refine, form=form))(rows, codes, weights=weights_of(moment))
    assert loss(rows, new, form, moment) < 0.95 * loss(rows, codes, form, moment)
    for before, after in zip(codes, new, strict=True):
        assert before.shape == after.shape and before.dtype == after.dtype
    np.testing.assert_array_equal(codes.supers, new.supers)  # shared by many blocks
    if fan_in % form.block:
        np.testing.assert_array_equal(codes.scales, new.scales)


def test_scales_that_are_not_searched_stay():
    form = normal_float.Format.parse("nf3")
    rows, moment = problem(64, 24)
    weights = weights_of(moment, searches=False)
    codes = error_feedback.quantize(rows, form, weights.feedback)
    new = refine(rows, codes, form, weights)
    np.testing.assert_array_equal(codes.scales, new.scales)
    assert loss(rows, new, form, moment) < loss(rows, codes, form, moment)


def test_where_it_ends_no_single_change_is_better(monkeypatch):
    monkeypatch.setattr(coordinate_descent, "PASSES", 60)
    form = normal_float.Format.parse("nf2-4-bfloat16-16-16")
    rows, moment = problem(32, 3)
    codes = error_feedback.quantize(rows, form, error_feedback.make_feedback(moment))
    new = refine(rows, codes, form, weights_of(moment))
    least = loss(rows, new, form, moment) * (1 - 1e-5)
    for name, count in (("codes", 2**form.bits), ("scales", 2**form.scale_bits)):
        numbers = np.asarray(getattr(new, name))
        for place in range(len(numbers)):
            for value in range(count):
                other = jnp.asarray(numbers).at[place].set(value)
                assert loss(rows, new._replace(**{name: other}), form, moment) >= least


def test_independent_inputs_keep_the_nearest_codes():
    form = normal_float.Format.parse("nf4")
    rows, _ = problem(70, 5)  # blocks cross rows, so scales stay
    codes = normal_float.quantize(rows.reshape(-1), form)
    new = refine(rows, codes, form, weights_of(jnp.eye(70)))
    for before, after in zip(codes, new, strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_low_rank_term_is_taken_off_first():
    """The codes beside a low-rank term are refined for what the term leaves."""
    rows, moment = problem(64, 24)
    form = normal_float.Format.parse("nf2")
    weights = weights_of(moment)
    made = decompose(rows.T, jnp.asarray(4), weights, form=form, width=4, steps=2)
    target = rows - made.right.T @ made.left.T
    error = loss(target, made.codes, form, moment)
    assert float(made.error) == pytest.approx(error, rel=0.1)  # up to damping
    again = refine(target, made.codes, form, weights)
    assert error * 0.9 < loss(target, again, form, moment) <= error


def test_inputs_that_are_never_active_do_no_harm():
    rows, moment = problem(64, 8)
    dead = jnp.arange(64) < 10
    moment = jnp.where(dead[:, None] | dead[None], 0, moment)
    form = normal_float.Format.parse("nf3")
    codes = error_feedback.quantize(rows, form, error_feedback.make_feedback(moment))
    new = refine(rows, codes, form, weights_of(moment))
    assert loss(rows, new, form, moment) <= loss(rows, codes, form, moment)
    assert np.isfinite(normal_float.dequantize(new, form)).all()
