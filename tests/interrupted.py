"""A small model and its tokens for runs that are killed and go on."""

import dataclasses

import numpy as np
from blocks import GPT2, random_model

from lordjax.models import Rope

CONFIG = dataclasses.replace(
    GPT2,
    num_layers=3,
    num_kv_heads=2,
    norm="rms",
    activation="silu",
    gated=True,
    rope=Rope(),
    position_rows=None,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
)
MODEL = random_model(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (12, 16), np.int32)


class Killed(BaseException):
    """Nothing in the library may catch this."""
