"""Elastic models: the dense model with a method's factors beside it, for any budget.

::

    model, config, tokenizer …    the dense model, as `checkpoint.save` writes it
    elastic/index.json            key -> file, size, checksum, or the value itself
    elastic/entries/              factors of every site at all ranks; data that allocation reads

    config, params = load("elastic", keep=0.7)

Factors are ordered, so a smaller budget is a slice of them. The result is that of a compression to
that budget, bit for bit.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lordjax.allocation.plan import Plan, SiteSize
from lordjax.allocation.policies import TILE
from lordjax.calibration.calibration_set import Calibration
from lordjax.compression.low_rank import check_method, prepare
from lordjax.compression.prepared import Prepared
from lordjax.compression.result import Result
from lordjax.compression.resumable_output import TYPES, described
from lordjax.kernels import trees
from lordjax.methods import METHODS, method_of_shape, shape_of
from lordjax.models.config import ModelConfig
from lordjax.models.source import InMemory, Materialized, Source
from lordjax.runtime.input_files import reading
from lordjax.runtime.progress import Progress
from lordjax.storage import atomic_directory, checkpoint, saved_model
from lordjax.storage.archive import DIRECTORY, FACTS, FORMAT, INDEX, REMEDY, Archive
from lordjax.storage.disk_store import DiskStore
from lordjax.storage.room import check_room
from lordjax.storage.shards import Shards, names
from lordjax.storage.store import Entries, MemoryStore
from lordjax.storage.tensor_files import write_json


def check_settings(method: str, prefix: str | None) -> None:
    """Checks that a method's factors do not depend on the budget.

    Raises:
      KeyError: if there is no such method.
      ValueError: if later factors depend on earlier ranks.
    """
    check_method(method)
    used = prefix or METHODS[method].prefix
    if used != "dense":
        raise ValueError(
            f"method {method!r} takes its statistics from the {used} blocks before, so its factors "
            "depend on the budget; an elastic model needs prefix 'dense'"
        )


def compress(
    source: Source,
    tokens: np.ndarray,
    *,
    work: DiskStore,
    into: Shards,
    method: str,
    allocation: str | None = None,
    temperature: float | None = None,
    prefix: str | None = None,
    shape: str = "free",
    cut_dtype: str | None = None,
    **options: Any,
) -> Result:
    """Factors a model for all budgets; returns the dense model, for `Output.finish`.

    Args:
      source: the model.
      tokens: calibration ids ``[sequences, length]``.
      work: where the factors are kept; `keep_entries` takes them from there.
      into: where the parts of the dense model go.
      method: a key of `METHODS`.
      allocation: allocation policy of all budgets; None: the method's own.
      temperature: temperature of ``block-influence`` for all budgets; None: every budget chooses
        its own on held-out sequences, which are kept.
      prefix: ``dense``, or None.
      shape: shapes of all budgets; see `low_rank.compress`.
      cut_dtype: dtype of the models that are cut from this one; None: that of ``source``.
      **options: keyword arguments of `prepare`.

    Raises:
      KeyError: see `check_settings` and `prepare`.
      ValueError: see `check_settings` and `prepare`.
    """
    check_settings(method, prefix)
    method = method_of_shape(method, shape)
    prepared = prepare(
        source, tokens, method=method, allocation=allocation, prefix=prefix, work=work, **options
    )
    kept, mask = prepared.calibration, prepared.calibration.mask
    work[FACTS] = {
        "method": method,
        "allocation": allocation,
        "temperature": temperature,
        "cut_dtype": cut_dtype,
        "report": prepared.report,
        "influences": prepared.influences,
        "sizes": {path: vars(size) for path, size in prepared.sizes.items()},
        "tokens": kept.tokens,
        "mask": None if mask is None else np.asarray(mask, np.uint8),
        "batch_size": kept.batch_size,
        "mask_token": kept.mask_token,
        "held_out": prepared.held_out,
        "checked": prepared.checked,
        "tile": prepared.tile,
    }
    return prepared.compress(1.0, allocation, temperature=temperature, into=into)


def keep_entries(store: DiskStore, directory: Path) -> None:
    """Puts the factors that `compress` left in ``store`` beside the dense model."""
    folder = directory / DIRECTORY
    folder.mkdir(exist_ok=True)
    rows = store.link([FACTS, *store.below("factors/")], folder)
    write_json(folder / INDEX, {"format": FORMAT, "entries": rows})


def is_elastic(directory: str | os.PathLike[str]) -> bool:
    """Returns whether a model directory can be cut to any budget."""
    return (Path(directory) / DIRECTORY / INDEX).is_file()


def check_elastic(directory: str | os.PathLike[str]) -> None:
    """Raises ValueError if a model directory cannot be cut to other budgets."""
    if not is_elastic(directory):
        raise ValueError(
            f"{directory}: has no factors beside the model, so it cannot be cut to a budget; make "
            "an elastic model with lordjax compress --elastic"
        )


def cut(
    directory: str | os.PathLike[str],
    keep: float,
    *,
    shape: str | None = None,
    into: Any = None,
    progress: Progress | None = None,
    verify: bool = True,
) -> Result:
    """Cuts an elastic model to one budget.

    Args:
      directory: elastic model, made by `compress` and `keep_entries`.
      keep: fraction of the block linear weights to keep, in (0, 1].
      shape: see `low_rank.compress`; None: that of the factors.
      into: where the parts of the model go; see `Prepared.apply`.
      progress: called with (stage, done, total).
      verify: whether checksums are checked.

    Returns:
      The model of that budget.

    Raises:
      ValueError: if the directory is not elastic, or is damaged, or ``keep`` cannot be met.
    """
    check_elastic(directory)
    with reading(directory, f"cannot be cut to {keep}", f"if that is possible at all, {REMEDY}"):
        return _cut(Path(directory), keep, shape, into, progress, verify)


def _cut(
    directory: Path,
    keep: float,
    shape: str | None,
    into: Any,
    progress: Progress | None,
    verify: bool,
) -> Result:
    archive = Archive(directory, TYPES, verify=verify)
    facts = archive[FACTS]
    own = shape_of(facts["method"])
    if shape not in (None, own):
        raise ValueError(
            f"its factors are those of {own} shapes; leave --shape out, or compress the original "
            f"model with --elastic --shape {shape}"
        )
    mask = None if facts["mask"] is None else np.asarray(facts["mask"], bool)
    prepared = Prepared(
        source=Materialized(saved_model.open_saved(directory, verify=verify)),
        calibration=Calibration(facts["tokens"], mask, facts["batch_size"], facts["mask_token"]),
        held_out=facts["held_out"],
        method=facts["method"],
        prefix="dense",
        factors=Entries(archive, "factors"),
        influences=facts["influences"],
        gradients={},
        report=facts["report"],
        sizes={path: SiteSize(**size) for path, size in facts["sizes"].items()},
        progress=progress,
        store=archive,
        checked=facts.get("checked", []),
        tile=facts.get("tile", TILE),
    )
    return prepared.compress(
        keep,
        facts["allocation"],
        temperature=facts["temperature"],
        dtype=facts.get("cut_dtype"),
        into=into,
    )


def factors_of(directory: str | os.PathLike[str], *, verify: bool = True) -> Mapping[str, Any]:
    """Site path -> factors at all ranks, of an elastic directory; read when they are asked for.

    Raises:
      ValueError: if the directory is damaged.
    """
    return Entries(Archive(Path(directory), TYPES, verify=verify), "factors")


@dataclasses.dataclass(frozen=True)
class Cut(InMemory):
    """The model of one budget, with its ``config.json``.

    Attributes:
      hf_config: the original ``config.json``, with the model's sizes.
      made: the plan.
      about: the report.
    """

    hf_config: dict[str, Any]
    made: Plan
    about: dict[str, Any]

    def plan(self) -> Plan:
        """Returns the compression plan, as `saved_model.Saved.plan` does."""
        return self.made

    def report(self) -> dict[str, Any]:
        """Returns the report, as `saved_model.Saved.report` does."""
        return self.about

    def leaves(self) -> dict[str, Any]:
        """Returns parameter path -> ``ShapeDtypeStruct``, or a kernel of them."""
        return trees.flatten(jax.eval_shape(dict, self.params))


def open_cut(
    directory: str | os.PathLike[str],
    keep: float,
    *,
    shape: str | None = None,
    verify: bool = True,
) -> Cut:
    """Cuts an elastic model to one budget, as a source to evaluate or export; see `cut`."""
    result = cut(directory, keep, shape=shape, verify=verify)
    saved = saved_model.open_saved(directory, verify=verify)
    hf_config = described(result, saved.hf_config)
    return Cut(result.config, result.params, hf_config, result.plan, _report(saved, result, keep))


def _report(saved: saved_model.Saved, result: Result, keep: float) -> dict[str, Any]:
    """Returns the report of a budget: its own, with the settings of the elastic model."""
    stored = saved.report()
    settings = dict(stored.get("settings", {}))
    settings.pop("elastic", None)
    dtype = settings.pop("cut_dtype", None)
    settings |= {"keep": keep} | ({} if dtype is None else {"dtype": dtype})
    return {**result.report, "calibration": stored.get("calibration"), "settings": settings}


def load(
    directory: str | os.PathLike[str], keep: float | None = None, *, verify: bool = True
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads a model directory.

    Args:
      directory: directory that `save` or the command line wrote.
      keep: fraction of the block linear weights to keep, in (0, 1], for an elastic model; None: the
        model as it is stored (for an elastic one, the dense model).
      verify: whether checksums are checked; everything else always is.

    Returns:
      The configuration, and the parameters as a nested dict of arrays and kernels.

    Raises:
      ValueError: if the directory is no such model or is damaged, or cannot be cut to ``keep``.
    """
    if keep is None:
        saved = saved_model.open_saved(directory, verify=verify)
        return saved.config, saved.params()
    source = open_cut(directory, keep, verify=verify)
    return source.config, dict(source.params)


