"""Stock shapes through the command line: plain smaller checkpoints, opened by transformers."""

import json

import numpy as np
import pytest
from commands import calibration, fails, run
from safetensors.numpy import load_file

from lordjax import load
from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.kernels import trees
from lordjax.names import is_block_linear
from lordjax.storage.saved_model import open_saved

pytestmark = pytest.mark.full
STOCK = ("--shape", "stock", "--multiple", 4)


@pytest.fixture(scope="module")
def elastic(tiny, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("stock") / "elastic"
    options = ("--calibration", text, "--samples", 8, "--seq-len", 32)
    result = run("compress", tiny, out, *STOCK, *options, "--elastic")
    assert result.exit_code == 0, result.stderr
    return out


def test_every_budget_is_a_plain_checkpoint(tiny, elastic, text, tmp_path):
    own = open_checkpoint(tiny)
    for keep in (0.8, 0.5):
        cut, out = tmp_path / f"cut-{keep}", tmp_path / f"dense-{keep}"
        assert run("export", elastic, cut, "--keep", keep, "--shape", "stock").exit_code == 0
        saved = open_saved(cut)
        assert saved.is_original()  # no array is smaller than its config says
        given = ("export", cut, out, "--to", "dense", "--verify", "--tokens", text, "--json")
        found = run(*given)
        assert found.exit_code == 0, found.stderr
        assert json.loads(found.stdout)["verify"]["logit_difference"] < 1e-5
        config = json.loads((out / "config.json").read_text())
        assert "auto_map" not in config and config["model_type"] == "llama"
        assert config["head_dim"] == own.config.head_size
        assert config["intermediate_size"] % 4 == 0
        tensors = load_file(out / "model.safetensors")
        sizes = {name: t.size for name, t in tensors.items() if "_proj" in name}
        dense = sum(leaf.size for path, leaf in own.leaves().items() if is_block_linear(path))
        assert sum(sizes.values()) <= keep * dense
        # Nothing is padded: no row and no column of zeros.
        assert all(np.abs(t).sum(0).all() and np.abs(t).sum(-1).all() for t in tensors.values())


def test_a_budget_is_the_same_from_an_elastic_model_and_at_once(tiny, elastic, text, tmp_path):
    options = ("--calibration", text, "--samples", 8, "--seq-len", 32)
    result = run("compress", tiny, tmp_path / "once", *STOCK, *options, "--keep", 0.6, "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["settings"]["method"] == "modegpt-stock"
    assert summary["settings"]["multiple"] == 4
    assert "removed" in (tmp_path / "once" / "report.html").read_text() or summary["kept"] <= 0.6
    config, params = load(tmp_path / "once")
    other, cut = load(elastic, keep=0.6)
    assert config == other
    for path, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(leaf, trees.flatten(cut)[path])
    again = run("compress", tmp_path / "once", tmp_path / "twice", *calibration(text))
    assert again.exit_code == 0, again.stderr  # a plain model: it is compressed as any other


def test_a_width_for_each_block(tiny, text, tmp_path):
    """From an elastic model, in one step; multiples of 256 are the engines' own."""
    options = ("--shape", "per-layer", "--multiple", 4, *calibration(text))
    result = run("compress", tiny, tmp_path / "elastic", *options, "--elastic")
    assert result.exit_code == 0, result.stderr
    cut = ("export", tmp_path / "elastic", tmp_path / "out", "--keep", 0.6, "--to")
    found = run(*cut, "gguf", "--json")
    assert found.exit_code == 0, found.stderr
    fails(
        "nemotron-nas widths are multiples of 256",
        *cut[:2],
        tmp_path / "b",
        *cut[3:],
        "nemotron-nas",
    )
    wrong = (*cut[:2], tmp_path / "b", *cut[3:5], "--shape", "stock")
    fails("its factors are those of per-layer shapes; leave --shape out", *wrong)
    assert not (tmp_path / "b").exists()


def test_a_report_about_removed_blocks(tiny, text, tmp_path):
    """A plan as `compress` makes it where a block costs little: its rows say so."""
    import dataclasses

    from lordjax.allocation.plan import Plan
    from lordjax.compression.low_rank import prepare
    from lordjax.compression.resumable_output import Output
    from lordjax.scripts.report.page import page_of

    model = open_checkpoint(tiny)
    tokens = np.random.default_rng(0).integers(0, 200, (4, 16)).astype(np.int32)
    prepared = prepare(model, tokens, method="modegpt-stock", multiple=4)
    ranks = {path: 0 if path.startswith("layer_0/") else None for path in prepared.sizes}
    plan = dataclasses.replace(Plan("modegpt-stock", ranks, 0.5, "given"))
    with Output(tmp_path / "model", {"made by": "a test"}) as output:
        result = prepared.apply(plan, into=output.shards)
        output.finish(result, hf_config=model.hf_config)
    page = page_of(tmp_path / "model", {})
    assert page.count("<td>removed</td>") == 2
    assert "(0.5000)" in page
    assert open_saved(tmp_path / "model").hf_config["num_hidden_layers"] == 1


def test_wrong_command_lines(tiny, elastic, compressed, text, tmp_path):
    out = tmp_path / "out"
    options = calibration(text)
    fails("method 'lord' has no stock shapes", "compress", tiny, out, *STOCK, "--method", "lord")
    fails("method 'nf' does not take --shape", "compress", tiny, out, *STOCK, "--method", "nf")
    wrong = ("compress", tiny, out, *options, "--shape", "stock", "--multiple", 64)
    fails("expected a multiple of at most 12", *wrong)
    wrong = ("compress", tiny, out, *options, *STOCK, "--allocation", "uniform")
    fails("need allocation 'stock', got 'uniform'", *wrong)
    fails("--shape is used with --keep", "export", elastic, out, "--to", "dense", *STOCK[:2])
    wrong = ("export", elastic, out, "--keep", 0.5, "--shape", "free")
    fails("its factors are those of stock shapes; leave --shape out", *wrong)
    assert not out.exists()
