"""Encoders: BERT, RoBERTa, XLM-RoBERTa and CamemBERT, with any of their heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lordjax.conversions.families.family import (
    BIAS_FIELDS,
    BLOCK,
    Family,
    TensorRow,
    Values,
    linear,
    norm,
)
from lordjax.conversions.families.rope import no_rope
from lordjax.conversions.families.sliding_windows import no_windows


def _encoder(prefix: str) -> tuple[TensorRow, ...]:
    """Returns the rows of the embeddings and blocks."""
    embeddings, layer = f"{prefix}.embeddings", f"{prefix}.encoder.layer.{{i}}"
    own, attention = f"{layer}.attention.self", f"{BLOCK}/attention"
    return (
        TensorRow("embed/embedding", f"{embeddings}.word_embeddings.weight", "vm"),
        TensorRow("positions/embedding", f"{embeddings}.position_embeddings.weight", "pm"),
        TensorRow("token_types/embedding", f"{embeddings}.token_type_embeddings.weight", "tm"),
        *norm("embed_norm", f"{embeddings}.LayerNorm"),
        *linear(f"{attention}/q", f"{own}.query", "hm", "qkv_bias"),
        *linear(f"{attention}/k", f"{own}.key", "km", "qkv_bias"),
        *linear(f"{attention}/v", f"{own}.value", "km", "qkv_bias"),
        *linear(f"{attention}/o", f"{layer}.attention.output.dense", "mh", "out_bias"),
        *norm(f"{BLOCK}/attention_norm", f"{layer}.attention.output.LayerNorm"),
        *linear(f"{BLOCK}/mlp/up", f"{layer}.intermediate.dense", "fm", "mlp_bias"),
        *linear(f"{BLOCK}/mlp/down", f"{layer}.output.dense", "mf", "mlp_bias"),
        *norm(f"{BLOCK}/mlp_norm", f"{layer}.output.LayerNorm"),
    )


def _masked_head(dense: str, norm_name: str, decoder: str, bias: str) -> tuple[TensorRow, ...]:
    """Returns the rows of a masked-token head.

    In an untied model, transformers 5 uses the bias of the decoder instead of ``bias``.
    """
    return (
        *linear("transform/dense", dense, "mm", "head_bias"),
        *norm("transform/norm", norm_name),
        TensorRow("head/kernel", f"{decoder}.weight", "vm", True, when="not tie_embeddings"),
        TensorRow("head/bias", f"{decoder}.bias", "v", when="not tie_embeddings"),
        TensorRow("head/bias", bias, "v", when="tie_embeddings"),
    )


def _pooler(name: str) -> tuple[TensorRow, ...]:
    """Returns the rows of a pooler, which is carried where nothing is classified."""
    return (
        TensorRow("pooler/dense/kernel", f"{name}.dense.weight", "mm", True),
        TensorRow("pooler/dense/bias", f"{name}.dense.bias", "m"),
    )


ENCODER_HEADS = {
    "tokens": linear("head", "classifier", "cm", "head_bias"),
    "span": linear("head", "qa_outputs", "cm", "head_bias"),
}
BERT = Family(
    model_type="bert",
    architectures=(
        "BertForMaskedLM",
        "BertForPreTraining",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertModel",
    ),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "mlp_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_positions": "max_position_embeddings",
        "norm_eps": "layer_norm_eps",
        "activation": "hidden_act",
        "head_activation": "hidden_act",
        "token_types": "type_vocab_size",
        "tie_embeddings": "tie_word_embeddings",
    },
    constants={
        "block": "post_norm",
        "norm": "layer",
        "gated": False,
        "causal": False,
        "embed_norm": True,
        "final_norm": False,
        "head_bias": True,
        **dict.fromkeys(BIAS_FIELDS, True),
    },
    defaults={
        "vocab_size": 30522,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "type_vocab_size": 2,
        "tie_word_embeddings": True,
    },
    fixed={"position_embedding_type": ("absolute",), "is_decoder": (False,)},
    windows=no_windows,
    rope=no_rope,
    position_offset=0,
    prefix="bert.",
    tensors=_encoder("bert"),
    heads={
        "masked": _masked_head(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            "cls.predictions.bias",
        ),
        "classes": (
            *linear("transform/dense", "bert.pooler.dense", "mm", "head_bias"),
            *linear("head", "classifier", "cm", "head_bias"),
        ),
        **ENCODER_HEADS,
    },
    carried=(
        *_pooler("bert.pooler"),
        TensorRow("seq_relationship/kernel", "cls.seq_relationship.weight", "2m", True),
        TensorRow("seq_relationship/bias", "cls.seq_relationship.bias", "2"),
    ),
    copies={
        "cls.predictions.decoder.weight": "embed/embedding",
        "cls.predictions.decoder.bias": "head/bias",
    },
    # Old versions saved position ids.
    ignored_tensors=(
        r"bert\.embeddings\.(position_ids|token_type_ids)",
        r"cls\.predictions\.bias",  # unused if the head is not tied
    ),
    # The authors' checkpoints have TensorFlow's names.
    old_names={"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"},
)


def _padded_positions(hf_config: Values, values: Values, problems: list[str]) -> Mapping[str, Any]:
    """Returns the range of position rows: the first token takes the row after the padding's."""
    del hf_config
    padding, rows = values["pad_token_id"], values["max_position_embeddings"]
    if not 0 <= padding < rows - 1:
        problems.append(f"pad_token_id = {padding!r}: expected an id below {rows - 1}")
        return {}
    first = padding + 1
    return {"position_offset": first, "position_rows": rows, "max_positions": rows - first}


ROBERTA = dataclasses.replace(
    BERT,
    model_type="roberta",
    architectures=(
        "RobertaForMaskedLM",
        "RobertaForSequenceClassification",
        "RobertaForTokenClassification",
        "RobertaForQuestionAnswering",
        "RobertaModel",
    ),
    fields={f: key for f, key in BERT.fields.items() if f != "head_activation"},
    defaults={**BERT.defaults, "vocab_size": 50265, "pad_token_id": 1},
    position_offset=None,
    derive=_padded_positions,
    prefix="roberta.",
    tensors=_encoder("roberta"),
    heads={
        "masked": _masked_head(
            "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"
        ),
        "classes": (
            *linear("transform/dense", "classifier.dense", "mm", "head_bias"),
            *linear("head", "classifier.out_proj", "cm", "head_bias"),
        ),
        **ENCODER_HEADS,
    },
    carried=_pooler("roberta.pooler"),
    copies={
        "lm_head.decoder.weight": "embed/embedding",
        "lm_head.decoder.bias": "head/bias",
    },
    ignored_tensors=(
        r"roberta\.embeddings\.(position_ids|token_type_ids)",
        r"lm_head\.bias",  # unused if the head is not tied
    ),
)

XLM_ROBERTA, CAMEMBERT = (
    dataclasses.replace(
        ROBERTA,
        model_type=model_type,
        architectures=tuple(name.replace("Roberta", stem) for name in ROBERTA.architectures),
        defaults={**ROBERTA.defaults, "vocab_size": 30522},
    )
    for model_type, stem in (("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert"))
)
