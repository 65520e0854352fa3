"""A dense model with the factors of a method beside it, so that any budget is cut without work.

::

    model, config, tokenizer …    as `checkpoint.save` writes them: the dense model
    elastic/index.json            key -> file, size, checksum, or the value itself
    elastic/entries/              factors of every site at all ranks, what allocation reads

    config, params = load("elastic", keep=0.7)

Factors are ordered, so a smaller budget is a slice of what is there: the result is, bit for bit,
that of a compression to that budget.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lordjax.allocation.plan import SiteSize
from lordjax.calibration.calibration_set import Calibration
from lordjax.compression.low_rank import check_method, prepare
from lordjax.compression.prepared import Prepared
from lordjax.compression.result import Result
from lordjax.compression.resumable_output import TYPES
from lordjax.kernels import trees
from lordjax.methods import METHODS
from lordjax.models.config import ModelConfig
from lordjax.models.source import InMemory, Materialized, Source
from lordjax.runtime.progress import Progress
from lordjax.storage import atomic_directory, checkpoint, saved_model
from lordjax.storage.disk_store import DiskStore
from lordjax.storage.serialize import from_json
from lordjax.storage.shards import REST, Shards
from lordjax.storage.store import Entries, MemoryStore
from lordjax.storage.tensor_files import TensorFile, Written, checksum, write_json

DIRECTORY, INDEX = "elastic", "index.json"
FACTS = "elastic"  # entry: everything besides the factors
FORMAT = 1  # of the directory `DIRECTORY`


class Archive(MemoryStore):
    """Entries that a `workspace.Workspace` made, to be read only; new ones stay in memory.

    Raises:
      ValueError: if the directory is no such archive, or is damaged.
    """

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory
        self._checked: set[str] = set()
        index = directory / INDEX
        try:
            content = json.loads(index.read_text())
            self._rows: dict[str, dict[str, Any]] = content["entries"]
            version = content["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index}: unreadable ({error!r})") from error
        if version > FORMAT:
            raise ValueError(
                f"{index}: format {version}; this version reads up to {FORMAT}, upgrade lordjax"
            )

    def __contains__(self, key: str) -> bool:
        return key in self._rows or super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        """An entry; its arrays are mapped, not read.

        Raises:
          ValueError: if its file is not what was written.
        """
        if key not in self._rows:
            return super().__getitem__(key)
        row = self._rows[key]
        if "file" not in row:
            return from_json(row["value"], {}, TYPES)
        path = self.directory / row["file"]
        if key not in self._checked:
            if not path.is_file() or checksum(path) != Written(row["bytes"], row["sha256"]):
                raise ValueError(f"{path}: is missing, or damaged (its checksum differs)")
            self._checked.add(key)
        file = TensorFile(path)
        return from_json(json.loads(file.metadata["tree"]), file, TYPES)

    def below(self, prefix: str) -> list[str]:
        """Keys that begin like that, the oldest first."""
        return [key for key in self._rows if key.startswith(prefix)] + super().below(prefix)


def check_settings(method: str, prefix: str | None) -> None:
    """Raises an error if no budget can be cut from a method's factors.

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
    cut_dtype: str | None = None,
    **options: Any,
) -> Result:
    """Factors a model for all budgets; the result is the dense model, for `output.Output.finish`.

    Args:
      source: the model.
      tokens: calibration ids ``[windows, length]``.
      work: where the factors are kept; `keep_entries` takes them from there.
      into: where the parts of the dense model go.
      method: a key of `METHODS`.
      allocation: how budgets will be shared out; None = the method's own.
      temperature: of block-influence, for every budget; None = chosen for each on held-out windows,
        which are kept.
      prefix: ``dense``, or None.
      cut_dtype: the dtype of the models that are cut from it; None = that of ``source``.
      **options: see `compression.prepare`.

    Raises:
      KeyError, ValueError: see `check_settings` and `compression.prepare`.
    """
    check_settings(method, prefix)
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
    }
    return prepared.compress(1.0, allocation, temperature=temperature, into=into)


def keep_entries(store: DiskStore, directory: Path) -> None:
    """Puts what `compress` left in ``store`` beside the dense model in ``directory``."""
    folder = directory / DIRECTORY
    folder.mkdir(exist_ok=True)
    rows = store.link([FACTS, *store.below("factors/")], folder)
    write_json(folder / INDEX, {"format": FORMAT, "entries": rows})


def is_elastic(directory: str | os.PathLike[str]) -> bool:
    """Whether a model directory can be cut to any budget."""
    return (Path(directory) / DIRECTORY / INDEX).is_file()


