"""Model cards of exports: what is known, and nothing else; nothing about the machine."""

from pathlib import Path

import pytest
from hf_models import hf_model

from lordjax import save
from lordjax.allocation.plan import Plan
from lordjax.conversions.exporters.export import export
from lordjax.conversions.exporters.model_card import README
from lordjax.conversions.readers.beside_weights import read_license
from lordjax.conversions.readers.checkpoint import open_checkpoint
from lordjax.storage.saved_model import open_saved

CARD = "---\nlanguage: en\nlicense: 'apache-2.0'\n---\n# Tiny\nlicense: of another kind\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "Tiny-1B"
    hf_model("llama", {}).save_pretrained(directory)
    (directory / README).write_text(CARD)
    return open_checkpoint(directory)


def card(directory, source, to):
    export(source, directory / to, to)
    return (directory / to / README).read_text()


def test_a_card_has_what_plan_and_report_say(checkpoint, tmp_path):
    """Dense matrices with the plan of a compression, as a stock-shaped model has them."""
    ranks = {f"layer_{i}/{name}": None for i in range(2) for name in ("mlp", "attention")}
    loss = {"in_sample": 0.1, "held_out": 0.2345}
    plan = Plan("modegpt-stock", ranks, 0.8, "stock", 0.0, predicted=loss)
    report = {
        "settings": {"model": str(tmp_path / "somewhere" / "Tiny-1B")},
        "plan": {"kept": 0.79},
        "calibration": {"windows": 16, "seq_len": 1024, "source": "/home/me/wiki.txt"},
    }
    facts = {"hf_config": checkpoint.hf_config, "plan": plan, "report": report}
    save(tmp_path / "model", checkpoint.config, checkpoint.params(), **facts)
    saved = open_saved(tmp_path / "model")
    for to in ("dense", "gguf", "orbax"):
        text = card(tmp_path, saved, to)
        assert text.startswith("---\nlicense: apache-2.0\ntags: [lordjax, compressed]\n---\n")
        assert "# Tiny-1B, compressed by modegpt-stock" in text
        assert "| budget | 0.8 of the block linear weights |" in text
        assert "| kept | 0.7900 of the block linear weights |" in text
        assert "| calibration | 16 sequences of 1024 tokens: wiki.txt |" in text
        assert "0.234 nats more than the base model" in text or "0.235 nats" in text
        assert str(tmp_path) not in text and "/home" not in text
    assert "llama-cli -m model.gguf" in (tmp_path / "gguf" / README).read_text()
    assert 'AutoModelForCausalLM.from_pretrained(".")' in (tmp_path / "dense" / README).read_text()


def test_a_card_of_a_model_that_was_not_compressed(checkpoint, tmp_path):
    text = card(tmp_path, checkpoint, "factored")
    assert "# Tiny-1B, exported to factored" in text
    assert "| base model | Tiny-1B |" in text
    assert "method" not in text and "loss" not in text
    assert "trust_remote_code=True" in text


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (CARD, {"license": "apache-2.0"}),
        ("license: mit\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\nlicense:\n---\n", {}),
        (None, {}),
    ],
)
def test_licences_are_read_from_the_head_of_a_card(tmp_path, content, found):
    if content is not None:
        Path(tmp_path / README).write_text(content)
    assert read_license(tmp_path) == found
