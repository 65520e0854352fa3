"""How many calibration tokens a model needs: they follow the width of its widest MLP."""

from __future__ import annotations

from lordjax.models.config import ModelConfig

# Calibration tokens for every neuron of an MLP. The statistics of an MLP are as many correlations
# as it has pairs of neurons; with fewer tokens they hold on the calibration data only.
TOKENS_PER_NEURON = 10
LEAST_TOKENS = 64 * 1024  # that are read by default, however small the model is


def default_windows(config: ModelConfig, length: int) -> int:
    """Returns how many windows of ``length`` tokens are enough to calibrate a model."""
    return -(-max(tokens_needed(config), LEAST_TOKENS) // length)


def tokens_needed(config: ModelConfig) -> int:
    """Returns the fewest tokens to calibrate a model without a warning."""
    return TOKENS_PER_NEURON * config.mlp_size


def tokens_per_neuron(config: ModelConfig, tokens: int) -> float:
    """Returns calibration tokens for every neuron of the widest MLP."""
    return tokens / config.mlp_size


def shortage(config: ModelConfig, tokens: int) -> str | None:
    """Returns a warning if there are too few calibration tokens for a model; else None.

    Args:
      config: architecture of the model.
      tokens: number of calibration tokens.
    """
    needed = tokens_needed(config)
    if tokens >= needed:
        return None
    return (
        f"warning: {tokens:,} calibration tokens for MLPs of {config.mlp_size:,} neurons; expected "
        f"at least {needed:,} ({TOKENS_PER_NEURON} per neuron), or errors on other text may be "
        "much larger than predicted; give more text (--calibration) or more windows (--samples)"
    )
