"""What goes into a compression: a model read block by block, and calibration tokens."""

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
    """Tokens and how to run them: ``[n, len]`` in batches, mask False at padding.

    ``mask_token`` is what a model that predicts masked tokens reads there (`objective.inputs`);
    ``mesh`` are the devices that share the work, None: the first one.
    """

    tokens: np.ndarray
    mask: np.ndarray | None
    batch_size: int
    mask_token: int | None = None
    mesh: Mesh | None = None

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Tokens and mask of each batch."""
        for start in range(0, len(self.tokens), self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield self.tokens[rows], None if self.mask is None else self.mask[rows]

    def read(self, config: ModelConfig, tokens: Any, mask: Any) -> np.ndarray:
        """What the model reads of a batch: some of it masked, if that is what it predicts."""
        return objective.inputs(config, tokens, mask, self.mask_token)

    def spread(self, windows: int | None) -> Calibration:
        """A subset of at most that many windows, evenly spread."""
        if windows is None or windows >= len(self.tokens):
            return self
        chosen = np.linspace(0, len(self.tokens) - 1, windows).round().astype(int)
        mask = None if self.mask is None else self.mask[chosen]
        return dataclasses.replace(self, tokens=self.tokens[chosen], mask=mask)

    def split(self, windows: int) -> tuple[Calibration, np.ndarray]:
        """The calibration without its last windows, and those: at most an eighth of all.

        Raises:
          ValueError: if there is only one window, so that nothing can be held out.
        """
        if len(self.tokens) < 2:
            raise ValueError("one calibration window: at least 2 are needed to hold one out")
        windows = max(1, min(windows, len(self.tokens) // 8))
        mask = None if self.mask is None else self.mask[:-windows]
        kept = dataclasses.replace(self, tokens=self.tokens[:-windows], mask=mask)
        return kept, self.tokens[-windows:]

    def masks(self) -> list[np.ndarray | None]:
        """The mask of each batch."""
        return [mask for _, mask in self.batches()]


def check_tokens(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Calibration tokens as int32 ``[n, len]``.

    Raises:
      ValueError: if the array is not 2-D integer, is empty, or holds ids outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            "calibration tokens: expected a non-empty integer array [windows, length], got "
            f"{tokens.dtype} {tokens.shape}"
        )
    check_ids(tokens, config.vocab_size, "calibration tokens")
    return tokens.astype(np.int32)