def check_elastic(directory: str | os.PathLike[str]) -> None:
    """Raises ValueError if a model cannot be cut to other budgets."""
    if not is_elastic(directory):
        raise ValueError(
            f"{directory}: has no factors beside the model, so that it cannot be cut to a budget; "
            "make one that can with lordjax compress --elastic"
        )


def cut(
    directory: str | os.PathLike[str],
    keep: float,
    *,
    into: Any = None,
    progress: Progress | None = None,
) -> Result:
    """The model of one budget, sliced from an elastic directory.

    Args:
      directory: made by `compress` and `keep_entries`.
      keep: share of the block linear weights that stays, in (0, 1].
      into: see `Prepared.apply`.
      progress: called with (stage, done, total).

    Raises:
      ValueError: if the directory is not elastic, or is damaged, or ``keep`` cannot be met.
    """
    check_elastic(directory)
    archive = Archive(Path(directory) / DIRECTORY)
    facts = archive[FACTS]
    mask = None if facts["mask"] is None else np.asarray(facts["mask"], bool)
    prepared = Prepared(
        source=Materialized(saved_model.open_saved(directory)),
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
    )
    return prepared.compress(
        keep,
        facts["allocation"],
        temperature=facts["temperature"],
        dtype=facts.get("cut_dtype"),
        into=into,
    )


def factors_of(directory: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Site path -> factors at all ranks, of an elastic directory; read when they are asked for.

    Raises:
      ValueError: if the directory is damaged.
    """
    return Entries(Archive(Path(directory) / DIRECTORY), "factors")


@dataclasses.dataclass(frozen=True)
class Cut(InMemory):
    """The model of one budget, with the original ``config.json``."""

    hf_config: dict[str, Any]

    def leaves(self) -> dict[str, Any]:
        """Parameter path -> ``ShapeDtypeStruct`` or kernel of them."""
        return trees.flatten(jax.eval_shape(dict, self.params))


def open_cut(directory: str | os.PathLike[str], keep: float) -> Cut:
    """`cut`, as something to evaluate or to export."""
    result = cut(directory, keep)
    return Cut(result.config, result.params, saved_model.open_saved(directory).hf_config)


def load(
    directory: str | os.PathLike[str], keep: float | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Config and parameters of a model directory; needs nothing else.

    Args:
      directory: written by `checkpoint.save` or by the command line.
      keep: of an elastic one, the share of the block linear weights that stays, in (0, 1]; None:
        the model as it is stored, which of an elastic one is the dense one.

    Raises:
      ValueError: see `checkpoint.open_saved` and `cut`.
    """
    if keep is None:
        saved = saved_model.open_saved(directory)
        return saved.config, saved.params()
    source = open_cut(directory, keep)
    return source.config, dict(source.params)


def export(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    keep: float,
    *,
    write_tokenizer: Callable[[Path], Any] | None = None,
    also: Callable[[Path, Mapping[str, Any]], Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the model of one budget as a directory of its own, a block at a time.

    Args:
      directory: elastic.
      out: where to; must be free.
      keep: see `cut`.
      write_tokenizer: see `checkpoint.save`.
      also: called with the directory when everything else is in it, and with site path -> factors,
        to put more into it.
      progress: called with (stage, done, total).

    Raises:
      FileExistsError: if ``out`` is not free.
      OSError: if there is not enough room.
      ValueError: see `cut`.
    """
    check_elastic(directory)
    out = atomic_directory.check_destination(out)
    saved = saved_model.open_saved(directory)
    atomic_directory.check_room(out, saved.file_bytes())
    with atomic_directory.staged(out) as stage:
        parts = Shards(stage, MemoryStore())
        result = cut(directory, keep, into=parts, progress=progress)
        stored = saved.report()
        settings = dict(stored.get("settings", {}))
        settings.pop("elastic", None)
        if (dtype := settings.pop("cut_dtype", None)) is not None:
            settings["dtype"] = dtype
        names = [REST, *(f"layer_{i}" for i in range(result.config.num_layers))]
        checkpoint.write_about(
            stage,
            parts.finish(names),
            result.config,
            hf_config=saved.hf_config,
            plan=result.plan,
            report={
                **result.report,
                "calibration": stored.get("calibration"),
                "settings": {**settings, "keep": keep},
            },
            write_tokenizer=write_tokenizer,
            also=None if also is None else lambda stage: also(stage, factors_of(directory)),
        )
    return out