def export(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    keep: float,
    *,
    shape: str | None = None,
    write_tokenizer: Callable[[Path], Any] | None = None,
    also: Callable[[Path, Mapping[str, Any]], Any] | None = None,
    progress: Progress | None = None,
    verify: bool = True,
) -> Path:
    """Writes the model of one budget as a directory of its own, a block at a time.

    Args:
      directory: elastic model.
      out: directory to write; must be free.
      keep: fraction of the block linear weights to keep, in (0, 1].
      shape: see `cut`.
      write_tokenizer: see `checkpoint.save`.
      also: called with the directory when everything else is in it, and with site path -> factors,
        to put more into it.
      progress: called with (stage, done, total).
      verify: whether checksums are checked.

    Raises:
      FileExistsError: if ``out`` is not free.
      OSError: if the disk has not enough room.
      ValueError: see `cut`.
    """
    check_elastic(directory)
    out = atomic_directory.check_destination(out)
    saved = saved_model.open_saved(directory, verify=verify)
    need = saved.file_bytes()
    check_room(out, need)
    with atomic_directory.staged(out, need) as stage:
        shards = Shards(stage, MemoryStore())
        result = cut(directory, keep, shape=shape, into=shards, progress=progress, verify=verify)
        checkpoint.write_about(
            stage,
            shards.finish(names(result.config)),
            result.config,
            hf_config=described(result, saved.hf_config),
            plan=result.plan,
            report=_report(saved, result, keep),
            write_tokenizer=write_tokenizer,
            also=None
            if also is None
            else lambda stage: also(stage, factors_of(directory, verify=verify)),
        )
    return out
