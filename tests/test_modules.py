"""Narrower modules in whole models: nothing padded, saved and loaded, compressed again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax import InMemory, checkpoint, compress, prepare, trees
from lordjax.calibrate import gradient_statistics
from lordjax.factoring import replace_kernels
from lordjax.kernels import LowRank, nbytes
from lordjax.methods import METHODS
from lordjax.models import ModelConfig, Rope, Transformer, init
from lordjax.models.transformer import Block
from lordjax.modules import gather, scatter
from lordjax.plan import Plan
from lordjax.prepared import TEMPERATURES
from lordjax.progress import Clock
from lordjax.source import Calibration

CONFIG = ModelConfig(97, 48, 80, 3, 6, 2, 8, 256, tie_embeddings=True)
BIASED = dataclasses.replace(CONFIG, qkv_bias=True, out_bias=True, mlp_bias=True)
STATIC = dataclasses.replace(BIASED, rope=None)
TOKENS = np.random.default_rng(0).integers(0, 97, (8, 40)).astype(np.int32)
MODULAR = sorted(name for name, method in METHODS.items() if method.modules)


@functools.cache
def model(config):
    tree = init(config, jax.random.key(0))
    return jax.tree.map(lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), tree)


def logits(config, params, tokens=TOKENS):
    return np.asarray(Transformer(config).apply({"params": params}, tokens))


def by_hand(prepared, **widths):
    """A plan of one width per kind of module, the rest as it is."""
    ranks = {path: widths.get(path.rsplit("/", 1)[1]) for path in prepared.sizes}
    return Plan(prepared.method, ranks, 0.5, "by hand")


@pytest.mark.parametrize("config", [CONFIG, BIASED, STATIC], ids=["plain", "biased", "static"])
@pytest.mark.parametrize("method", ["modegpt-published", "modegpt-cr"])
def test_modules_become_narrower_and_work(config, method):
    prepared = prepare(InMemory(config, model(config)), TOKENS, method=method)
    result = prepared.apply(by_hand(prepared, vo=6, mlp=40, qk=4))
    block = trees.flatten(result.params["layer_1"])
    assert block["mlp/up/kernel"].shape == (48, 40)
    assert block["mlp/down/kernel"].shape == (40, 48)
    assert block["attention/v/kernel"].shape == (48, 2 * 6)
    assert block["attention/o/kernel"].shape == (6 * 6, 48)
    assert block["attention/q/kernel"].shape == (48, 6 * 4)
    assert ("attention/rope_index" in block) == (config.rope is not None)
    assert not any(isinstance(leaf, LowRank) for leaf in block.values())
    expected, got = (logits(config, p) for p in (model(config), result.params))
    # Half of an untrained model is missing; unrelated logits would give twice their variance.
    assert 0 < np.mean((got - expected) ** 2) < np.mean(expected**2)


@pytest.mark.parametrize("method", MODULAR)
def test_round_trip_with_rotary_indices(tmp_path, method):
    result = compress(InMemory(CONFIG, model(CONFIG)), TOKENS, method=method, keep=0.6)
    checkpoint.save(tmp_path / "m", CONFIG, result.params, hf_config={}, plan=result.plan)
    config, params = checkpoint.load(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, params, result.params)
    np.testing.assert_array_equal(logits(config, params), logits(CONFIG, result.params))
    assert nbytes(params) == result.report["bytes"]
    index = [a for p, a in trees.flatten(params).items() if p.endswith("rope_index")]
    assert bool(index) == ("qk" in METHODS[method].modules)
    assert all(a.dtype == np.int32 and a.shape[0] == CONFIG.num_kv_heads for a in index)


@pytest.mark.parametrize("config", [BIASED, STATIC], ids=["biased", "static"])
@pytest.mark.parametrize("method", ["modegpt-cr", "modegpt"])
def test_a_compressed_model_is_compressed_again(config, method):
    first = compress(InMemory(config, model(config)), TOKENS, method=method, keep=0.8)
    again = compress(InMemory(config, first.params), TOKENS, method=method, keep=0.8)
    assert again.report["plan"]["kept"] <= 0.8
    assert again.report["bytes"] < first.report["bytes"]
    assert np.isfinite(logits(config, again.params)).all()


def test_a_bias_that_appears_is_charged_to_the_budget():
    """Qwen2: the values have a bias and the output projection none; it is there after."""
    qwen = dataclasses.replace(CONFIG, qkv_bias=True)
    prepared = prepare(InMemory(qwen, model(qwen)), TOKENS, method="modegpt-cr")
    assert prepared.curves()["layer_0/attention/vo"].extra == CONFIG.hidden_size
    params = prepared.apply(by_hand(prepared, vo=4)).params
    assert params["layer_0"]["attention"]["o"]["bias"].shape == (48,)
    assert np.isfinite(logits(qwen, params)).all()


def test_another_dtype_leaves_indices_alone():
    result = compress(
        InMemory(CONFIG, model(CONFIG)), TOKENS, method="modegpt-cr", keep=0.5, dtype=jnp.bfloat16
    )
    dtypes = {p.rsplit("/", 1)[1]: a.dtype for p, a in trees.flatten(result.params).items()}
    assert dtypes["kernel"] == jnp.bfloat16
    assert dtypes["rope_index"] == np.int32


def test_attention_keeps_its_scale():
    """Columns that are zero may go, and nothing changes: the scale is that of the whole head."""
    params = trees.flatten(model(CONFIG)["layer_0"])
    pairs = np.array([[0, 2], [1, 3]], np.int32)
    kernels = gather("qk", params, CONFIG)
    keep = np.zeros((2, 8), bool)
    for group in range(2):
        keep[group, np.concatenate([pairs[group], pairs[group] + 4])] = True
    zeroed = {
        "q": np.asarray(kernels["q"]) * np.repeat(keep, 3, axis=0).astype(np.float32),
        "k": np.asarray(kernels["k"]) * keep.astype(np.float32),
    }
    columns = np.concatenate([pairs, pairs + 4], axis=1)
    cut = {
        "q": np.take_along_axis(np.asarray(kernels["q"]), np.repeat(columns, 3, 0)[None], 2),
        "k": np.take_along_axis(np.asarray(kernels["k"]), columns[None], 2),
        "rope_index": pairs,
    }
    x = jax.random.normal(jax.random.key(1), (2, 12, 48))
    positions = jnp.arange(12)[None]
    outs = [
        Block(CONFIG).apply({"params": trees.unflatten(scatter("qk", new, params))}, x, positions)
        for new in (zeroed, cut)
    ]
    np.testing.assert_allclose(*outs, atol=1e-5)


@pytest.mark.parametrize("config", [BIASED, STATIC], ids=["rotary", "static"])
@pytest.mark.parametrize("method", ["modegpt-cr", "modegpt-published"])
def test_a_widened_module_is_the_same_function(config, method):
    prepared = prepare(InMemory(config, model(config)), TOKENS, method=method)
    plan = by_hand(prepared, qk=4, vo=5, mlp=33)
    narrow = prepared.apply(plan).params
    blocks = {
        f"layer_{i}": replace_kernels(
            model(config)[f"layer_{i}"],
            i,
            prepared.factors,
            plan.ranks,
            method,
            config,
            widened=True,
        )
        for i in range(3)
    }
    wide = {**model(config), **blocks}
    for path, leaf in trees.flatten(model(config)).items():
        assert trees.flatten(wide)[path].shape == leaf.shape
    np.testing.assert_allclose(logits(config, wide), logits(config, narrow), atol=2e-4)


def test_scatter_inverts_gather():
    params = trees.flatten(model(BIASED)["layer_2"])
    for kind in ("qk", "vo", "mlp"):
        back = scatter(kind, gather(kind, params, BIASED), params)
        for path, leaf in params.items():
            np.testing.assert_array_equal(back[path], leaf)


def test_bias_of_the_values_goes_through_attention_as_it_is():
    """Nothing is lost at full width of one direction less than none: exact before truncation."""
    params = model(BIASED)
    prepared = prepare(InMemory(BIASED, params), TOKENS, method="modegpt-published")
    blocks = trees.flatten(params["layer_0"])
    kernels = gather("vo", blocks, BIASED)
    full = (
        METHODS["modegpt-published"]
        .modules["vo"]
        .narrow(jax.tree.map(np.asarray, kernels), prepared.factors["layer_0/attention/vo"], 8)
    )
    new = {**params, "layer_0": trees.unflatten(scatter("vo", full, blocks))}
    expected = logits(BIASED, params)
    np.testing.assert_allclose(logits(BIASED, new), expected, atol=1e-3 * np.abs(expected).max())


def test_gates_are_derivatives_by_the_size_of_pairs():
    """Σ tokens of a gate is the derivative of the loss by a factor on the pair's queries."""
    params, tokens = model(CONFIG), TOKENS[:1]
    stats = gradient_statistics(
        InMemory(CONFIG, params), Calibration(tokens, None, 1), METHODS["modegpt-cr"], Clock()
    )
    gates = stats[1]["gates"]["attention/queries"]

    def loss(factors):  # [tokens, groups, pairs]
        per_query = jnp.repeat(factors, 3, axis=1)
        per_query = jnp.concatenate([per_query, per_query], axis=2)  # both members of a pair

        def scaled(delta):
            variables = {
                "params": params,
                "perturbations": {"layer_1": {"attention": {"queries": delta}}},
            }
            return Transformer(CONFIG).apply(variables, tokens)[0, :-1]

        _, state = Transformer(CONFIG).apply({"params": params}, tokens, mutable=["taps"])
        queries = state["taps"]["layer_1"]["attention"]["queries"]
        out = scaled((per_query[None].reshape(queries.shape) - 1) * queries)
        return -jnp.sum(jax.nn.log_softmax(out)[jnp.arange(39), tokens[0, 1:]])

    derivative = np.asarray(jax.grad(loss)(jnp.ones((40, 2, 4))))
    expected = np.einsum("tgp,tgq->gpq", derivative, derivative) / 40
    np.testing.assert_allclose(gates.second_moment(), expected, rtol=1e-3, atol=1e-9)


