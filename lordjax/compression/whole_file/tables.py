"""Stores tables, the matrices outside the blocks, as quantized weights or in a smaller dtype.

A format is the name of a NormalFloat format or of a dtype (`kernels.table.parse`). With calibration
tokens the weights compensate for each other's errors in the metric of the loss
(`table_statistics`); without any they are rounded to the nearest.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lordjax.allocation.candidates import Candidate, Table
from lordjax.calibration.backward_pass import gradient_statistics, half_batch
from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import on_device
from lordjax.calibration.table_statistics import Ends
from lordjax.compression.quantized_matrix import (
    candidate_rows,
    layer_summary,
    matrix_weights,
    stored_directly,
)
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import nbytes
from lordjax.kernels.convert import cast
from lordjax.kernels.table import parse, quantized_table, smaller_table
from lordjax.methods.base import Method
from lordjax.methods.quantized.weightings import Weights
from lordjax.models.config import ModelConfig
from lordjax.models.source import Source
from lordjax.models.tables import HEAD, as_kernel, table_paths
from lordjax.runtime.mesh import to_host
from lordjax.runtime.progress import Clock, Progress
from lordjax.storage.store import Store, digest, get_or_compute
from lordjax.storage.tensor_files import header_bytes

WINDOWS = 8  # calibration sequences that the statistics are taken on, spread evenly
SMALLER = "float16"  # dtype that a budget may choose for a table
_NOTHING = Method("tables", None)  # no statistics inside blocks


def has_loss(config: ModelConfig) -> bool:
    """Returns whether a model has a loss that says what errors of its tables cost."""
    return config.head != "none" and (config.num_classes != 1 or config.head == "span")


def check_format(text: str | None) -> None:
    """Raises ValueError if a text is no format of tables; None is allowed."""
    if text is not None:
        parse(text)


@dataclasses.dataclass
class Tables:
    """The tables of a model, and how they become smaller.

    Attributes:
      source: the original model.
      calibration: tokens; None: errors of all weights count the same.
      dtype: dtype of what is not quantized; None: as in the model.
      store: where statistics are kept.
      seconds: seconds of every stage; those of statistics and predictions are added to ``tables``.
      progress: called with (stage, done, total).
      feedback: whether later weights compensate for the errors of earlier ones.
    """

    source: Source
    calibration: Calibration | None
    dtype: Any | None
    store: Store
    seconds: dict[str, float]
    progress: Progress | None = None
    feedback: bool = True

    @functools.cached_property
    def leaves(self) -> dict[str, np.ndarray]:
        """Path -> table in the dtype in which it is stored if nothing else is asked for."""
        flat = trees.flatten(self.source.non_block_params())
        names = table_paths(self.source.config)
        return {p: flat[p] if self.dtype is None else cast(flat[p], self.dtype) for p in names}

    def nbytes(self, forms: Mapping[str, str]) -> int:
        """Returns the bytes that a file holds for all tables, in some formats."""

        def size(path: str, leaf: Any) -> int:
            form = parse(forms[path]) if path in forms else None
            if isinstance(form, normal_float.Format):
                return form.nbytes(leaf.size) + header_bytes(path, 4)
            return leaf.size * np.dtype(form or leaf.dtype).itemsize + header_bytes(path, 1)

        return sum(size(path, leaf) for path, leaf in self.leaves.items())

    def all_in(self, form: str | None) -> dict[str, str]:
        """Returns the formats of all tables where all have one; None: they stay as they are."""
        check_format(form)
        return {} if form is None else dict.fromkeys(table_paths(self.source.config), form)

    @functools.cached_property
    def statistics(self) -> Mapping[str, Mapping[str, Any]]:
        """Path -> statistics of its errors; the first access runs over the model."""
        if self.calibration is None or not has_loss(self.source.config):
            return {path: {} for path in self.leaves}
        return get_or_compute(self.store, "tables/statistics", self._collect)

    def collect_for(self, formats: Mapping[str, str]) -> None:
        """Collects the statistics that some formats need, unless that is done.

        Args:
          formats: path of a table -> its format.
        """
        if any(isinstance(parse(text), normal_float.Format) for text in formats.values()):
            _ = self.statistics

    def _collect(self) -> dict[str, dict[str, Any]]:
        assert self.calibration is not None
        clock = Clock(self.progress)
        few = dataclasses.replace(self.calibration, folds=None).spread(WINDOWS)
        few = dataclasses.replace(few, batch_size=half_batch(few))
        ends = Ends(self.source.config, self.source.non_block_params())
        gradient_statistics(self.source, few, _NOTHING, clock, ends=ends)
        self._took(sum(clock.seconds.values()))
        return to_host(ends.statistics(), few.mesh)

    def _took(self, seconds: float) -> None:
        self.seconds["tables"] = self.seconds.get("tables", 0.0) + seconds

    def matrix(self, path: str) -> tuple[Any, Weights]:
        """Returns a table as a float32 kernel ``[in, out]`` on the device, and its error weights.

        Args:
          path: path of the table.
        """
        kernel = on_device(np.asarray(as_kernel(path, self.leaves[path]), np.float32))
        stats = self.statistics[path]
        return kernel, matrix_weights(kernel, stats, feedback=self.feedback and bool(stats))

    def options(self, form: str | None, formats: Sequence[normal_float.Format]) -> dict[str, Table]:
        """Returns path -> what a budget may choose for a table.

        Args:
          form: the only choice for all tables; None: any of ``formats`` and dense.
          formats: NormalFloat formats to choose from.
        """
        if form is None:
            return {path: self.candidates(path, formats) for path in self.leaves}
        parsed = parse(form)
        named = isinstance(parsed, str)
        only = Candidate(None if named else parsed, None, parsed if named else None)
        return {path: Table.pareto([(0, 0.0, only)]) for path in self.leaves}

    def candidates(self, path: str, formats: Sequence[normal_float.Format]) -> Table:
        """Returns the formats that a budget may choose for a table, with predicted errors.

        Args:
          path: path of the table.
          formats: NormalFloat formats to choose from.
        """
        names = list(map(str, formats))
        key = f"tables/{digest(path, names, str(self.leaves[path].dtype), self.feedback)}"
        rows = get_or_compute(self.store, key, lambda: self._candidates(path, formats).rows())
        return Table.parse(rows)

    def _candidates(self, path: str, formats: Sequence[normal_float.Format]) -> Table:
        _ = self.statistics  # has seconds of its own
        start = time.perf_counter()
        kernel, weights = self.matrix(path)
        rows = candidate_rows("nf", None, formats, kernel, weights, None, None)
        leaf = self.leaves[path]
        if leaf.dtype.itemsize > np.dtype(SMALLER).itemsize:
            small = on_device(np.asarray(cast(kernel, SMALLER), np.float32))
            error = float(weights.weighted_error(kernel - small))
            if np.isfinite(error):
                rows.append((leaf.size * 2, error, Candidate(None, None, SMALLER)))
        rows.append((leaf.size * leaf.dtype.itemsize, 0.0, Candidate(None, None)))
        self._took(time.perf_counter() - start)
        return Table.pareto(rows)

    def stored(
        self, rest: Mapping[str, Any], formats: Mapping[str, str]
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Returns the parameters outside the blocks with tables in some formats, and a report.

        Args:
          rest: parameters outside the blocks, as they are stored otherwise.
          formats: path of a table -> its format; other tables stay.

        Returns:
          The parameters; path of a table -> format, bytes and relative errors.

        Raises:
          ValueError: if there is no such table, or a format is unknown.
        """
        if not formats:
            return dict(rest), {}
        if wrong := sorted(formats.keys() - self.leaves.keys()):
            raise ValueError(
                f"the plan does not fit the model: {', '.join(wrong)} is none of its tables "
                f"{', '.join(self.leaves)}"
            )
        made = {path: self._stored(path, text) for path, text in formats.items()}
        layers = {path: report for path, (_, report) in made.items()}
        return trees.update(dict(rest), {path: new for path, (new, _) in made.items()}), layers

    def _stored(self, path: str, text: str) -> tuple[Any, dict[str, Any]]:
        """Returns a table as it is stored in a format, and its report."""
        form, leaf = parse(text), np.asarray(self.leaves[path])
        if isinstance(form, str):
            with np.errstate(over="ignore"):  # the caller checks that all numbers are finite
                new = cast(leaf, form) if path == HEAD else smaller_table(leaf, form)
            return new, {"format": form, "rank": None, "bytes": nbytes(new)}
        kernel, weights = self.matrix(path)
        candidate = Candidate(form, None)
        new = stored_directly(candidate, kernel, weights, None, None, width=1)
        report = layer_summary(candidate, kernel, weights, new)
        return new if path == HEAD else quantized_table(new, leaf.dtype), report
