"""Configs of released models open, and have as many parameters as their publishers say."""

import json
import math

import numpy as np
import pytest
from released_configs import ONCE_REFUSED, RELEASED, WITH_POOLER

from lordjax.conversions.families.registry import carried_table, model_config, tensor_table
from lordjax.conversions.readers.checkpoint import open_checkpoint


def parameters(name, config):
    table = tensor_table(config, name)
    if name in WITH_POOLER:
        table |= {p: row for p, row in carried_table(config).items() if p.startswith("pooler/")}
    return sum(
        math.prod(shape) for shape in {row.name: row.shape for row in table.values()}.values()
    )


@pytest.mark.parametrize("name", RELEASED)
def test_number_of_parameters(name):
    config, expected = RELEASED[name]
    found = parameters(name, config)
    if isinstance(expected, str):
        assert found == pytest.approx(1e6 * int(expected.removesuffix("M")), rel=0.01)
    else:
        assert found == expected


@pytest.mark.parametrize("name", ONCE_REFUSED)
def test_once_refused(name):
    config, head = ONCE_REFUSED[name]
    assert model_config(config).head == head


def test_a_config_that_names_no_number_of_classes(tmp_path):
    """The files have it, and what is written from them says it."""
    from safetensors.numpy import save_file

    config = ONCE_REFUSED["token classes"][0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    table = tensor_table({**config, "num_labels": 9}).values()
    tensors = {row.name: np.ones(row.shape, np.float32) for row in table}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.config.head, checkpoint.config.num_classes) == ("tokens", 9)
    assert checkpoint.hf_config["num_labels"] == 9
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_labels": 3}))
    with pytest.raises(ValueError, match=r"classifier.weight is \(9, 32\), not \(3, 32\)"):
        open_checkpoint(tmp_path)