def test_block_influence_and_its_temperature():
    prepared = prepare(InMemory(CONFIG, model(CONFIG)), TOKENS, method="modegpt-published")
    assert sorted(prepared.influences) == [0, 1, 2]
    assert all(0 <= s <= 2 for s in prepared.influences.values())
    assert len(prepared.held_out) == 1  # never in the statistics, never from evaluation data
    assert len(prepared.calibration.tokens) == 7
    cold, hot = (prepared.plan(0.6, temperature=t) for t in (1e-3, float("inf")))
    least = min(prepared.influences, key=prepared.influences.get)

    def kept(plan):
        sizes = prepared.sizes.items()
        return sum(size.weights(plan.ranks[p]) for p, size in sizes if f"layer_{least}/" in p)

    assert kept(cold) < kept(hot)
    chosen = prepared.plan(0.6)
    assert chosen.temperature in TEMPERATURES
    assert chosen == prepared.plan(0.6, temperature=chosen.temperature)
    assert "comparison" in prepared.report["seconds"]
    with pytest.raises(ValueError, match="prepared without"):
        prepare(InMemory(CONFIG, model(CONFIG)), TOKENS, method="modegpt").plan(
            0.6, "block-influence"
        )


def test_padded_calibration_needs_a_temperature():
    mask = np.ones(TOKENS.shape, bool)
    mask[:, 30:] = False
    prepared = prepare(
        InMemory(CONFIG, model(CONFIG)), TOKENS, method="modegpt-published", mask=mask
    )
    prepared.plan(0.6, temperature=0.1)
    with pytest.raises(ValueError, match="name a temperature"):
        prepared.plan(0.6)
    with pytest.raises(ValueError, match="one calibration window"):
        prepare(InMemory(CONFIG, model(CONFIG)), TOKENS[:1], method="modegpt-published")


