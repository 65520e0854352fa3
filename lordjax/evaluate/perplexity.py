"""Perplexity under one stated protocol.

Every window is read alone from its first token; the targets are its tokens 1 … L-1. Of a model that
predicts masked tokens they are a fixed 15 % of its tokens, masked all at once (`objective`): a
pseudo-perplexity, to be compared with others of its kind only::

    nll = logsumexp(logits) - logits[target]        perplexity = exp(Σ nll / number of targets)

Logits and nll are float32, products are at full float32 precision on every device, and sums are
float64 on the host. Nothing is skipped: a value that is not finite is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lordjax.data.token_windows import check_ids, fingerprint
from lordjax.models import objective
from lordjax.models.config import ModelConfig
from lordjax.models.objective import check_finite, check_windows
from lordjax.models.transformer import Transformer


def perplexity(
    config: ModelConfig,
    params: Any,
    tokens: np.ndarray,
    *,
    batch_size: int = 1,
    tokenizer_name: str | None = None,
    bos: bool = False,
    mask_token: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures a model, dense or compressed, on windows of token ids.

    Args:
      config: the model.
      params: its parameters; leaves may be kernels of any kind.
      tokens: ``[n, L]`` integer ids, L ≥ 2.
      batch_size: windows per forward pass; does not change the result beyond rounding.
      tokenizer_name: for the protocol: who made the ids.
      bos: for the protocol: whether every window begins with a BOS token.
      mask_token: id of the mask token, of a model that predicts masked tokens.
      progress: called with ("evaluate", windows done, windows in all).

    Returns:
      ``perplexity``, ``nll_per_token`` (nats), ``tokens`` (number of targets) and ``protocol``.

    Raises:
      ValueError: if an id is not in the vocabulary, or a negative log-likelihood is not finite;
        names the window and the position. If the model predicts no tokens, or masked ones and the
        mask token is not given.
    """
    tokens = np.asarray(tokens)
    check_windows(tokens)
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}; expected 1 or more")
    if config.head not in ("causal", "masked"):
        raise ValueError(
            f"a model with head {config.head!r} predicts no tokens, so it has no perplexity"
        )
    check_ids(tokens, config.vocab_size)
    ids = tokens.astype(np.int32)
    goals, read = (
        objective.targets(config, ids, None),
        objective.inputs(config, ids, None, mask_token),
    )
    # Once, or every call would move the weights to the device again.
    params = jax.tree.map(jnp.asarray, params)
    count, length = tokens.shape
    batch_size = min(batch_size, count)
    total = 0.0
    for start in range(0, count, batch_size):
        batch, goal = (a[start : start + batch_size] for a in (read, goals))
        rows = len(batch)
        # A last, shorter batch is filled up: another shape would be compiled again.
        fill = ((0, batch_size - rows), (0, 0))
        batch, filled = (np.pad(a, fill, mode="edge") for a in (batch, goal))
        with jax.default_matmul_precision("highest"):
            nll = np.asarray(_token_nll(config, params, batch, filled), np.float64)[:rows]
        check_finite(config, nll, start)
        total += float(nll[goal >= 0].sum())
        if progress:
            progress("evaluate", start + rows, count)
    targets = int((goals >= 0).sum())
    with np.errstate(over="ignore"):
        value = float(np.exp(np.float64(total / targets)))
    protocol = {
        "tokenizer": tokenizer_name,
        "bos": bos,
        "window": length,
        "stride": length,
        "windows": count,
        "token_count": tokens.size,
        # Activations have the dtype of the embedding.
        "dtype": str(jax.tree.leaves(params["embed"])[0].dtype),
        "matmul_precision": "highest",
        "tokens_sha256": fingerprint(tokens),
        **objective.protocol(config, mask_token),
    }
    return {
        "perplexity": value,
        "nll_per_token": total / targets,
        "tokens": targets,
        "protocol": protocol,
    }


@functools.partial(jax.jit, static_argnums=0)
def _token_nll(
    config: ModelConfig, params: Any, tokens: Int[Array, "b s"], targets: Int[Array, "b s"]
) -> Float[Array, "b s"]:
    """Negative log-likelihood of the targets; 0 where there is none."""
    model = Transformer(config)
    x: Any = model.apply({"params": params}, tokens, method=Transformer.hidden)
    return objective.losses(config, params, x, targets)
