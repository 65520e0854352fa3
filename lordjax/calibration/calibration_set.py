"""The calibration set: token sequences, and the batches in which they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from lordjax.data.token_windows import check_ids
from lordjax.models import objective
from lordjax.models.config import ModelConfig
from lordjax.runtime.mesh import Mesh


@dataclasses.dataclass
class Calibration:
    """Calibration sequences and how they run.

    Attributes:
      tokens: token ids ``[n, len]``.
      mask: ``[n, len]``, False at padding; None: there is no padding.
      batch_size: sequences of a batch.
      mask_token: id that a model of masked tokens reads at masked positions; see
        `objective.inputs`.
      mesh: devices that split every batch; None: the first device.
    """

    tokens: np.ndarray
    mask: np.ndarray | None
    batch_size: int
    mask_token: int | None = None
    mesh: Mesh | None = None

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yields tokens and mask of each batch."""
        for start in range(0, len(self.tokens), self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield self.tokens[rows], None if self.mask is None else self.mask[rows]

    def read(self, config: ModelConfig, tokens: Any, mask: Any) -> np.ndarray:
        """Returns the ids that the model reads: the tokens, some masked for masked heads."""
        return objective.inputs(config, tokens, mask, self.mask_token)

    def spread(self, count: int | None) -> Calibration:
        """Returns at most ``count`` of the sequences, evenly spread; None: all."""
        if count is None or count >= len(self.tokens):
            return self
        chosen = np.linspace(0, len(self.tokens) - 1, count).round().astype(int)
        mask = None if self.mask is None else self.mask[chosen]
        return dataclasses.replace(self, tokens=self.tokens[chosen], mask=mask)

    def hold_out(self, count: int) -> tuple[Calibration, np.ndarray]:
        """Holds out the last sequences: at most ``count``, at most an eighth, at least one.

        Returns:
          The calibration set without them; their tokens.

        Raises:
          ValueError: if there is only one sequence.
        """
        if len(self.tokens) < 2:
            raise ValueError(
                "one calibration sequence: expected at least 2, because one is held out"
            )
        count = max(1, min(count, len(self.tokens) // 8))
        mask = None if self.mask is None else self.mask[:-count]
        kept = dataclasses.replace(self, tokens=self.tokens[:-count], mask=mask)
        return kept, self.tokens[-count:]

    def masks(self) -> list[np.ndarray | None]:
        """Returns the mask of each batch."""
        return [mask for _, mask in self.batches()]


def check_tokens(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Returns calibration tokens as int32 ``[n, len]``.

    Raises:
      ValueError: if the array is not 2-D integer, is empty, or holds ids outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            "calibration tokens: expected a non-empty integer array [sequences, length], got "
            f"{tokens.dtype} {tokens.shape}"
        )
    check_ids(tokens, config.vocab_size, "calibration tokens")
    return tokens.astype(np.int32)
