"""How many calibration tokens a model needs."""

import dataclasses

import pytest
from blocks import GPT2

from lordjax.data.token_count import (
    LEAST_TOKENS,
    TOKENS_PER_NEURON,
    default_windows,
    shortage,
    tokens_per_neuron,
)


def wide(neurons):
    return dataclasses.replace(GPT2, mlp_size=neurons)


@pytest.mark.parametrize(
    ("neurons", "length", "windows"),
    [(48, 1024, 64), (48, 512, 128), (48, 1000, 66), (4864, 1024, 64), (28_672, 1024, 280)],
)
def test_default_windows_follow_the_width(neurons, length, windows):
    config = wide(neurons)
    assert default_windows(config, length) == windows
    assert windows * length >= max(TOKENS_PER_NEURON * neurons, LEAST_TOKENS)
    assert shortage(config, windows * length) is None


def test_a_shortage_is_said_with_the_numbers():
    config = wide(4864)
    assert shortage(config, 48_640) is None
    warning = shortage(config, 16_384)
    assert warning is not None and "\n" not in warning
    for part in ("16,384", "4,864", "48,640", "--samples", "--calibration"):
        assert part in warning
    assert tokens_per_neuron(config, 16_384) == pytest.approx(3.3684, abs=1e-4)
