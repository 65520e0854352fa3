"""A fine-tuning run on disk: checkpoints, metrics, and resuming after a crash.

A run's directory::

    lock               locked while a process trains here
    run.json           settings, recipe, data and model; a resumed run must have the same
    metrics.jsonl      a line per step, and per validation on the held-out examples
    checkpoints/N/     Orbax: the state after N steps (trained arrays, optimizer, step count)

A checkpoint appears whole or not at all. The examples of a step are a function of its number. A
resumed run therefore repeats the steps after the last checkpoint exactly; their metrics are written
again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lordjax.data.examples import Data, Examples
from lordjax.finetune import step
from lordjax.finetune.checkpoints import CheckpointStore
from lordjax.finetune.recipes import Recipe
from lordjax.finetune.run_directory import CHECKPOINTS, claimed
from lordjax.finetune.step import Settings, State
from lordjax.kernels import trees
from lordjax.kernels.base import nbytes
from lordjax.kernels.kinds import astype
from lordjax.models.config import ModelConfig
from lordjax.runtime import json_files
from lordjax.runtime.input_files import parse_json, reading, size_of
from lordjax.runtime.mesh import Mesh
from lordjax.storage.tensor_files import write_text

METRICS = "metrics.jsonl"
Report = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class CheckpointPolicy:
    """When a run validates and writes checkpoints, and how many it keeps.

    Attributes:
      every: steps between checkpoints; each state is validated before it is written.
      last: number of latest checkpoints that are kept besides the best one.
    """

    every: int = 50
    last: int = 2


@dataclasses.dataclass
class Trained:
    """The result of a fine-tuning run.

    Attributes:
      params: the best model's parameters; adapters are not merged.
      best: number of steps of the best checkpoint, judged on the held-out examples.
      history: the lines of ``metrics.jsonl``.
    """

    params: Any
    best: int
    history: list[dict[str, Any]]


def train(
    config: ModelConfig,
    params: Any,
    data: Data,
    recipe: Recipe,
    settings: Settings,
    directory: Path,
    *,
    about: Mapping[str, Any],
    keeping: CheckpointPolicy = CheckpointPolicy(),
    resume: bool = False,
    teacher: Any = None,
    mesh: Mesh | None = None,
    report: Report | None = None,
) -> Trained:
    """Fine-tunes a model. A run that was killed and resumed gives the same bits.

    Args:
      config: the model's architecture.
      params: the model's parameters; leaves may be kernels of any kind.
      data: training examples, and held-out examples that choose the best checkpoint.
      recipe: what is trained, and how.
      settings: settings of the run.
      directory: the run's directory; must be new or empty, or with ``resume`` hold the same run.
      about: JSON that a resumed run must share, such as names of the model and its data.
      keeping: when to validate, and which checkpoints to keep.
      resume: whether to go on after the last checkpoint, if there is one.
      teacher: parameters of a model of the same architecture, to distill from.
      mesh: devices that share the work; None uses one device.
      report: called with every line of the metrics.

    Returns:
      The parameters of the best checkpoint, and the metrics.

    Raises:
      FileExistsError: if the directory is not free.
      KeyError: if the model has no array that the recipe trains.
      ValueError: if a setting is out of range, the directory holds a run with other settings (names
        them), or a loss is not finite.
    """
    settings.check()
    prepared = step.prepare_training(config, params, recipe, settings)
    params, paths, state, frozen, optimizer = prepared
    own = {"recipe": recipe, "settings": settings, "keeping": keeping}
    about = {**about, **{name: dataclasses.asdict(value) for name, value in own.items()}}
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    validate = functools.partial(_validate, config, frozen, data.validation, settings)
    need = (keeping.last + 2) * nbytes(state)  # besides: the best one, and an unfinished one
    with (
        claimed(directory, resume, about, need),
        opened(directory, keeping.last, state, report) as (checkpoints, log, state),
    ):
        if not int(state.step):
            log.write(step=0, **validate(state))
        steps = step.run(
            config, state, frozen, data.train, optimizer, settings, teacher=teacher, mesh=mesh
        )
        _record(steps, checkpoints, log, validate, lambda k: _is_due(k, keeping, settings))
        state = checkpoints.restore(template, best := checkpoints.best())
    return Trained(step.with_trained(state.params, params, paths), best, log.lines)


@contextlib.contextmanager
def opened(
    directory: Path, last: int, state: State, report: Report | None
) -> Iterator[tuple[CheckpointStore, Log, State]]:
    """Opens the checkpoints and metrics of a run; also yields the state of the last checkpoint."""
    with contextlib.closing(CheckpointStore(directory / CHECKPOINTS, last)) as checkpoints:
        if done := checkpoints.steps():
            template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = checkpoints.restore(template, max(done))
        with contextlib.closing(Log(directory / METRICS, int(state.step), report)) as log:
            yield checkpoints, log, state


def _is_due(count: int, policy: CheckpointPolicy, settings: Settings) -> bool:
    """Whether a checkpoint is written after ``count`` steps."""
    return count % policy.every == 0 or count == settings.steps


def _record(
    steps: Iterator[tuple[State, dict[str, float]]],
    checkpoints: CheckpointStore,
    log: Log,
    validate: Callable[[State], dict[str, float]],
    is_due: Callable[[int], bool],
) -> None:
    """Runs the steps, logs each one, and validates and writes a checkpoint where one is due."""
    start = time.perf_counter()
    for state, metrics in steps:
        count, now = int(state.step), time.perf_counter()
        log.write(step=count, **metrics, seconds=now - start)
        if is_due(count):
            found = validate(state)
            if found:  # before the checkpoint: a run that goes on after it never writes this line
                log.write(step=count, **found)
            judged = found.get("objective", found.get("validation", metrics["nll"]))
            checkpoints.save(state, judged)
        start = time.perf_counter()


def _validate(
    config: ModelConfig, frozen: Any, examples: Examples, settings: Settings, state: State
) -> dict[str, float]:
    """Returns ``validation``, the nats per held-out target; empty if no example is held out.

    With a teacher's predictions in the examples, ``objective`` is the loss that is trained.
    """
    if not examples.size:
        return {}
    is_taught = examples.top_ids is not None
    batch = min(settings.batch // settings.micro_batches, examples.size)
    own = {"batch": batch, "dtype": settings.dtype, "distill": settings.distill * is_taught}
    nll, mixed = mean_losses(config, state, frozen, examples, **own)
    return {"validation": nll} | ({"objective": mixed} if is_taught else {})


@functools.partial(jax.jit, static_argnames=("config", "dtype", "distill"))
def _evaluate(
    trained: Any, frozen: Any, batch: Examples, *, config: ModelConfig, dtype: str, distill: float
) -> Any:
    params = astype(trees.combine(trained, frozen), dtype)
    return step.target_losses(config, params, batch, distill=distill)


def evaluate(
    config: ModelConfig, state: State, frozen: Any, examples: Examples, *, batch: int, dtype: str
) -> float:
    """Returns the nats per target of all examples, computed in ``dtype``."""
    return mean_losses(config, state, frozen, examples, batch=batch, dtype=dtype)[0]


def mean_losses(
    config: ModelConfig,
    state: State,
    frozen: Any,
    examples: Examples,
    *,
    batch: int,
    dtype: str,
    distill: float = 0.0,
) -> tuple[float, float]:
    """Returns the nats and the training loss of all examples, both per target.

    Args:
      config: the model's architecture.
      state: the training state; only its parameters are read.
      frozen: the frozen parameters.
      examples: the examples.
      batch: examples that are computed at once.
      dtype: computing dtype.
      distill: weight of the divergence from the teacher's predictions in the examples.
    """
    totals, targets, count = np.zeros(2), 0, examples.size
    for first in range(0, count, batch):
        # Pad the last batch: another shape would be compiled again.
        rows = np.arange(first, first + batch)
        part = examples.rows(np.minimum(rows, count - 1))
        own = {"config": config, "dtype": dtype, "distill": distill}
        found = _evaluate(state.params, frozen, part, **own)
        totals += [np.asarray(each, np.float64)[rows < count].sum() for each in found]
        targets += int((part.targets[rows < count] >= 0).sum())
    nll, mixed = (totals / max(targets, 1)).tolist()
    return nll, mixed


class Log:
    """Lines of metrics, in memory and in a file that a resumed run continues."""

    def __init__(self, path: Path, step: int, report: Report | None):
        self._report = report
        # The last line may be cut off. What comes after the checkpoint is run again; without one,
        # that is everything.
        with reading(path, "no lines of metrics", "remove it; the checkpoints do not need it"):
            there = path.exists() and size_of(path)
            text = path.read_text("utf-8", "replace") if there else ""
            whole = [parse_json(line, str(path)) for line in text.split("\n")[:-1]]
            self.lines = [line for line in whole if line["step"] <= step] if step else []
        write_text(path, "".join(json_files.dumps_measured(line) + "\n" for line in self.lines))
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def write(self, **line: Any) -> None:
        """Appends a line to the file, and reports it."""
        self.lines.append(line)
        self._file.write(json_files.dumps_measured(line) + "\n")
        if self._report is not None:
            self._report(line)
