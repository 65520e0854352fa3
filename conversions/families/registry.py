"""Registry of the supported families of Hugging Face models.

An entry of `FAMILIES` says how a ``config.json`` becomes a `ModelConfig`, and which tensor of a
checkpoint holds which parameter. To support a new family, add an entry; see `family.Family`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from lordjax.conversions.families.bert import BERT, CAMEMBERT, ROBERTA, XLM_ROBERTA
from lordjax.conversions.families.config.heads import read_head
from lordjax.conversions.families.config.normalize import normal_form
from lordjax.conversions.families.config.values import fill_sizes, read_keys, read_sizes
from lordjax.conversions.families.distilbert import DISTILBERT
from lordjax.conversions.families.family import Family, TensorRow, TensorSource, Values, sizes_of
from lordjax.conversions.families.gemma import GEMMA, GEMMA2, GEMMA3
from lordjax.conversions.families.gpt import CODEGEN, GPT2, GPT_BIGCODE, OPT
from lordjax.conversions.families.llama import GRANITE, LLAMA, MISTRAL, QWEN2, QWEN3, STARCODER2
from lordjax.conversions.families.neox import GPT_NEOX
from lordjax.conversions.families.olmo2 import OLMO2
from lordjax.conversions.families.phi import PHI, STABLELM
from lordjax.conversions.families.phi3 import PHI3
from lordjax.conversions.families.smollm3 import SMOLLM3
from lordjax.models.config import ModelConfig
from lordjax.names import listed

_ROWS = (
    *(
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GRANITE,
        OLMO2,
        SMOLLM3,
        PHI,
        STABLELM,
        PHI3,
        STARCODER2,
        GEMMA,
        GEMMA2,
        GEMMA3,
    ),
    *(GPT2, GPT_BIGCODE, OPT, CODEGEN, GPT_NEOX),
    *(ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, BERT),
)
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}


def normalized(hf_config: Values) -> dict[str, Any]:
    """Returns a ``config.json`` in the form that the families read; see `config.normalize`."""
    return normal_form(hf_config, FAMILIES)


def family_of(hf_config: Values, where: str = "config.json") -> Family:
    """Returns the family of a ``config.json``.

    Args:
      hf_config: content of the config.
      where: name of the file in error messages.

    Raises:
      ValueError: if the family or its head is not supported; the message lists supported ones.
    """
    hf_config = normalized(hf_config)
    if "lordjax_export" in hf_config:
        raise ValueError(f"{where}: a factored export; open the directory that it was made from")
    kind = hf_config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"{where}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    given = architectures_of(hf_config, family)
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{where}: architectures = {given!r}: expected a list of names")
    if not set(given) <= set(family.architectures):
        raise ValueError(
            f"{where}: architectures {given} is not supported; "
            f"supported for {kind}: {', '.join(family.architectures)}"
        )
    return family


def architectures_of(hf_config: Values, family: Family) -> list[str]:
    """Returns the key ``architectures``, or the family's first architecture if it is missing."""
    return hf_config.get("architectures") or list(family.architectures[:1])


# Keys that describe the head; `with_labels` replaces or drops them.
_OF_A_HEAD = ("architectures", "id2label", "label2id", "num_labels", "_num_labels", "problem_type")


def with_labels(hf_config: Values, labels: Sequence[str]) -> dict[str, Any]:
    """Returns the config of an encoder with a classification head in place of its own head.

    `models.output_heads.with_classes` makes the parameters of that head.

    Args:
      hf_config: ``config.json`` of the encoder, with any head.
      labels: names of the classes.

    Raises:
      ValueError: if the family has no classification head, or two classes have the same name.
    """
    family = family_of(hf_config)
    found = [a for a in family.architectures if a.endswith("ForSequenceClassification")]
    if not found or family.constants.get("causal", True):
        raise ValueError(
            f"{family.model_type}: no classification head; expected an encoder (bert, roberta)"
        )
    if len(set(labels)) < len(labels):
        raise ValueError(f"labels {list(labels)}: expected different names for all classes")
    kept = {key: value for key, value in hf_config.items() if key not in _OF_A_HEAD}
    numbers = {label: i for i, label in enumerate(labels)}
    names = {str(i): label for label, i in numbers.items()}
    return {**kept, "architectures": found, "id2label": names, "label2id": numbers}


