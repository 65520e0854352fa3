"""Observers: taps record the right activations, and cost nothing if no statistic is collected."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import REFERENCES, assert_close, products, reference

from lordjax.calibration.observers import empty, observe
from lordjax.models import Block, ModelConfig, Transformer, init
from lordjax.models.sites import LINEAR_SITES

CONFIG = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    mlp_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    max_positions=32,
    qkv_bias=True,
)

OUT_WIDTHS = {"q": 16, "k": 8, "v": 8, "o": 16, "gate": 24, "up": 24, "down": 16}

IN_WIDTHS = {"o": 16, "down": 24}

KEYS = {
    f"{site.input_tap}:{kind}": IN_WIDTHS.get(site.layer.split("/")[1], 16)
    for site in LINEAR_SITES
    for kind in REFERENCES
} | {f"{s.output_tap}:moments": OUT_WIDTHS[s.layer.split("/")[1]] for s in LINEAR_SITES}

INPUTS = {f"{site.input_tap}:{kind}" for site in LINEAR_SITES for kind in REFERENCES}


@functools.cache
def model():
    return init(CONFIG, jax.random.key(0))


def states(batch, length):
    x = np.random.default_rng(8).normal(size=(batch, length, CONFIG.hidden_size))
    return x.astype(np.float32)


def observed(x, mask=None, size=None, keys=INPUTS):
    stats, outputs = empty({key: KEYS[key] for key in keys}), []
    for i in range(0, len(x), size or len(x)):
        rows = slice(i, i + (size or len(x)))
        y, stats = observe(
            model()["layer_0"],
            jnp.asarray(x[rows]),
            None if mask is None else jnp.asarray(mask[rows]),
            stats,
            config=CONFIG,
            sliding_window=None,
        )
        outputs.append(np.asarray(y))
    return np.concatenate(outputs), stats


@pytest.mark.quick("True")
@pytest.mark.parametrize("padded", [False, True])
def test_statistics_of_a_model_do_not_depend_on_the_batch_size(padded):
    x = states(6, 9)
    mask = np.arange(9)[None] < np.array([9, 3, 7, 1, 9, 5])[:, None] if padded else None
    _, expected = observed(x, mask)
    tokens = 6 * 9 if mask is None else mask.sum()
    assert all(float(stat.count) == tokens for stat in expected.values())
    for size in (1, 4):
        _, stats = observed(x, mask, size)
        assert stats.keys() == expected.keys()
        for key in stats:
            assert_close(stats[key], expected[key], 1e-6)


def test_taps_are_where_they_say():
    x = states(2, 5)
    block = model()["layer_0"]
    _, stats = observed(x, keys=KEYS)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
    normed = normed * np.asarray(block["attention_norm"]["scale"])
    rows = normed.reshape(-1, 16)
    assert_close(stats["attention/attention_in:moments"], reference(rows), 1e-5)
    # The output is tapped before the bias is added.
    out = rows @ np.asarray(block["attention"]["q"]["kernel"])
    assert_close(stats["attention/q/out:moments"], reference(out), 1e-5)
    for site in LINEAR_SITES:  # E[yyᵀ] = Kᵀ E[xxᵀ] K at every layer
        keys = site.path.split("/")
        kernel = np.asarray(functools.reduce(lambda tree, key: tree[key], keys, block))
        inputs = np.asarray(stats[f"{site.input_tap}:moments"].second_moment())
        outputs = stats[f"{site.output_tap}:moments"].second_moment()
        np.testing.assert_allclose(outputs, kernel.T @ inputs @ kernel, rtol=1e-3, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gives_the_moments_of_the_unpadded_tokens(side):
    lengths, longest = (5, 8, 3), 8
    short = [states(1, 8)[:, :n] + i for i, n in enumerate(lengths)]
    expected = empty({key: KEYS[key] for key in INPUTS})
    outputs = []
    for x in short:
        y, expected = observe(
            model()["layer_0"], jnp.asarray(x), None, expected, config=CONFIG, sliding_window=None
        )
        outputs.append(np.asarray(y)[0])
    padded = np.full((3, longest, CONFIG.hidden_size), 37.0, np.float32)
    mask = np.zeros((3, longest), bool)
    for i, (x, n) in enumerate(zip(short, lengths, strict=True)):
        place = slice(longest - n, None) if side == "left" else slice(0, n)
        padded[i, place], mask[i, place] = x[0], True
    y, stats = observed(padded, mask)
    for i, output in enumerate(outputs):
        np.testing.assert_allclose(y[i][mask[i]], output, rtol=0, atol=1e-5)
    for key in stats:
        assert float(stats[key].count) == sum(lengths)
        assert_close(stats[key], expected[key], 1e-5)


def test_a_block_without_statistics_only_runs():
    x = states(2, 5)
    y, stats = observed(x, keys=())
    assert stats == {}
    np.testing.assert_allclose(y, observed(x)[0], atol=1e-6)


def test_taps_cost_nothing_when_nothing_is_collected(monkeypatch):
    tokens = jnp.zeros((1, 4), jnp.int32)
    x, positions = jnp.asarray(states(1, 4)), jnp.arange(4, dtype=jnp.int32)[None]

    def traces():
        return (
            str(
                jax.make_jaxpr(lambda p: Transformer(CONFIG).apply({"params": p}, tokens))(model())
            ),
            str(
                jax.make_jaxpr(lambda p: Block(CONFIG).apply({"params": p}, x, positions))(
                    model()["layer_0"]
                )
            ),
        )

    with_taps = traces()
    for module in ("layers", "attention", "blocks"):
        monkeypatch.setattr(f"lordjax.models.{module}.tap", lambda module, name, x: x)
    assert traces() == with_taps


def test_collecting_adds_no_product_but_the_grams():
    x = jnp.asarray(states(1, 4))

    def count(keys):
        jaxpr = jax.make_jaxpr(
            lambda block, stats: observe(block, x, None, stats, config=CONFIG, sliding_window=None)
        )(model()["layer_0"], empty(keys))
        return len(list(products(jaxpr.jaxpr)))

    moments = {key: width for key, width in KEYS.items() if key.endswith(":moments")}
    one = {"mlp/mlp_in:moments": 16}
    plain = count({})
    assert plain == len(LINEAR_SITES) + 2  # and the two of attention
    grams = count(one) - plain
    assert 1 <= grams <= 2  # the Gram, and at most one outer product of the merge
    assert count(moments) - plain == grams * len(moments)
