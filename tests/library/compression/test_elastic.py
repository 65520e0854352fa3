"""An elastic model cut to any budget has the same bits as a compression to that budget."""

import json
import shutil

import jax
import numpy as np
import pytest
from commands import calibration, fails, run
from interrupted import TOKENS, small_model

from lordjax import load
from lordjax.allocation.plan import Plan
from lordjax.compression import elastic
from lordjax.compression.low_rank import compress
from lordjax.compression.resumable_output import Output, partial
from lordjax.scripts.report.page import PAGE, without_times

METHODS = ("lord", "modegpt")


def made(directory, **options):
    with Output(directory, {"made of": "test"}) as output:
        result = elastic.compress(
            small_model(), TOKENS, work=output.store, into=output.shards, **options
        )
        output.finish(
            result, hf_config={}, also=lambda stage: elastic.keep_entries(output.store, stage)
        )
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    return {method: made(folder / method, method=method) for method in METHODS}


def same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_every_budget_is_that_of_a_compression_to_it(models, method):
    for keep in (0.8, 0.5):
        direct = compress(small_model(), TOKENS, method=method, keep=keep)
        cut = elastic.cut(models[method], keep)
        assert cut.plan == direct.plan
        assert cut.plan.predicted["held_out"] > 0
        assert cut.report["held_out_check"] == direct.report["held_out_check"] != []
        same(load(models[method], keep=keep)[1], direct.params)
    # Without a budget, `load` returns the dense model.
    same(load(models[method])[1], small_model().params)
    assert not partial(models[method]).exists()


@pytest.mark.full
def test_a_temperature_is_chosen_for_every_budget_unless_it_is_named(tmp_path):
    """The held-out sequences are those on which a compression would have chosen it."""
    chosen = made(tmp_path / "chosen", method="modegpt-published")
    direct = compress(small_model(), TOKENS, method="modegpt-published", keep=0.6)
    assert elastic.cut(chosen, 0.6).plan == direct.plan
    same(load(chosen, keep=0.6)[1], direct.params)
    named = made(tmp_path / "named", method="modegpt-published", temperature=0.3)
    assert elastic.cut(named, 0.6).plan.temperature == 0.3


def test_what_cannot_be_cut_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match=r"'rom'.*depend on the budget.*prefix 'dense'"):
        elastic.check_settings("rom", None)
    with pytest.raises(ValueError, match="corrective blocks before"):
        elastic.check_settings("lord", "corrective")
    with pytest.raises(KeyError, match="no method 'lrd'"):
        elastic.check_settings("lrd", None)
    for keep in (0, 1.5):
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            load(models["lord"], keep=keep)
    elastic.export(models["lord"], tmp_path / "small", 0.7)
    with pytest.raises(ValueError, match=r"small: has no factors.*compress --elastic"):
        load(tmp_path / "small", keep=0.6)


def test_damage_is_found_and_named(models, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(models["lord"], broken)
    file = sorted((broken / "elastic" / "entries").glob("*factors*"))[3]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name}.*damaged"):
        elastic.export(broken, tmp_path / "out", 0.7)
    assert not (tmp_path / "out").exists()
    index = broken / "elastic" / "index.json"
    newer = json.loads(index.read_text()) | {"format": elastic.FORMAT + 1}
    index.write_text(json.dumps(newer))
    with pytest.raises(ValueError, match="upgrade lordjax"):
        load(broken, keep=0.7)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: not JSON"):
        load(broken, keep=0.7)


def swap_sites(entries):
    one, other = "factors/layer_0/mlp/up/kernel", "factors/layer_1/mlp/up/kernel"
    entries[one], entries[other] = entries[other], entries[one]


def leave(entries):
    entries["elastic"]["file"] = "../../outside-elastic.safetensors"


INDEX_DAMAGES = {
    "swapped sites": (swap_sites, "index"),
    "a file outside": (leave, "is no file of an entry"),
    "no facts": (lambda entries: entries.pop("elastic"), "not a list of entries"),
    "a row of text": (lambda entries: entries.update(elastic="x"), "index"),
    "another checksum": (
        lambda entries: entries["elastic"].update(sha256="0"),
        "is not what was written",
    ),
}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_a_changed_index_is_refused(models, tmp_path, damage, older):
    broken, (change, message) = tmp_path / "broken", INDEX_DAMAGES[damage]
    shutil.copytree(models["lord"], broken)
    index = broken / "elastic" / "index.json"
    content = json.loads(index.read_text())
    change(content["entries"])
    index.write_text(json.dumps(content))
    if older:  # directories without checksums of their small files
        (broken / "checksums.json").unlink()
        config = json.loads((broken / "config.json").read_text())
        config["lordjax"].pop("checksums")
        (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message if older else "index.json") as caught:
        load(broken, keep=0.7)
    assert str(broken) in str(caught.value)


def test_the_dense_part_is_checked_too(models, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(models["lord"], broken)
    file = max(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=f"{file.name}: layer_.* was changed"):
        load(broken, keep=0.7)
    factors = sorted((broken / "elastic" / "entries").glob("*factors*"))[0]
    factors.write_bytes(factors.read_bytes()[:-1] + b"\x7f")
    assert load(broken, keep=0.7, verify=False)[0] == load(models["lord"])[0]


@pytest.mark.full
def test_the_command_line_writes_the_files_of_a_direct_compression(tiny, text, tmp_path):
    whole, small, direct = (tmp_path / name for name in ("whole", "small", "direct"))
    method = ("--method", "modegpt", *calibration(text))
    found = run("compress", tiny, whole, *method, "--elastic")
    assert found.exit_code == 0, found.stderr
    assert f"lordjax export {whole}" in found.stdout
    assert run("compress", tiny, direct, *method, "--keep", 0.6).exit_code == 0
    found = run("export", whole, small, "--keep", 0.6, "--json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["to"] == "lordjax"
    ours, theirs = ({f.name: f for f in path.iterdir()} for path in (small, direct))
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"report.json", "checksums.json", PAGE}:
        assert ours[name].read_bytes() == theirs[name].read_bytes(), name
    pages = [without_times(files[PAGE].read_text()) for files in (ours, theirs)]
    assert pages[0] == pages[1]
    assert Plan.read(small / "plan.json").keep == 0.6
    # Cut and exported in another format; evaluated as the dense model.
    found = run("export", whole, tmp_path / "dense", "--keep", 0.6, "--to", "dense", "--verify")
    assert found.exit_code == 0, found.stderr
    assert run("evaluate", whole, "--tokens", text, "--windows", 1).exit_code == 0


def test_wrong_options_end_in_one_line(tiny, text, tmp_path):
    out = tmp_path / "out"
    start = ("compress", tiny, out, *calibration(text), "--elastic")
    fails("--keep cannot be combined with --elastic", *start, "--keep", 0.5)
    fails("--factors cannot be combined with --elastic", *start, "--factors", "nf4")
    fails("depend on the budget", *start, "--method", "rom")
    fails("does not take --elastic", *start, "--method", "nf", "--format", "nf4")
    fails("has no factors", "export", tiny, out, "--keep", 0.5)
    fails("--to is missing", "export", tiny, out)
    assert not list(tmp_path.iterdir())
