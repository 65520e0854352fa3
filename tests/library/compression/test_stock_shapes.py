"""Stock shapes: the result is a smaller model of the same class, and what the plan says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BLOCKS, SMALL, random_model

import lordjax
from lordjax.allocation.measured_errors import BLOCK
from lordjax.compression.low_rank import default_multiple
from lordjax.compression.site_factors import replace_kernels
from lordjax.conversions import resized
from lordjax.conversions.families.config.resize import can_describe
from lordjax.conversions.families.registry import FAMILIES, model_config
from lordjax.kernels import trees
from lordjax.models import Transformer
from lordjax.models.stock import blocks_are_alike, reshaped

TOKENS = np.random.default_rng(0).integers(0, 61, (8, 24)).astype(np.int32)
MULTIPLE = 8


@pytest.fixture(scope="module")
def prepared():
    model = random_model(SMALL)
    return lordjax.prepare(model, TOKENS, method="modegpt-stock", multiple=MULTIPLE)


def padded(prepared, plan):
    """The logits of the planned model in the original shapes: a block that is gone adds nothing."""
    config, params = prepared.source.config, dict(prepared.source.non_block_params())
    gone = 0
    for i in range(config.num_layers):
        block = prepared.source.block(i)
        if plan.ranks[f"layer_{i}/mlp"] == 0:
            gone += 1
            continue
        args = block, i, prepared.factors, plan.ranks, plan.method, config
        params[f"layer_{i - gone}"] = replace_kernels(*args, padded=True)
    config = dataclasses.replace(config, num_layers=config.num_layers - gone)
    return Transformer(config).apply({"params": params}, TOKENS[:2])


@pytest.mark.full
@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_the_result_is_a_plain_model_of_the_config(prepared, keep):
    result = prepared.compress(keep)
    config, old = result.config, prepared.source.config
    shapes = jax.eval_shape(lambda: lordjax.models.init(config, jax.random.key(0)))
    assert jax.tree.map(lambda a: a.shape, result.params) == jax.tree.map(lambda a: a.shape, shapes)
    assert config.mlp_size % MULTIPLE == 0 and config.head_size == old.head_size
    assert config.num_heads * old.num_kv_heads == config.num_kv_heads * old.num_heads
    assert result.report["plan"]["kept"] <= keep
    logits = Transformer(config).apply({"params": result.params}, TOKENS[:2])
    np.testing.assert_allclose(logits, padded(prepared, result.plan), atol=2e-4)
    assert result.plan.predicted["held_out"] > 0


@pytest.mark.full
def test_heads_widths_and_blocks_as_given(prepared):
    ranks = {p: 40 if p.endswith("mlp") else 1 for p in prepared.sizes}
    ranks |= {p: 0 for p in ranks if p.startswith("layer_1/")}
    plan = dataclasses.replace(prepared.plan(0.8), ranks=ranks)
    result = prepared.apply(plan)
    config = result.config
    assert (config.mlp_size, config.num_heads, config.num_kv_heads) == (40, 3, 1)
    assert config.num_layers == SMALL.num_layers - 1
    logits = Transformer(config).apply({"params": result.params}, TOKENS[:2])
    np.testing.assert_allclose(logits, padded(prepared, plan), atol=2e-4)
    uneven = dataclasses.replace(plan, ranks=ranks | {"layer_0/mlp": 48})
    with pytest.raises(ValueError, match="no stock shape: mlp differs between blocks"):
        prepared.apply(uneven)
    half = dataclasses.replace(plan, ranks=ranks | {"layer_1/mlp": 40})
    with pytest.raises(ValueError, match="no stock shape: attention differs between blocks"):
        prepared.apply(half)


@pytest.mark.full
def test_the_removal_of_blocks_is_measured(prepared):
    rows = [row for row in prepared.checked if row["group"] == BLOCK]
    assert len(rows) == 1 and set(rows[0]["ranks"].values()) == {0}
    own = rows[0]["layer"]
    curves = prepared.curves()
    for path, curve in curves.items():
        known = path.startswith(f"layer_{own}/")
        loss = max(rows[0]["measured"], rows[0]["predicted"])  # few tokens may say too little
        assert curve.removal == (loss / 2 if known else np.inf)
    # The measured loss is that of the model without the block.
    config = dataclasses.replace(SMALL, num_layers=2)
    left = [i for i in range(3) if i != own]
    params = dict(prepared.source.non_block_params())
    params |= {f"layer_{k}": prepared.source.block(i) for k, i in enumerate(left)}
    losses = []
    for model in (
        random_model(SMALL),
        lordjax.InMemory(config, params),
    ):
        logits = Transformer(model.config).apply({"params": model.params}, prepared.held_out)
        logs = jax.nn.log_softmax(logits[:, :-1])
        at = jnp.asarray(prepared.held_out)[:, 1:, None]
        losses.append(-np.asarray(jnp.take_along_axis(logs, at, axis=-1)).reshape(-1))
    difference = losses[1] - losses[0]
    square = (difference**2).mean()
    significant = difference.mean() > 4 * np.sqrt(square / len(difference))
    expected = difference.mean() if significant else square / 2
    assert rows[0]["measured"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("name", BLOCKS)
def test_every_kind_of_block(name):
    config = dataclasses.replace(BLOCKS[name], num_layers=3)
    if config.windows is not None:
        config = dataclasses.replace(config, windows=(*config.windows, config.windows[0]))
    model = random_model(config)
    tokens = TOKENS % config.vocab_size
    given = {} if config.head != "masked" else {"mask_token": 3}
    result = lordjax.compress(
        model, tokens, method="modegpt", shape="stock", keep=0.75, multiple=4, **given
    )
    new = result.config
    shapes = jax.eval_shape(lambda: lordjax.models.init(new, jax.random.key(0)))
    kept = {path: leaf.shape for path, leaf in trees.flatten(result.params).items()}
    assert kept == {path: leaf.shape for path, leaf in trees.flatten(shapes).items()}
    if not blocks_are_alike(config):
        assert new.num_layers == config.num_layers
    if config.wide_qk_norm or config.num_kv_heads == 1:
        assert new.num_kv_heads == config.num_kv_heads


@pytest.mark.full
def test_errors_before_any_work():
    model = random_model(SMALL)

    def error(match, **options):
        with pytest.raises(ValueError, match=match):
            lordjax.compress(model, TOKENS, shape="stock", **options)

    error("method 'svd' has no stock shapes; expected modegpt", method="svd")
    error("multiple 64: MLPs have width 80, .* a multiple of at most 20", multiple=64)
    error("stock shapes need allocation 'stock', got 'uniform'", multiple=8, allocation="uniform")
    error("stock shapes need prefix 'dense'", multiple=8, prefix="compressed")
    with pytest.raises(ValueError, match="shape must be one of free, stock, per-layer, got 'round"):
        lordjax.compress(model, TOKENS, shape="round")
    pruned = lordjax.compress(model, TOKENS, method="modegpt-random", ranks={"mlp": 40})
    model = lordjax.InMemory(SMALL, pruned.params)
    error("other widths than its config says, because it was compressed before", multiple=8)


@pytest.mark.full
def test_a_width_for_each_block():
    """Multiples, within the budget, where attention and the config stay as they are."""
    model = random_model(SMALL)
    prepared = lordjax.prepare(model, TOKENS, method="modegpt-per-layer", multiple=8)
    result = prepared.compress(0.8)
    assert result.config == SMALL and result.plan.policy == "global"
    widths = [result.plan.ranks[f"layer_{i}/mlp"] for i in range(SMALL.num_layers)]
    assert all(width is None or width % 8 == 0 for width in widths) and len(set(widths)) > 1
    assert result.report["plan"]["kept"] <= 0.8
    old, new = trees.flatten(dict(model.params)), trees.flatten(result.params)
    for path, leaf in old.items():
        if "/mlp/" not in path:
            np.testing.assert_array_equal(new[path], leaf)
    found = lordjax.compress(model, TOKENS, shape="per-layer", multiple=8, keep=0.8)
    assert found.plan.ranks == result.plan.ranks
    wide = lordjax.compress(model, TOKENS, shape="per-layer", ranks={"layer_1/mlp": 24})
    assert wide.params["layer_1"]["mlp"]["down"]["kernel"].shape[0] == 24
    with pytest.raises(ValueError, match="per-layer shapes need allocation 'global', got 'unif"):
        lordjax.compress(model, TOKENS, shape="per-layer", multiple=8, allocation="uniform")
    with pytest.raises(ValueError, match="multiple 256: MLPs have width 80, and per-layer shapes"):
        lordjax.compress(model, TOKENS, shape="per-layer", multiple=256)


def test_default_multiples():
    """Narrow MLPs have finer stock widths; per-layer widths are those of the engines."""
    widths = {16384: (64, 256), 4096: (64, 256), 1536: (32, 256), 96: (16, 16), 3: (1, 1)}
    for width, expected in widths.items():
        methods = ("modegpt-stock", "modegpt-per-layer")
        assert tuple(default_multiple(method, width) for method in methods) == expected


def test_reshaped_configs():
    config = dataclasses.replace(BLOCKS["starcoder2"], num_layers=3, windows=(None, 9, 7))
    ranks = {f"layer_{i}/{name}": None for i in range(3) for name in ("mlp", "attention")}
    assert reshaped(config, ranks) == (config, (0, 1, 2))
    gone = ranks | {"layer_1/mlp": 0, "layer_1/attention": 0}
    new, left = reshaped(config, gone)
    assert left == (0, 2) and new.windows == (None, 7) and new.num_layers == 2
    with pytest.raises(ValueError, match="no block differs"):
        reshaped(config, dict.fromkeys(ranks, 0))


# Families whose configs have no key for the width of a head: the number of heads is tied to it.
TIED = {
    *("starcoder2", "phi3", "phi", "stablelm", "gpt2", "gpt_bigcode", "opt", "codegen"),
    *("gpt_neox", "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "olmo2"),
}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_configs_of_every_family(name):
    """What a config says is read back; what it cannot say is refused."""
    family = FAMILIES[name]
    hf_config = {"model_type": name, "architectures": list(family.architectures[:1])}
    config = model_config(hf_config)
    narrow = dataclasses.replace(config, mlp_size=64)
    assert model_config(resized(hf_config, narrow)) == narrow
    group = config.num_heads // config.num_kv_heads
    fewer = dataclasses.replace(config, num_heads=group, num_kv_heads=1)
    expressible = can_describe(hf_config, fewer)
    assert resized(hf_config, config) == hf_config
    if config.num_kv_heads > 1 and name != "olmo2":
        assert expressible == (name not in TIED)
    if not expressible:
        with pytest.raises(ValueError, match=f"the config of {name} models cannot describe"):
            resized(hf_config, fewer)
