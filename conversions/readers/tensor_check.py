"""Compares the tensors of a checkpoint with those that its config asks for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from lordjax.conversions.families.family import Family, TensorSource, Values
from lordjax.conversions.families.registry import model_config, tensor_table
from lordjax.conversions.readers.tensor_files import TensorFiles
from lordjax.models.config import ModelConfig
from lordjax.names import listed
from lordjax.storage.tensor_check import mismatches


def spelling(
    family: Family, expected: Iterable[str], found: Collection[str]
) -> Callable[[str], str]:
    """Returns the function from a tensor's usual name to its name in a checkpoint.

    Names may have the family's prefix or not, whether the model has a head or not. In a model of
    several modalities the text part has a longer one.

    Args:
      family: family of the model.
      expected: usual names of the tensors.
      found: names of the tensors in the files.
    """
    expected = list(expected)
    known: tuple[Callable[[str], str], ...] = (
        lambda name: name,
        lambda name: name.removeprefix(family.prefix),
        lambda name: f"{family.prefix}{name}",
        # The text part of a model of several modalities.
        lambda name: f"language_model.{name}",
        lambda name: re.sub(r"^model\.", "model.language_model.", name),
    )
    return max(known, key=lambda spell: sum(spell(name) in found for name in expected))


def with_class_count(hf_config: Values, files: TensorFiles, where: str) -> dict[str, Any]:
    """Returns the config with the number of classes that the files have, if it names none.

    Args:
      hf_config: content of ``config.json``.
      files: the tensors.
      where: name of the config's file in error messages.
    """
    hf_config = dict(hf_config)
    named = hf_config.get("id2label") is not None or hf_config.get("num_labels") is not None
    if named or model_config(hf_config, where).num_classes is None:
        return hf_config
    head, names = tensor_table(hf_config)["head/kernel"].name, set(files.names())
    if head in names and len(files.shape(head)) == 2 and files.shape(head)[0] > 0:
        hf_config["num_labels"] = files.shape(head)[0]
    return hf_config


def tensor_problems(
    family: Family,
    config: ModelConfig,
    table: Mapping[str, TensorSource],
    files: TensorFiles,
    left_out: Collection[str] = (),
) -> str:
    """Describes the tensors that are missing, unknown or of the wrong shape.

    Args:
      family: family of the model.
      config: architecture of the model.
      table: dict from parameter paths to tensors, with the names of the files.
      files: the tensors.
      left_out: names of tensors that are no part of the model.

    Returns:
      An error text; empty if all tensors fit.
    """
    expected = {source.name: source.shape for source in table.values()}
    found = {name: files.shape(name) for name in files.names()}
    read = {
        name: shape
        for name, shape in found.items()
        if name in expected or not (name in left_out or _is_skipped(name, family, config))
    }
    lines = mismatches(expected, read, files.where)
    if not lines:
        return ""
    advice = _guess(sorted(expected.keys() - found.keys()), found) or (
        "Check that the config belongs to this model and that no file is missing"
    )
    return (
        f"{len(lines):,} tensor(s) do not match the config (family {family.model_type}, "
        f"{config.num_layers} layers). {advice}:\n  {listed(lines, chr(10) + '  ')}"
    )


def _is_skipped(name: str, family: Family, config: ModelConfig) -> bool:
    """Returns whether the model does not need a tensor that is in the files."""
    copied = config.tie_embeddings and name in family.copies
    return copied or family.ignores(name) or family.ignores(family.prefix + name)


def _guess(missing: Iterable[str], found: Iterable[str]) -> str | None:
    """Returns a likely reason why tensors are missing, or None."""
    missing, found = list(missing), list(found)
    starts = Counter(
        name.removesuffix(wanted)
        for wanted in missing[:20]
        for name in found
        if name.endswith(f".{wanted}")
    )
    if starts:
        start = starts.most_common(1)[0][0]
        whole = "all tensors begin" if all(n.startswith(start) for n in found) else "tensors begin"
        return f"In the files {whole} with {start!r}; remove it from their names"
    blocks = [
        {int(n[1]) for name in names if (n := _NUMBER.search(name))} for names in (missing, found)
    ]
    if blocks[0] and blocks[1] and min(blocks[0]) > max(blocks[1]):
        return (
            f"The files hold {max(blocks[1]) + 1} layers, fewer than the config names; download "
            "the missing files, or correct the number of layers in the config"
        )
    return None


_NUMBER = re.compile(r"\.(\d+)\.")  # number of the block in the name of a tensor
