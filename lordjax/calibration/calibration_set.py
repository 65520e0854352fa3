"""The calibration set: token sequences, and the batches and folds in which they run.

Cross-fitting needs two folds: what is fitted to the statistics of one is judged by those of the
other. The folds are halves in the order of the sequences, because neighbours may come from one
document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from lordjax.data.token_windows import check_ids
from lordjax.models import objective
from lordjax.models.config import ModelConfig
from lordjax.runtime.mesh import DATA_AXIS, Mesh


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
      folds: ``[n]`` number of the fold of each sequence, 0 and then 1; None: there is one fold.
    """

    tokens: np.ndarray
    mask: np.ndarray | None
    batch_size: int
    mask_token: int | None = None
    mesh: Mesh | None = None
    folds: np.ndarray | None = None

    @property
    def num_folds(self) -> int:
        """Number of folds, 1 or 2."""
        return 1 if self.folds is None else 2

    def split(self) -> Calibration:
        """Returns the set in two folds; unchanged if it has one sequence.

        The folds are halves whatever the batches and devices are, so that errors are, too.
        """
        share = 1 if self.mesh is None else self.mesh.shape.get(DATA_AXIS, 1)
        half = len(self.tokens) // 2
        if not half:
            return self
        batch = min(self.batch_size, half)
        batch = max(batch // share * share, min(batch, share))
        folds = (np.arange(len(self.tokens)) >= half).astype(int)
        return dataclasses.replace(self, batch_size=batch, folds=folds)

    def rows(self, which: Any) -> Calibration:
        """Returns some of the sequences, given by a slice or by indices."""
        mask = None if self.mask is None else self.mask[which]
        folds = None if self.folds is None else self.folds[which]
        return dataclasses.replace(self, tokens=self.tokens[which], mask=mask, folds=folds)

    def _batch_rows(self) -> list[slice]:
        """Returns the sequences of each batch; none has sequences of two folds."""
        count, size = len(self.tokens), self.batch_size
        cut = count if self.folds is None else int(np.searchsorted(self.folds, 1))
        return [
            slice(start, min(start + size, end))
            for first, end in ((0, cut), (cut, count))
            for start in range(first, end, size)
        ]

    def batch_folds(self) -> list[int]:
        """Returns the number of the fold of each batch."""
        if self.folds is None:
            return [0] * len(self._batch_rows())
        return [int(self.folds[rows.start]) for rows in self._batch_rows()]

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yields tokens and mask of each batch."""
        for rows in self._batch_rows():
            yield self.tokens[rows], None if self.mask is None else self.mask[rows]

    def read(self, config: ModelConfig, tokens: Any, mask: Any) -> np.ndarray:
        """Returns the ids that the model reads: the tokens, some masked for masked heads."""
        return objective.inputs(config, tokens, mask, self.mask_token)

    def spread(self, count: int | None) -> Calibration:
        """Returns at most ``count`` of the sequences, evenly spread; None: all.

        With two folds it returns at least one sequence of each.
        """
        if count is None or count >= len(self.tokens):
            return self
        count = max(count, self.num_folds)
        return self.rows(np.linspace(0, len(self.tokens) - 1, count).round().astype(int))

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
        return self.rows(slice(-count)), self.tokens[-count:]

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
