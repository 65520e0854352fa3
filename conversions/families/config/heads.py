"""Reads the head of a model from the key ``architectures``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lordjax.conversions.families.family import Family, Values, is_positive_int
from lordjax.models.config import LARGEST

# Suffix of an architecture -> value of `ModelConfig.head`; the first match counts.
HEADS = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "ForPreTraining": "masked",
    "ForSequenceClassification": "classes",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "span",
    "Model": "none",
}


def read_head(
    architectures: Iterable[str], hf_config: Values, family: Family, problems: list[str]
) -> dict[str, Any]:
    """Returns the fields of `ModelConfig` that describe the head.

    Architectures with different kinds of heads, or a wrong number of classes, are problems.
    """
    found = [next(h for end, h in HEADS.items() if name.endswith(end)) for name in architectures]
    if len(set(found)) > 1:
        problems.append(f"architectures = {list(architectures)}: heads of several kinds; keep one")
    if found[0] in ("causal", "masked", "none"):
        return {"head": found[0]}
    labels = hf_config.get("id2label")
    if labels is not None and not isinstance(labels, dict):
        problems.append(f"id2label = {labels!r}: expected an object from numbers to names")
        labels = None
    count = hf_config.get("num_labels", 2) if labels is None else len(labels)
    if not is_positive_int(count) or count > LARGEST["num_classes"]:
        problems.append(f"num_labels = {count!r}: expected a positive integer")
    elif found[0] == "span" and count != 2:
        problems.append(f"num_labels = {count!r}: expected 2, the start and the end of an answer")
    bias = any(row.path == "head/bias" for row in family.heads[found[0]])
    return {
        "head": found[0],
        "num_classes": count,
        "tie_embeddings": False,
        "head_bias": bias,
        "final_softcap": None,  # is for the logits of tokens
    }
