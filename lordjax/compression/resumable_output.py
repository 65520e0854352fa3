"""A model directory that is written step by step and resumed after a killed run.

::

    OUT.partial/           a `DiskStore`: statistics, factors, hidden states, the plan
    OUT.partial/model/     the unfinished directory: one file per finished block
    OUT.partial/draft/     with distillation, the blocks before it
    OUT.partial/distill/   with distillation, its checkpoints and metrics
    OUT                    appears, whole, when all is done; then OUT.partial is removed

    with Output("small", identity) as output:
        result = compress(source, tokens, keep=0.7, work=output.store, into=output.shards)
        output.finish(result, hf_config=hf_config)

With several processes (`multihost`), process 0 writes the model and process k keeps its
intermediate results in OUT.partial.k. On resume, a result counts only if every process has it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lordjax.allocation.plan import Plan
from lordjax.calibration.statistics import AbsMean, HeadMoments, MeanSquare, Moments, SecondMoment
from lordjax.compression.result import Result
from lordjax.conversions.families.config.resize import resized
from lordjax.methods import METHODS, Factors, ModuleFactors
from lordjax.runtime import multihost, unfinished
from lordjax.storage import atomic_directory, checkpoint
from lordjax.storage.disk_store import DiskStore, differences
from lordjax.storage.room import RESERVE, naming_room
from lordjax.storage.shards import Shards, names
from lordjax.storage.store import Store

# Dataclasses that intermediate results may hold, by their names in files.
TYPES = {
    kind.__name__: kind
    for kind in (
        *(Factors, ModuleFactors, Plan),
        *(AbsMean, HeadMoments, MeanSquare, Moments, SecondMoment),
    )
}

PARTIAL = ".partial"  # suffix of the directory of the intermediate results
FINISHED = "finished"  # entry: the directory is complete, and may have its final name already


def partial(directory: str | os.PathLike[str], process: int = 0) -> Path:
    """Returns the directory where a process keeps its intermediate results for a model."""
    directory = Path(directory).resolve()
    return directory.with_name(directory.name + PARTIAL + (f".{process}" if process else ""))


def described(result: Result, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ``config.json`` of a result: the original one, with the sizes that changed.

    Args:
      result: the compressed model.
      hf_config: ``config.json`` of the original model.

    Raises:
      ValueError: if the family's config cannot describe the new sizes.
    """
    method = METHODS.get(result.plan.method)
    stock = method is not None and method.stock
    return resized(hf_config, result.config) if stock else dict(hf_config)


class Unwritten:
    """Stands in for `Shards` in a process that writes no model: notes only what is finished."""

    def __init__(self, store: Store):
        self._store = store

    def __contains__(self, name: str) -> bool:
        return f"parts/{name}" in self._store

    def __setitem__(self, name: str, tree: Any) -> None:
        self._store[f"parts/{name}"] = True


class Output:
    """A model directory that is being written, and can be resumed.

    Args:
      directory: directory of the model; must be free.
      identity: JSON of all inputs and options. A run is resumed only if they are the same.

    Attributes:
      store: where finished work is kept; the ``work`` of `prepare` and `compress`.
      shards: where finished parts of the model go; the ``into`` of `compress`.
      resumed: whether an earlier run left some work.
      finished: the ``summary`` that an earlier run gave to `finish` before it was killed, else
        None.

    Raises:
      BlockingIOError: if another process works on the same directory.
      FileExistsError: if the directory is not free.
      ValueError: if the work of an earlier run is damaged or has another identity, or the processes
        differ in theirs; says in what.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: Mapping[str, Any]):
        self.directory = Path(directory).resolve()
        own = partial(directory, multihost.process_index())
        if multihost.is_primary() and not own.exists():
            atomic_directory.check_destination(directory)
        self.store = DiskStore(own, identity, TYPES)
        unfinished.begin(own, self._leave)
        self._stage = self.store.directory / "model"
        try:
            self.finished = self._agree(identity)
            if multihost.is_primary() and self.finished is None:
                atomic_directory.check_destination(directory)
                self._stage.mkdir(exist_ok=True)
        except BaseException:
            self._leave()
            raise
        self.shards = (
            Shards(self._stage, self.store) if multihost.is_primary() else Unwritten(self.store)
        )
        self.resumed = not self.store.empty

    @property
    def training(self) -> Path:
        """Directory of the run that distills the model of `draft`."""
        return self.store.directory / "distill"

    def draft(self) -> Shards:
        """Returns where the parts of a model go that is distilled before it is written."""
        directory = self.store.directory / "draft"
        directory.mkdir(exist_ok=True)
        return Shards(directory, self.store, prefix="draft")

    def _agree(self, identity: Mapping[str, Any]) -> Any:
        """Discards results that some process lacks; returns the summary that process 0 finished."""
        keys = self.store.below("")
        told = multihost.all_gather_json(
            [identity, keys, self.store[FINISHED] if FINISHED in keys else None]
        )
        for k, (other, _, _) in enumerate(told):
            changes = list(differences(told[0][0], other))
            if changes:
                raise ValueError(
                    f"process {k} was given something else: {'; '.join(changes)}; start all "
                    "processes with the same command"
                )
        finished = told[0][2]
        if finished is None:
            common = set.intersection(*(set(keys) for _, keys, _ in told))
            self.store.discard(*(key for key in self.store.below("") if key not in common))
        return finished

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        # The same command would end in the same error, so there is nothing to resume.
        useless = kind is not None and issubclass(kind, (ValueError, KeyError))
        if useless and not self.resumed and self.store.open:
            self.store.remove()
        unfinished.tell(error, self._leave())

    def file_bytes(self) -> int | None:
        """Returns the bytes of the files with weights; None in a process that writes no model."""
        return self.shards.file_bytes() if isinstance(self.shards, Shards) else None

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
        """Completes the directory and gives it its final name.

        Args:
          result: result whose parts are in ``shards``.
          hf_config: the original ``config.json``; sizes that the result changed are replaced.
          report: report to write; None: the result's own.
          write_tokenizer: see `checkpoint.save`.
          also: called with the directory when everything else is in it, to put more files into it
            (`elastic.keep_entries`).
          summary: JSON for `finished`, should the process be killed after this.

        Raises:
          FileExistsError: if the directory is no longer free.
          ValueError: if a file that an earlier run wrote is damaged.
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
        """Writes the files beside the shards."""
        assert isinstance(self.shards, Shards)
        with naming_room(self.directory, RESERVE):
            checkpoint.write_about(
                self._stage,
                self.shards.finish(names(result.config)),
                result.config,
                hf_config=described(result, hf_config),
                plan=result.plan,
                report=result.report if report is None else report,
                write_tokenizer=write_tokenizer,
                also=also,
            )

    def publish(self) -> None:
        """Gives the finished directory its final name and removes the intermediate results.

        Process 0 comes last: as long as its results are there, a new run sees that all is finished.
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
        # Removing large files takes a while, in which a new run must see that all is finished.
        self.store.discard(*(key for key in self.store.below("") if key != FINISHED))
        self.store.remove()

    def _leave(self) -> str | None:
        """Closes the store; removes its directory if nothing is finished, else says where it is."""
        unfinished.end(self.store.directory)
        if self.store.open and self.store.empty:
            self.store.remove()
        self.store.close()
        if not self.store.directory.exists():
            return None
        return f"finished work is kept in {self.store.directory}"
