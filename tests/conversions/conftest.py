"""Fixtures of several files about checkpoints."""

import functools

import pytest


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(HF model, checkpoint) of a case, each made once."""
    pytest.importorskip("torch")
    from hf_models import CASES, hf_model

    from lordjax.conversions.readers.checkpoint import open_checkpoint

    @functools.cache
    def make(case):
        directory = tmp_path_factory.mktemp(case)
        model = hf_model(*CASES[case])
        model.save_pretrained(directory)
        return model, open_checkpoint(directory)

    return make


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("torch")
    from hf_models import hf_model

    return hf_model("llama", {})


@pytest.fixture
def directory(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path
