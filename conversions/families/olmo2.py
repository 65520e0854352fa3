"""OLMo 2: norms of outputs only; queries and keys are normalized over all heads at once."""

from __future__ import annotations

import dataclasses

from lordjax.conversions.families.family import BLOCK, TensorRow
from lordjax.conversions.families.llama import LLAMA

_LAYER = "model.layers.{i}"
OLMO2 = dataclasses.replace(
    LLAMA,
    model_type="olmo2",
    architectures=(
        "Olmo2ForCausalLM",
        "Olmo2Model",
    ),
    fields={field: key for field, key in LLAMA.fields.items() if field != "mlp_bias"},
    constants={"block": "output_norm", "qk_norm": True, "wide_qk_norm": True},
    defaults={
        **{key: value for key, value in LLAMA.defaults.items() if key != "mlp_bias"},
        "vocab_size": 50304,
        "rms_norm_eps": 1e-5,
    },
    tensors=(
        *(row for row in LLAMA.tensors if "_norm/" not in row.path or "final" in row.path),
        *(
            TensorRow(f"{BLOCK}/{layer}_post_norm/scale", f"{_LAYER}.post_{name}.weight", "m")
            for layer, name in (
                ("attention", "attention_layernorm"),
                ("mlp", "feedforward_layernorm"),
            )
        ),
        TensorRow(f"{BLOCK}/attention/q_norm/scale", f"{_LAYER}.self_attn.q_norm.weight", "h"),
        TensorRow(f"{BLOCK}/attention/k_norm/scale", f"{_LAYER}.self_attn.k_norm.weight", "k"),
    ),
)
