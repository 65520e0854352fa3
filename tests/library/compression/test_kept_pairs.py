"""A smaller model is quantized: its matrices get codes, and its low-rank pairs stay pairs."""

import jax
import numpy as np
import pytest
from blocks import shifted

from lordjax.compression.kept_pairs import FORMAT, is_plain_pair
from lordjax.compression.low_rank import compress
from lordjax.compression.quantized import prepare_quantized, quantize
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import materialize, nbytes
from lordjax.kernels.convert import quantize_pair
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import NFQuantized
from lordjax.models import ModelConfig, Transformer
from lordjax.models.source import InMemory
from lordjax.storage import checkpoint

CONFIG = ModelConfig(97, 64, 128, 2, 4, 2, 16, 128, tie_embeddings=True)
TOKENS = np.random.default_rng(0).integers(0, 97, (4, 24)).astype(np.int32)
MIXED = {"layer_0/attention/q": 12, "layer_1/mlp/down": 10}  # all other matrices stay dense


@pytest.fixture(scope="module")
def narrow():
    """MLPs with fewer neurons, attention in fewer dimensions."""
    made = compress(InMemory(CONFIG, shifted(CONFIG)), TOKENS, method="modegpt", keep=0.6)
    return InMemory(CONFIG, made.params)


@pytest.fixture(scope="module")
def mixed():
    """Two low-rank pairs among dense matrices."""
    made = compress(InMemory(CONFIG, shifted(CONFIG)), TOKENS, ranks=MIXED, method="lord")
    return InMemory(CONFIG, made.params)


def pairs(params):
    return {path: leaf for path, leaf in trees.flatten(params).items() if isinstance(leaf, LowRank)}


def logits(params):
    return np.asarray(Transformer(CONFIG).apply({"params": params}, TOKENS))


@pytest.mark.parametrize("model", ["narrow", "mixed"])
def test_matrices_get_codes_and_pairs_stay(model, request):
    source = request.getfixturevalue(model)
    before, kept = trees.flatten(source.params), pairs(source.params)
    result = quantize(source, method="nf", form="nf4")
    after = trees.flatten(result.params)
    assert after.keys() == before.keys()
    assert pairs(result.params).keys() == kept.keys() and (kept or model == "narrow")
    for path, leaf in after.items():
        assert leaf.shape == before[path].shape
        if path in kept:
            exact = quantize_pair(kept[path], normal_float.Format.parse(FORMAT))
            jax.tree.map(np.testing.assert_array_equal, leaf, exact)
        elif path.endswith("kernel"):
            assert isinstance(leaf, NFQuantized)
    assert result.report["bytes"] == nbytes(result.params)
    assert not kept.keys() & result.plan.ranks.keys()


def test_the_quantized_model_computes_what_the_smaller_one_does(mixed):
    exact = logits(mixed.params)
    errors = []
    for form in ("nf4", "nf8"):
        result = quantize(mixed, method="nf", form=form)
        # The stored matrices and nothing else decide the logits.
        dense = trees.update(
            result.params, {path: materialize(leaf) for path, leaf in pairs(result.params).items()}
        )
        np.testing.assert_allclose(logits(dense), logits(result.params), atol=1e-4)
        errors.append(np.linalg.norm(logits(result.params) - exact) / np.linalg.norm(exact))
    assert errors[1] < errors[0] / 4 < 0.1


@pytest.mark.full
def test_calibration_and_budgets_count_the_matrices_that_are_left(narrow, tmp_path):
    prepared = prepare_quantized(narrow, TOKENS, method="auto")
    flat = trees.flatten(narrow.params)
    left = {path: leaf for path, leaf in flat.items() if path in prepared.shapes}
    assert prepared.count == sum(leaf.size for leaf in left.values())
    assert not any(map(is_plain_pair, left.values()))
    result = prepared.compress(bits=5.0)
    stored = {path: trees.flatten(result.params)[path] for path in left}
    assert 8 * nbytes(stored) <= 5.0 * prepared.count
    for budget in (60_000, 45_000):
        result = prepared.compress(file_bytes=budget)
        folder = tmp_path / str(budget)
        checkpoint.save(folder, CONFIG, result.params, hf_config={}, plan=result.plan)
        assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= budget


@pytest.mark.full
@pytest.mark.parametrize(("factors", "form"), [("nf4", "nf4"), ("dense", None), (None, FORMAT)])
def test_format_of_the_pairs(mixed, factors, form):
    result = quantize(mixed, method="lq", form="nf4", rank=4, factors=factors)
    found = pairs(result.params)
    assert found.keys() == pairs(mixed.params).keys()
    for pair in found.values():
        for factor in (pair.left, pair.right):
            if form is None:
                assert factor.dtype == "float16"
            else:
                assert factor.format == normal_float.Format.parse(form)


def test_pairs_alone_leave_nothing_to_quantize():
    made = compress(InMemory(CONFIG, shifted(CONFIG)), TOKENS, method="svd", keep=0.5)
    with pytest.raises(ValueError, match=r"none is left to quantize.* factors=FORMAT"):
        quantize(InMemory(CONFIG, made.params), method="nf", form="nf4")


def test_a_quantized_model_counts_as_dense(mixed):
    once = quantize(mixed, method="nf", form="nf8")
    twice = quantize(InMemory(CONFIG, once.params), method="nf", form="nf8")
    assert not pairs(twice.params)
    for path in prepare_quantized(mixed, method="nf", weighting="none").shapes:
        assert isinstance(trees.flatten(twice.params)[path], NFQuantized)
