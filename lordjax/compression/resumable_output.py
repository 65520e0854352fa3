"""A model directory that is made step by step, and goes on where a killed process left it.

::

    OUT.partial/           a `workspace.Workspace`: statistics, factors, hidden states, the plan
    OUT.partial/model/     the directory to be: a file per finished block
    OUT                    appears, whole, when all is done; then OUT.partial goes

    with Output("small", identity) as output:
        result = compress(source, tokens, keep=0.7, work=output.work, into=output.shards)
        output.finish(result, hf_config=hf_config)

Of several processes (`hosts`) the first one writes the model, number k keeps its own work in
OUT.partial.k. What not all of them have finished none has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lordjax.allocation.plan import Plan
from lordjax.calibration.statistics import AbsMean, HeadMoments, MeanSquare, Moments, SecondMoment
from lordjax.compression.result import Result
from lordjax.methods import Factors, ModuleFactors
from lordjax.runtime import multihost
from lordjax.storage import atomic_directory, checkpoint
from lordjax.storage.disk_store import DiskStore, differences
from lordjax.storage.shards import REST, Shards
from lordjax.storage.store import Store

# Dataclasses that intermediate results consist of, by their names in files.
TYPES = {
    kind.__name__: kind
    for kind in (
        *(Factors, ModuleFactors, Plan),
        *(AbsMean, HeadMoments, MeanSquare, Moments, SecondMoment),
    )
}

PARTIAL = ".partial"  # ends the name of the directory where the work is kept
FINISHED = "finished"  # entry: the directory is complete, and may have its name already


def partial(directory: str | os.PathLike[str], process: int = 0) -> Path:
    """Where the work of a process towards a model directory is kept."""
    directory = Path(directory).resolve()
    return directory.with_name(directory.name + PARTIAL + (f".{process}" if process else ""))


class Unwritten:
    """In place of `Parts` in a process that writes no model."""

    def __init__(self, store: Store):
        self._work = store

    def __contains__(self, name: str) -> bool:
        return f"parts/{name}" in self._work

    def __setitem__(self, name: str, tree: Any) -> None:
        self._work[f"parts/{name}"] = True


class Output:
    """A model directory in the making.

    Args:
      directory: of the model; must be free.
      identity: JSON that says what is made of what. Work that was left is taken up only if it was
        begun with the same.

    Attributes:
      store: where finished work is kept.
      parts: where finished parts of the model go.
      resumed: whether some work was left.
      finished: what `finish` was given as ``summary`` by a process that was killed after it.

    Raises:
      BlockingIOError: if another process works towards the same directory.
      FileExistsError: if the directory is not free.
      ValueError: if work was left that was begun with something else, or is damaged, or processes
        do not make the same of the same; says what.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: Mapping[str, Any]):
        self.directory = Path(directory).resolve()
        own = partial(directory, multihost.process())
        if multihost.is_primary() and not own.exists():
            atomic_directory.check_destination(directory)
        self.store = DiskStore(own, identity, TYPES)
        self._stage = self.store.directory / "model"
        try:
            self.finished = self._agree(identity)
            if multihost.is_primary() and self.finished is None:
                atomic_directory.check_destination(directory)
                self._stage.mkdir(exist_ok=True)
        except (OSError, ValueError):
            self._leave()
            raise
        self.shards = (
            Shards(self._stage, self.store) if multihost.is_primary() else Unwritten(self.store)
        )
        self.resumed = not self.store.empty

    def _agree(self, identity: Mapping[str, Any]) -> Any:
        """Forgets what not all processes have finished; returns what the first one finished."""
        keys = self.store.below("")
        told = multihost.all_gather_json(
            [identity, keys, self.store[FINISHED] if FINISHED in keys else None]
        )
        for k, (other, _, _) in enumerate(told):
            changes = list(differences(told[0][0], other))
            if changes:
                raise ValueError(f"process {k} was given something else: {'; '.join(changes)}")
        finished = told[0][2]
        if finished is None:
            common = set.intersection(*(set(keys) for _, keys, _ in told))
            self.store.discard(*(key for key in self.store.below("") if key not in common))
        return finished

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The same command would come to the same error: nothing is left to go on with.
        useless = kind is not None and issubclass(kind, (ValueError, KeyError))
        if useless and not self.resumed and self.store.open:
            self.store.remove()
        self._leave()

    def finish(
        self,
        result: Result,
        *,
        hf_config: Mapping[str, Any],
        report: Mapping[str, Any] | None = None,
        write_tokenizer: Callable[[Path], Any] | None = None,
        also: Callable[[Path], Any] | None = None,
        summary: Any = True,
    ) -> None:
        """Completes the directory and gives it its name.

        Args:
          result: whose parts are in ``parts``.
          hf_config: the original ``config.json``.
          report: in place of the result's.
          write_tokenizer: see `checkpoint.save`.
          also: called with the directory when everything else is in it, to put more into it
            (`elastic.keep_entries`).
          summary: JSON for `finished`.

        Raises:
          FileExistsError: if the directory is no longer free.
          ValueError: if a file that an earlier process wrote is damaged.
        """
        if multihost.is_primary():
            self._complete(result, hf_config, report, write_tokenizer, also)
            self.store[FINISHED] = summary
        multihost.barrier()
        self.publish()

    def _complete(
        self,
        result: Result,
        hf_config: Mapping[str, Any],
        report: Mapping[str, Any] | None,
        write_tokenizer: Callable[[Path], Any] | None,
        also: Callable[[Path], Any] | None,
    ) -> None:
        assert isinstance(self.shards, Shards)
        names = [REST, *(f"layer_{i}" for i in range(result.config.num_layers))]
        checkpoint.write_about(
            self._stage,
            self.shards.finish(names),
            result.config,
            hf_config=hf_config,
            plan=result.plan,
            report=result.report if report is None else report,
            write_tokenizer=write_tokenizer,
            also=also,
        )

    def publish(self) -> None:
        """Gives the finished directory its name, unless it has it, and removes the work.

        The first process comes last: as long as its work is there, it is seen to be finished.
        """
        if not multihost.is_primary():
            self.store.remove()
            multihost.barrier()
            return
        multihost.barrier()
        if self._stage.exists():
            atomic_directory.publish(
                self._stage, atomic_directory.check_destination(self.directory)
            )
        # Large files take a while to go; until they have, the work must be seen to be finished.
        self.store.discard(*(key for key in self.store.below("") if key != FINISHED))
        self.store.remove()

    def _leave(self) -> None:
        """Keeps what is finished, and no directory without any."""
        if self.store.open and self.store.empty:
            self.store.remove()
        self.store.close()