def test_widths_of_rotary_heads_are_even():
    prepared = prepare(InMemory(CONFIG, model(CONFIG)), TOKENS, method="modegpt-cr")
    for keep in (0.9, 0.7, 0.45):
        plan = prepared.plan(keep, tile=1)
        assert all(r is None or r % 2 == 0 for p, r in plan.ranks.items() if p.endswith("qk"))
    with pytest.raises(ValueError, match="no multiple of 2"):
        prepared.apply(by_hand(prepared, qk=5))
    with pytest.raises(ValueError, match=r"not in \[1, 80\)"):
        prepared.apply(by_hand(prepared, mlp=80))


@pytest.mark.parametrize("prefix", ["compressed", "corrective"])
def test_sequential_statistics_help_modules(prefix):
    """Statistics of what the compressed prefix feeds a module do no harm to the final logits."""
    source = InMemory(CONFIG, model(CONFIG))
    expected = logits(CONFIG, model(CONFIG))

    def error(prefix):
        prepared = prepare(source, TOKENS, method="modegpt-cr", prefix=prefix)
        return np.mean(
            (logits(CONFIG, prepared.apply(by_hand(prepared, mlp=32, vo=5)).params) - expected) ** 2
        )

    assert error(prefix) < 1.05 * error("dense")


@pytest.mark.parametrize("prefix", ["compressed", "corrective"])
@pytest.mark.parametrize("config", [BIASED, STATIC], ids=["biased", "static"])
def test_sequential_statistics_on_every_kind_of_head(config, prefix):
    source = InMemory(config, model(config))
    result = compress(source, TOKENS, method="modegpt-cr", keep=0.7, prefix=prefix)
    assert result.report["plan"]["kept"] <= 0.7
    assert np.isfinite(logits(config, result.params)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_sources_give_half_precision_results(dtype):
    half = jax.tree.map(lambda a: a.astype(dtype), model(BIASED))
    result = compress(InMemory(BIASED, half), TOKENS, method="modegpt-cr", keep=0.7)
    for path, leaf in trees.flatten(result.params).items():
        assert leaf.dtype == (np.int32 if path.endswith("rope_index") else dtype), path


def test_padding_changes_nothing_in_modules():
    padded = np.concatenate([TOKENS, np.full((8, 10), 3, np.int32)], axis=1)
    mask = np.ones(padded.shape, bool)
    mask[:, 40:] = False
    source = InMemory(CONFIG, model(CONFIG))
    plain = prepare(source, TOKENS, method="modegpt-cr").factors
    masked = prepare(source, padded, method="modegpt-cr", mask=mask).factors
    for path, factors in plain.items():
        scale = factors.spectrum.sum()
        np.testing.assert_allclose(masked[path].spectrum, factors.spectrum, atol=1e-3 * scale)


def test_decode_order_does_not_matter_to_a_narrow_model():
    """Logits of a prefix do not depend on what follows: the mask is causal at every width."""
    result = compress(InMemory(CONFIG, model(CONFIG)), TOKENS, method="modegpt-cr", keep=0.5)
    whole = logits(CONFIG, result.params)[:, :11]
    np.testing.assert_allclose(logits(CONFIG, result.params, TOKENS[:, :11]), whole, atol=1e-4)
    assert Rope() == CONFIG.rope
