"""A small model and its tokens for runs that are killed and go on."""

import dataclasses
import functools

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
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (12, 16), np.int32)


@functools.cache
def small_model():
    return random_model(CONFIG)


class Killed(BaseException):
    """Nothing in the library may catch this."""
