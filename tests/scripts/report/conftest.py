"""Directories that the tests of pictures share: a tiny model, and what becomes of it."""

import dataclasses

import numpy as np
import pytest
from blocks import BLOCKS, random_model
from click.testing import CliRunner

from lordjax import LowRank, NFQuantized
from lordjax.kernels import trees
from lordjax.kernels.normal_float import Format
from lordjax.scripts.cli import cli
from lordjax.storage import checkpoint

CONFIG = dataclasses.replace(BLOCKS["qwen3"], qk_norm=False, num_layers=3)


def command(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)


def refused(message, *arguments):
    """Runs a command that must end as one line of error and exit code 2."""
    found = command(*arguments)
    assert found.exit_code == 2, found.output
    assert found.stdout == ""
    (line,) = found.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line


@pytest.fixture(scope="session")
def config():
    return CONFIG


@pytest.fixture(scope="session")
def run():
    """Runs a command of the command line."""
    return command


@pytest.fixture(scope="session")
def fails():
    """Runs a command that must be refused."""
    return refused


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A directory with a dense ``model`` and calibration ``tokens.npy``."""
    folder = tmp_path_factory.mktemp("tiny")
    facts = {"model_type": "llama", "vocab_size": CONFIG.vocab_size}
    source = random_model(CONFIG)
    checkpoint.save(folder / "model", CONFIG, source.params, hf_config=facts)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 16), np.int32)
    np.save(folder / "tokens.npy", tokens)
    return folder


@pytest.fixture(scope="session")
def mixed():
    """Leaves of every kind: dense, narrower, a factor pair, quantized."""
    flat = trees.flatten(random_model(CONFIG).params)
    q, up = flat["layer_1/attention/q/kernel"], flat["layer_0/mlp/up/kernel"]
    flat["layer_1/attention/q/kernel"] = LowRank(q[:, :5], q[:5])
    flat["layer_2/attention/q/kernel"] = LowRank(q[:, :9], q[:9])
    flat["layer_0/mlp/up/kernel"] = up[:, :40]
    flat["layer_0/mlp/down/kernel"] = flat["layer_0/mlp/down/kernel"][:40]
    return flat


@pytest.fixture(scope="session")
def quantized(mixed):
    """The same with quantized weights in layer 2."""
    kernel = mixed["layer_1/mlp/gate/kernel"]
    form = Format(3, 4, "bfloat16", 32, 256)
    return mixed | {"layer_2/mlp/gate/kernel": NFQuantized.encode(kernel, form)}
