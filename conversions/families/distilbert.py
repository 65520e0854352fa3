"""DistilBERT: BERT without token types, and with a ReLU in its classification head."""

from __future__ import annotations

import dataclasses

from lordjax.conversions.families.bert import BERT, ENCODER_HEADS
from lordjax.conversions.families.family import BLOCK, TensorRow, linear, norm

_EMBEDDINGS, _LAYER = "distilbert.embeddings", "distilbert.transformer.layer.{i}"
_ATTENTION = f"{BLOCK}/attention"

DISTILBERT = dataclasses.replace(
    BERT,
    model_type="distilbert",
    architectures=(
        "DistilBertForMaskedLM",
        "DistilBertForSequenceClassification",
        "DistilBertForTokenClassification",
        "DistilBertForQuestionAnswering",
        "DistilBertModel",
    ),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "dim",
        "mlp_size": "hidden_dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "max_positions": "max_position_embeddings",
        "activation": "activation",
        "head_activation": "activation",
        "tie_embeddings": "tie_word_embeddings",
    },
    constants={**BERT.constants, "norm_eps": 1e-12, "pooler_activation": "relu"},
    defaults={
        "vocab_size": 30522,
        "dim": 768,
        "hidden_dim": 3072,
        "n_layers": 6,
        "n_heads": 12,
        "max_position_embeddings": 512,
        "activation": "gelu",
        "tie_word_embeddings": True,
    },
    fixed={},
    # Sinusoidal positions are in the table of positions, too.
    ignored=frozenset(("sinusoidal_pos_embds", "tie_weights_")),
    prefix="distilbert.",
    tensors=(
        TensorRow("embed/embedding", f"{_EMBEDDINGS}.word_embeddings.weight", "vm"),
        TensorRow("positions/embedding", f"{_EMBEDDINGS}.position_embeddings.weight", "pm"),
        *norm("embed_norm", f"{_EMBEDDINGS}.LayerNorm"),
        *linear(f"{_ATTENTION}/q", f"{_LAYER}.attention.q_lin", "hm", "qkv_bias"),
        *linear(f"{_ATTENTION}/k", f"{_LAYER}.attention.k_lin", "km", "qkv_bias"),
        *linear(f"{_ATTENTION}/v", f"{_LAYER}.attention.v_lin", "km", "qkv_bias"),
        *linear(f"{_ATTENTION}/o", f"{_LAYER}.attention.out_lin", "mh", "out_bias"),
        *norm(f"{BLOCK}/attention_norm", f"{_LAYER}.sa_layer_norm"),
        *linear(f"{BLOCK}/mlp/up", f"{_LAYER}.ffn.lin1", "fm", "mlp_bias"),
        *linear(f"{BLOCK}/mlp/down", f"{_LAYER}.ffn.lin2", "mf", "mlp_bias"),
        *norm(f"{BLOCK}/mlp_norm", f"{_LAYER}.output_layer_norm"),
    ),
    heads={
        "masked": (
            *linear("transform/dense", "vocab_transform", "mm", "head_bias"),
            *norm("transform/norm", "vocab_layer_norm"),
            TensorRow("head/kernel", "vocab_projector.weight", "vm", True, "not tie_embeddings"),
            TensorRow("head/bias", "vocab_projector.bias", "v"),
        ),
        "classes": (
            *linear("transform/dense", "pre_classifier", "mm", "head_bias"),
            *linear("head", "classifier", "cm", "head_bias"),
        ),
        **ENCODER_HEADS,
    },
    carried=(),
    copies={"vocab_projector.weight": "embed/embedding"},
    ignored_tensors=(r"distilbert\.embeddings\.position_ids",),
    old_names={},
)
