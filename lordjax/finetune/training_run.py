"""A run of fine-tuning on disk: checkpoints, metrics, and going on after the process was killed.

A run's directory::

    run.json           settings, recipe, data, model: a resumed run must have the same
    metrics.jsonl      a line per step, and per measurement on the held-out examples
    checkpoints/N/     Orbax: the state after N steps (trained arrays, optimiser, number of steps)

A checkpoint appears whole or not at all. The rows of a step follow from its number, so a resumed
run repeats the steps behind the last checkpoint exactly; their lines are written anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from lordjax.data.examples import Data, Examples
from lordjax.finetune import step as finetune
from lordjax.finetune.recipes import Recipe
from lordjax.finetune.step import Settings, State
from lordjax.models.config import ModelConfig
from lordjax.runtime.mesh import Mesh

METRICS = "metrics.jsonl"
Report = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Keeping:
    """What a run measures and keeps, and when.

    Attributes:
      every: steps between checkpoints; each is measured on the held-out examples first.
      last: checkpoints that are kept besides the best.
    """

    every: int = 50
    last: int = 2


class _Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, directory: Path, keeping: Keeping):
        def nll(metrics: Any) -> float:
            return metrics["nll"]

        best = BestN(get_metric_fn=nll, reverse=True, n=1)
        options = ocp.CheckpointManagerOptions(
            best_fn=nll,  # without it no metrics are written
            best_mode="min",
            preservation_policy=AnyPreservationPolicy([best, LatestN(keeping.last)]),
            enable_async_checkpointing=False,  # a run may be killed at any moment
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, state: State, nll: float) -> None:
        """Writes the state after its step; ``nll`` decides which is the best."""
        leaves = _named(state)
        self._manager.save(
            int(state.step), args=ocp.args.StandardSave(leaves), metrics={"nll": nll}
        )

    def steps(self) -> dict[int, float]:
        """Number of steps of every checkpoint -> its nats."""
        found = ((step, self._manager.metrics(step)) for step in self._manager.all_steps())
        return {step: metrics["nll"] for step, metrics in found if metrics is not None}

    def restore(self, template: State, step: int) -> State:
        """The state after a step; the template's shapes say what it is and where it lies."""
        leaves = _named(template)
        found = self._manager.restore(step, args=ocp.args.StandardRestore(leaves))
        return jax.tree.unflatten(jax.tree.structure(template), [found[name] for name in leaves])

    def close(self) -> None:
        """Lets go of the directory."""
        self._manager.close()


def _named(state: State) -> dict[str, Any]:
    """Arrays by name; Orbax knows nothing of kernels with holes."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {f"{i:05d}{jax.tree_util.keystr(keys)}": leaf for i, (keys, leaf) in enumerate(leaves)}


@dataclasses.dataclass
class Trained:
    """What a run made.

    Attributes:
      params: the model, adapters beside their bases.
      best: number of steps after which it was best on the held-out examples; that is ``params``.
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
    keeping: Keeping = Keeping(),
    resume: bool = False,
    teacher: Any = None,
    mesh: Mesh | None = None,
    report: Report | None = None,
) -> Trained:
    """Fine-tunes a model; killed and resumed, it gives the same to the bit.

    Args:
      config: the model.
      params: its parameters; kernels may be of any kind.
      data: examples, and those that are held out, on which the best state is chosen.
      recipe: what is trained.
      settings: of the run.
      directory: of the run; must be new or empty, or with ``resume`` that of the same run.
      about: JSON that a resumed run must share, such as the model and its data.
      keeping: when to measure and what to keep.
      resume: go on after the last checkpoint, if there is one.
      teacher: parameters to distil from.
      mesh: devices that share the work; None: the first alone.
      report: called with every line of the metrics.

    Raises:
      FileExistsError: if the directory is not free.
      KeyError: if the model has nothing of what the recipe trains.
      ValueError: if a setting is out of range, a resumed run is another one (names the difference),
        or a loss is not finite.
    """
    settings.check()
    params, paths, state, frozen, optimizer = finetune.begin(config, params, recipe, settings)
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    parts = {"recipe": recipe, "settings": settings, "keeping": keeping}
    _claim(directory, resume, {**about, **{k: dataclasses.asdict(v) for k, v in parts.items()}})
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(
            contextlib.closing(_Checkpoints(directory / "checkpoints", keeping))
        )
        done = store.steps()
        if done:
            state = store.restore(template, max(done))
        log = Log(directory / METRICS, int(state.step), report)
        stack.callback(log.close)
        measure = functools.partial(_held_out, config, frozen, data.validation, settings)
        if not done:
            log.write(step=0, **measure(state))
        start = time.perf_counter()
        steps = finetune.run(
            config, state, frozen, data.train, optimizer, settings, teacher=teacher, mesh=mesh
        )
        for new, metrics in steps:
            step, now = int(new.step), time.perf_counter()
            log.write(step=step, **metrics, seconds=now - start)
            if step % keeping.every == 0 or step == settings.steps:
                found = measure(new)
                store.save(new, found.get("validation", metrics["nll"]))
                if found:
                    log.write(step=step, **found)
            start = time.perf_counter()
        done = store.steps()
        best = min(done, key=lambda step: (done[step], step))
        state = store.restore(template, best)
    return Trained(finetune.joined(state.params, params, paths), best, log.lines)


def _held_out(
    config: ModelConfig, frozen: Any, examples: Examples, settings: Settings, state: State
) -> dict[str, float]:
    """``validation``: nats per target; nothing if no example is held out."""
    if not examples.size:
        return {}
    batch = min(settings.batch // settings.micro_batches, examples.size)
    own = {"batch": batch, "dtype": settings.dtype}
    return {"validation": finetune.evaluate(config, state, frozen, examples, **own)}


class Log:
    """Lines of metrics, in memory and in a file that a resumed run goes on with."""

    def __init__(self, path: Path, step: int, report: Report | None):
        self._report = report
        text = path.read_text() if path.exists() else ""
        # The last line may be cut off; steps behind the checkpoint are done again.
        whole = [json.loads(line) for line in text.split("\n")[:-1]]
        self.lines = [line for line in whole if line["step"] <= step]
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        os.replace(fresh, path)
        self._file = path.open("a", buffering=1)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def write(self, **line: Any) -> None:
        """Adds a line."""
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        if self._report is not None:
            self._report(line)


def _claim(directory: Path, resume: bool, about: dict[str, Any]) -> None:
    """Makes a run's directory, or checks that it is this very run's."""
    path = directory / "run.json"
    about = json.loads(json.dumps(about))
    if not path.exists():
        if directory.exists() and any(directory.iterdir()):
            raise FileExistsError(
                f"{directory}: not empty, and not a run; choose another directory"
            )
        directory.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(about, indent=1) + "\n")
        os.replace(fresh, path)
        return
    if not resume:
        raise FileExistsError(f"{directory}: a run is there; go on with --resume, or remove it")
    there = json.loads(path.read_text())
    differences = _differences(there, about)
    if differences:
        raise ValueError(f"{directory}: the run there is another one: {'; '.join(differences)}")


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(set(there) | set(here))
        pairs = ((k, there.get(k), here.get(k)) for k in keys)
        return [d for k, a, b in pairs for d in _differences(a, b, f"{name}.{k}".lstrip("."))]
    return [] if there == here else [f"{name} was {there!r} and is {here!r}"]
