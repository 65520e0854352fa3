"""Embeddings and heads as codes: used as they are stored, and chosen for the bytes of a file."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BLOCKS, shifted

from lordjax.allocation.plan import Plan
from lordjax.calibration.calibration_set import Calibration
from lordjax.compression.low_rank import compress
from lordjax.compression.quantized import prepare_quantized
from lordjax.compression.whole_file.tables import Tables
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import materialize, nbytes
from lordjax.kernels.layout import Rearranged
from lordjax.kernels.quantized import NFQuantized
from lordjax.models import ModelConfig, Transformer
from lordjax.models.source import InMemory
from lordjax.models.tables import EMBED, HEAD, POSITIONS, table_paths
from lordjax.storage import checkpoint, saved_model
from lordjax.storage.store import MemoryStore

CONFIG = ModelConfig(97, 64, 64, 2, 4, 4, 16, 128, tie_embeddings=True)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
TOKENS = np.random.default_rng(0).integers(0, 97, (4, 24)).astype(np.int32)
FORMATS = tuple(
    normal_float.Format(bits, 4, "bfloat16", block, 256)
    for bits, block in ((2, 16), (3, 32), (4, 64))
)
HF = {"model_type": "llama"}
SMALL = {"formats": FORMATS, "steps": 2}


@functools.cache
def source(config=CONFIG):
    return InMemory(config, shifted(config))


@functools.cache
def prepared(config=CONFIG, weighting="both", embeddings=None, method="nf"):
    given = {"method": method, "weighting": weighting, "embeddings": embeddings}
    return prepare_quantized(source(config), TOKENS, **given, **SMALL)


def file_bytes(directory):
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


@pytest.mark.quick("untied")
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_a_model_with_coded_tables_is_its_decoded_model(config, tmp_path):
    made = prepared(config, "none", "nf4").compress(bits=4.2)
    flat = trees.flatten(made.params)
    assert isinstance(flat[EMBED], Rearranged)
    assert isinstance(flat[EMBED].kernel, NFQuantized)
    assert (HEAD in flat) == (not config.tie_embeddings)
    assert all(made.plan.tables[path] == "nf4" for path in table_paths(config))
    dense = materialize(made.params)
    ours, theirs = (Transformer(config).apply({"params": p}, TOKENS) for p in (made.params, dense))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    checkpoint.save(tmp_path / "small", config, made.params, hf_config=HF, plan=made.plan)
    saved = saved_model.open_saved(tmp_path / "small")
    again = trees.flatten(saved.params())
    assert isinstance(again[EMBED], Rearranged)
    assert nbytes(saved.params()) == nbytes(made.params)
    for ours, theirs in zip(*map(jax.tree.leaves, (again, flat)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert saved.plan() == made.plan


@pytest.mark.full
@pytest.mark.parametrize("form", ["float16", "bfloat16"])
def test_a_smaller_dtype_of_the_table_is_not_that_of_the_activations(form):
    result = prepared(CONFIG, "none", form).compress(bits=4.2)
    table = result.params["embed"]["embedding"]
    assert table.dtype == jnp.float32
    assert nbytes(table) == 97 * 64 * 2
    hidden = Transformer(CONFIG).apply({"params": result.params}, TOKENS, method="embed_tokens")
    assert hidden.dtype == jnp.float32


@functools.cache
def calm(config):
    """A model whose predictions are nearly uniform, as random tokens are."""
    params = source(config).params
    return InMemory(config, {**params, "embed": {"embedding": params["embed"]["embedding"] / 5}})


def statistics(model, tokens):
    tables = Tables(model, Calibration(tokens, None, 2), None, MemoryStore(), {})
    return tables, tables.statistics


def log_chances(config, params, tokens):
    logits = Transformer(config).apply({"params": params}, tokens)
    return np.asarray(jax.nn.log_softmax(logits)[:, :-1], np.float64)


@pytest.mark.quick("out")
@pytest.mark.parametrize(
    ("config", "path"),
    [(CONFIG, EMBED), (UNTIED, EMBED), (UNTIED, HEAD)],
    ids=["tied", "in", "out"],
)
def test_predicted_errors_are_measured_changes_of_the_loss(config, path):
    """Half of the weighted error per position is the divergence from the original model."""
    tokens, model = (
        np.random.default_rng(1).integers(0, 97, (16, 24)).astype(np.int32),
        calm(config),
    )
    tables, stats = statistics(model, tokens)
    kernel, weights = tables.matrix(path)
    before, found = log_chances(config, model.params, tokens), []
    for seed in range(3):
        noise = 0.1 * jnp.std(kernel) * jax.random.normal(jax.random.key(seed), kernel.shape)
        new = kernel + noise
        changed = {path: new if path == HEAD else new.T}
        after = log_chances(config, trees.update(model.params, changed), tokens)
        measured = np.mean(np.sum(np.exp(before) * (before - after), axis=-1))
        count = float(stats[path]["weighted_inputs"].count)
        found.append(float(weights.weighted_error(noise)) / (2 * count) / measured)
    assert 0.6 < np.mean(found) < 1.7


def test_rows_that_are_never_seen_have_a_weight():
    tokens = np.random.default_rng(2).integers(0, 40, (4, 24)).astype(np.int32)  # 57 rows unseen
    _, stats = statistics(source(), tokens)
    rows = np.asarray(stats[EMBED]["weighted_squares"].total)
    assert (rows > 0).all()
    assert rows[40:].mean() < rows[:40].mean()


@pytest.mark.full
def test_a_tied_table_has_the_sum_of_both_uses():
    params = source(CONFIG).params
    twice = {**params, "head": {"kernel": params["embed"]["embedding"].T}}
    apart = Tables(InMemory(UNTIED, twice), Calibration(TOKENS, None, 2), None, MemoryStore(), {})
    _, tied = statistics(source(), TOKENS)
    total = sum(apart.statistics[path]["weighted_inputs"].total for path in (EMBED, HEAD))
    found = tied[EMBED]["weighted_inputs"].total
    # Elements near 0 are what is left of large sums, so rounding is relative to the largest one.
    np.testing.assert_allclose(found, total, rtol=0, atol=1e-6 * np.abs(total).max())


@pytest.mark.quick("nf")
@pytest.mark.parametrize("method", ["nf", "auto"])
def test_files_keep_the_bytes_that_were_asked_for(method, tmp_path):
    ready, before = prepared(CONFIG, "both", None, method), np.inf
    for budget in (46_000, 38_000):
        result = ready.compress(file_bytes=budget)
        directory = tmp_path / str(budget)
        checkpoint.save(directory, CONFIG, result.params, hf_config=HF, plan=result.plan)
        assert 0.85 * budget < file_bytes(directory) <= budget < before
        assert result.plan.file_bytes == budget
        assert Plan.read(directory / "plan.json") == result.plan
        before = budget
    with pytest.raises(ValueError, match=r"need at least [\d,]+ bytes"):
        ready.plan(file_bytes=10_000)


@pytest.mark.full
@pytest.mark.parametrize(("method", "embeddings"), [("modegpt", None), ("svd", "nf4")])
def test_low_rank_methods_keep_the_bytes_of_a_file(method, embeddings, tmp_path):
    given = {"method": method, "embeddings": embeddings}
    result = compress(source(), TOKENS, file_bytes=280_000, **given)
    checkpoint.save(tmp_path / "small", CONFIG, result.params, hf_config=HF, plan=result.plan)
    assert 0.8 * 280_000 < file_bytes(tmp_path / "small") <= 280_000
    assert set(result.plan.tables) == (set() if embeddings is None else {EMBED})
    with pytest.raises(ValueError, match=r"need at least [\d,]+ bytes"):
        compress(source(), TOKENS, file_bytes=1000, **given)


def test_the_least_bytes_of_the_error_can_be_met():
    ready = prepared(CONFIG, "both")
    with pytest.raises(ValueError, match="need at least") as caught:
        ready.plan(file_bytes=1)
    least = int(str(caught.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    assert ready.plan(file_bytes=least).tables
    with pytest.raises(ValueError, match="need at least"):
        ready.plan(file_bytes=least - 1)


@pytest.mark.full
@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "roberta"])
def test_tables_of_other_blocks(name):
    """Learned positions, embeddings of another width, heads that predict masked tokens."""
    config = BLOCKS[name]
    model = InMemory(config, shifted(config))
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (4, 16)).astype(np.int32)
    mask_token = 1 if config.head == "masked" else None
    given = Calibration(tokens, None, 2, mask_token)
    tables = Tables(model, given, None, MemoryStore(), {})
    forms = tables.all_in("nf4")
    assert set(forms) == set(table_paths(config)) >= {EMBED, POSITIONS}
    for stats in tables.statistics.values():
        assert np.trace(np.asarray(stats["weighted_inputs"].total)) > 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stats))
    new, report = tables.stored(model.non_block_params(), forms)
    assert all(0 < row["relative_error"] < 0.1 for row in report.values())
    params = {**model.params, **new}
    ours, theirs = (
        Transformer(config).apply({"params": p}, tokens) for p in (params, materialize(params))
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
