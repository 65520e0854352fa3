"""Pads a batch of prompts to few sizes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lordjax.models.config import ModelConfig

SMALLEST_BUCKET = 16  # tokens
SMALLEST_CACHE = 128  # tokens


def bucket(length: int) -> int:
    """Rounds a length up to one of 16, 24, 32, 48, 64, 96 and so on."""
    size = SMALLEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def pad_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[Array, Array, int]:
    """Pads prompts on the right and chooses the capacity of their cache.

    Args:
      config: the model.
      prompts: token ids; at least one in each prompt.
      max_new_tokens: tokens to generate for each prompt.

    Returns:
      Padded prompts ``[b, s]``, their lengths ``[b]``, and the number of columns of the cache.

    Raises:
      ValueError: if the model cannot generate, a prompt is empty, a token id is outside the
        vocabulary, or prompt and answer are longer than the model's longest sequence.
    """
    if config.head != "causal" or not config.causal:
        raise ValueError(
            f"a model with head {config.head!r} does not generate text; choose a causal model"
        )
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.size or lengths.min() < 1 or max_new_tokens < 1:
        raise ValueError(
            f"prompts of {lengths.tolist()} tokens and {max_new_tokens} new tokens: expected at "
            "least 1 of each; start an empty prompt with the tokenizer's BOS or EOS token"
        )
    total, most = int(lengths.max()) + max_new_tokens, config.max_positions
    if total > most:
        raise ValueError(
            f"a prompt of {lengths.max()} tokens and {max_new_tokens} new tokens are {total}, but "
            f"the model's longest sequence is {most}; shorten the prompt or lower max_new_tokens"
        )
    _check_dynamic(config, total)
    width = min(bucket(int(lengths.max())), most)
    capacity = min(bucket(max(total, width, SMALLEST_CACHE)), most)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"token ids from {tokens.min()} to {tokens.max()}: expected 0 to "
            f"{config.vocab_size - 1}, the ids of the model's vocabulary"
        )
    return jnp.asarray(tokens), jnp.asarray(lengths), capacity


def _check_dynamic(config: ModelConfig, total: int) -> None:
    """Raises ValueError if ``dynamic`` frequencies would change with every new token."""
    for rope in (config.rope, config.local_rope):
        if rope is None or rope.kind != "dynamic":
            continue
        trained = rope.original_max_positions or config.max_positions
        if total > trained:
            raise ValueError(
                f"{total} tokens of prompt and answer: the frequencies of dynamic rotary positions "
                f"change with every token beyond {trained}, which cached keys cannot follow; "
                f"expected at most {trained} tokens"
            )
