"""What `prepare` and `prepare_quantized` have in common: calibration tokens and how to run them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import checked
from lordjax.data.token_windows import fingerprint
from lordjax.models import objective
from lordjax.models.config import ModelConfig
from lordjax.runtime.mesh import Mesh
from lordjax.runtime.progress import Progress
from lordjax.storage.store import MemoryStore, Store

# The backward pass costs about four forward passes; more sequences than this gain little.
GRADIENT_WINDOWS = 32


def check_positive(**options: int | None) -> None:
    """Raises ValueError if an option is below 1; None is allowed."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


@dataclasses.dataclass(frozen=True)
class CalibrationSettings:
    """Calibration tokens, how to run them, and where finished work is kept.

    Attributes:
      tokens: calibration ids ``[sequences, length]``; None if the method needs none.
      mask: ``[sequences, length]``, False at padding; None: there is no padding.
      mask_token: id of the mask token, for a model that predicts masked tokens.
      batch_size: sequences per step; None: as many as this backend is fastest with.
      gradient_windows: number of sequences in the backward pass, spread evenly; None: all.
      progress: called with (stage, done, total).
      work: where finished work is kept; None: in memory.
      mesh: devices that share the calibration sequences; None: the first device.

    Raises:
      ValueError: if ``batch_size`` or ``gradient_windows`` is below 1.
    """

    tokens: np.ndarray | None
    mask: np.ndarray | None
    mask_token: int | None
    batch_size: int | None
    gradient_windows: int | None
    progress: Progress | None
    work: Store | None
    mesh: Mesh | None

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size, gradient_windows=self.gradient_windows)

    def store(self) -> Store:
        """Returns ``work``, or a fresh store in memory."""
        return MemoryStore() if self.work is None else self.work

    def calibration(self, config: ModelConfig) -> Calibration:
        """Returns the tokens ready to run.

        Raises:
          ValueError: if tokens, mask or mask token do not fit the model or each other.
        """
        tokens, mask = self.tokens, self.mask
        return checked(config, tokens, mask, self.batch_size, self.mask_token, self.mesh)

    def summary(self, config: ModelConfig, held_out: int | None = None) -> dict[str, Any]:
        """Returns what a report says about the calibration tokens.

        Args:
          config: the architecture.
          held_out: how many of the sequences were held out; None: the method holds out none.
        """
        tokens = np.asarray(self.tokens)
        held = {} if held_out is None else {"held_out_windows": held_out}
        return {
            "windows": len(tokens) - (held_out or 0),
            **held,
            "length": tokens.shape[1],
            "tokens_sha256": fingerprint(tokens),
            **objective.protocol(config, self.mask_token),
        }