def model_config(hf_config: Values, where: str = "config.json") -> ModelConfig:
    """Converts a ``config.json`` into a `ModelConfig`.

    Args:
      hf_config: content of the config, as transformers 4 or 5 writes it.
      where: name of the file in error messages.

    Raises:
      ValueError: if a key or value is not supported; one error lists all problems.
    """
    hf_config, family = normalized(hf_config), family_of(hf_config, where)
    problems: list[str] = []
    values = read_keys(family, hf_config, problems)
    fields = dict(family.constants) | {f: values[key] for f, key in family.fields.items()}
    rope, windows = None, None
    if read_sizes(family, values, problems):
        rope = family.rope(hf_config, values, problems)
        windows = family.windows(values, problems)
        if family.derive is not None:
            fields |= family.derive(hf_config, values, problems)
        fields |= read_head(architectures_of(hf_config, family), hf_config, family, problems)
        fill_sizes(fields, rope is not None, problems)
    if problems:
        raise ValueError(_not_supported(where, family, problems))
    if family.position_offset is not None:
        fields["position_offset"] = family.position_offset
        fields["position_rows"] = fields["max_positions"] + family.position_offset
    return ModelConfig(**fields, rope=rope, windows=windows)


def _not_supported(where: str, family: Family, problems: list[str]) -> str:
    """Returns the error text of a config with problems: one line if there is one problem."""
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    return (
        f"{where}: {len(problems)} thing(s) in it are not supported (family "
        f"{family.model_type}):\n  {listed(problems, chr(10) + '  ')}"
    )


def tensor_table(
    hf_config: Values, where: str = "config.json", leaves: Collection[str] = ()
) -> dict[str, TensorSource]:
    """Returns the tensor of every parameter path, for checkpoints with this ``config.json``.

    Args:
      hf_config: content of the config.
      where: name of the file in error messages.
      leaves: paths of a model's parameters. Those of `Family.carried` are added to the table.

    Raises:
      ValueError: if the config is not supported.
    """
    family, config = family_of(hf_config, where), model_config(hf_config, where)
    carried = tuple(row for row in family.carried if row.path in leaves)
    rows = (*family.tensors, *family.heads.get(config.head, ()), *carried)
    return _sources(rows, family, config)


def carried_table(hf_config: Values) -> dict[str, TensorSource]:
    """Returns the rows of `Family.carried` whose tensors the head does not take."""
    family, config = family_of(hf_config), model_config(hf_config)
    taken = {row.name for row in family.heads.get(config.head, ())}
    return _sources((row for row in family.carried if row.name not in taken), family, config)


def carried_names(hf_config: Values) -> set[str]:
    """Returns the names of `Family.carried`, with the family's prefix and without.

    A model may have them or not, because its outputs do not depend on them.
    """
    kind = hf_config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    names = {row.name for row in family.carried} if family else set()
    return names | {name.removeprefix(family.prefix) for name in names if family}


def _sources(
    rows: Iterable[TensorRow], family: Family, config: ModelConfig
) -> dict[str, TensorSource]:
    """Returns the tensors of rows of a family, block by block; a bare model has no prefix."""
    sizes, table = sizes_of(config), {}
    prefix = family.prefix if config.head == "none" else ""
    for row in rows:
        if row.when and bool(getattr(config, row.when.removeprefix("not "))) == (
            "not " in row.when
        ):
            continue
        shape = tuple(sizes[letter] for letter in row.dims)
        columns = None if row.columns is None else row.columns(config)
        for i in range(config.num_layers if "{i}" in row.path else 1):
            path, name = row.path.format(i=i), row.name.format(i=i)
            name = name.removeprefix(prefix)
            table[path] = TensorSource(name, shape, row.transpose, columns, row.offset)
    return table
