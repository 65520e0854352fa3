"""Checkpoints of a fine-tuning run, each with checksums of its files.

Orbax writes and reads them. It notices some damage of its own files, but not a changed number in an
array. So the files are checked before Orbax opens them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from lordjax.finetune.step import State
from lordjax.runtime.input_files import reading
from lordjax.runtime.orbax_log import unlogged
from lordjax.storage.checksums import MANIFEST, Manifest
from lordjax.storage.room import remove_tree
from lordjax.storage.tensor_files import write_json

# What a checkpoint says about itself: nats per target, and the fewest that there were until then.
NLL, LEAST = "nll", "least"
_REMOVED = "removed"  # directory of checkpoints that are not kept, beside the others


class CheckpointStore:
    """The checkpoints of a run.

    Args:
      directory: their directory; is created, or opened with the checkpoints it has.
      last: number of latest checkpoints that are kept besides the best one.

    Raises:
      ValueError: if a checkpoint is damaged, or the best one is missing.
    """

    def __init__(self, directory: Path, last: int):
        def nll(metrics: Any) -> float:
            return metrics[NLL]

        best = BestN(get_metric_fn=nll, reverse=True, n=1)
        options = ocp.CheckpointManagerOptions(
            best_fn=nll,  # without it Orbax writes no metrics
            best_mode="min",
            preservation_policy=AnyPreservationPolicy([best, LatestN(last)]),
            enable_async_checkpointing=False,  # the process may be killed at any moment
            cleanup_tmp_directories=True,
            todelete_subdir=_REMOVED,  # renamed at once, so that no number stands for a rest
        )
        self._directory = directory.absolute()
        self._remedy = f"remove {directory.parent} to start over"
        remove_tree(self._directory / _REMOVED)
        for found in self._directory.glob("[0-9]*"):
            if found.name.isdigit():
                self._check(found)
        with reading(directory, "the checkpoints cannot be opened", self._remedy):
            self._manager = ocp.CheckpointManager(self._directory, options=options)
            counts = self._manager.all_steps()
            self._facts = {count: dict(self._manager.metrics(count) or {}) for count in counts}
            self._check_best()

    def _check(self, checkpoint: Path) -> None:
        """Compares the files of a checkpoint with their checksums.

        One without checksums is of an older version, or its process was killed before it wrote
        them; then they are written now, since Orbax gives a checkpoint its name when it is whole.
        """
        if not (checkpoint / MANIFEST).exists():
            write_json(checkpoint / MANIFEST, Manifest.of(checkpoint, {}).to_json())
            return
        advice = f"remove {checkpoint} to go on from an earlier checkpoint, or {self._remedy}"
        with reading(checkpoint, "damaged checkpoint", advice):
            Manifest.read(checkpoint, advice).check_files()

    def _check_best(self) -> None:
        """Raises ValueError if the best checkpoint, which is never removed, is missing."""
        steps = self.steps()
        least = self._facts[max(steps)].get(LEAST) if steps else None
        if least is not None and min(steps.values()) > least:
            raise ValueError(f"the best one, of {least} nats per target, is missing")

    def save(self, state: State, nll: float) -> None:
        """Writes a state; ``nll``, in nats per target, decides which checkpoint is the best."""
        count, before = int(state.step), self.steps()
        facts = {NLL: nll, LEAST: min([nll, *before.values()])}
        with unlogged():
            self._manager.save(count, args=ocp.args.StandardSave(_named(state)), metrics=facts)
        self._check(self._directory / str(count))
        remove_tree(self._directory / _REMOVED)
        there = self._manager.all_steps()
        self._facts = {k: v for k, v in {**self._facts, count: facts}.items() if k in there}

    def steps(self) -> dict[int, float]:
        """Returns the nats per target of every checkpoint, by its number of steps."""
        return {count: facts[NLL] for count, facts in self._facts.items()}

    def best(self) -> int:
        """Returns the step count of the checkpoint with the fewest nats; on a tie the earliest."""
        steps = self.steps()
        return min(steps, key=lambda count: (steps[count], count))

    def restore(self, template: State, count: int) -> State:
        """Returns the state after ``count`` steps, with the shapes and placement of a template.

        Raises:
          ValueError: if the checkpoint is damaged, or belongs to another model.
        """
        leaves, where = _named(template), self._directory / str(count)
        with reading(where, "damaged checkpoint", self._remedy):
            found = self._manager.restore(count, args=ocp.args.StandardRestore(leaves))
            state = jax.tree.unflatten(jax.tree.structure(template), [found[k] for k in leaves])
            if int(state.step) != count:
                raise ValueError(f"it holds the state after {int(state.step)} steps")
            return state

    def close(self) -> None:
        """Closes Orbax's checkpoint manager."""
        self._manager.close()


def _named(state: State) -> dict[str, Any]:
    """Returns the arrays of a state by name; Orbax cannot store kernels with missing fields."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {f"{i:05d}{jax.tree_util.keystr(keys)}": leaf for i, (keys, leaf) in enumerate(leaves)}
