"""Perplexity by one fixed protocol.

The model reads every window separately, from its first token; the targets are the tokens 1 … L-1.
For a masked language model the targets are a fixed 15 % of the tokens, which are masked at the same
time (`models.objective`). The result is a pseudo-perplexity, which is only comparable to others of
its kind::

    nll = logsumexp(logits) - logits[target]        perplexity = exp(Σ nll / number of targets)

Logits and nll are float32, matrix products are in full float32 precision on every device, and sums
are float64 on the host. No value is skipped: one that is not finite raises an error.
"""

from __future__ import annotations

import functools
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
from lordjax.runtime.progress import Progress


def perplexity(
    config: ModelConfig,
    params: Any,
    tokens: np.ndarray,
    *,
    batch_size: int = 1,
    tokenizer_name: str | None = None,
    bos: bool = False,
    mask_token: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures the perplexity of a model, dense or compressed, on windows of token ids.

    Args:
      config: the model's architecture.
      params: the model's parameters; leaves may be kernels of any kind.
      tokens: ``[n, L]`` integer token ids, L ≥ 2.
      batch_size: windows per forward pass; changes the result only by rounding.
      tokenizer_name: name of the tokenizer, for the protocol.
      bos: whether every window begins with a BOS token, for the protocol.
      mask_token: id of the mask token; needed for a masked language model.
      progress: called with ("evaluate", windows done, number of windows).

    Returns:
      ``perplexity``, ``nll_per_token`` (nats), ``tokens`` (number of targets) and ``protocol``.

    Raises:
      ValueError: if a token id is not in the vocabulary or a negative log-likelihood is not finite
        (names the window and the position), if the model predicts no tokens, or if a masked
        language model is given no mask token.
    """
    ids = _checked(config, tokens, batch_size)
    goals = objective.targets(config, ids, None)
    read = objective.inputs(config, ids, None, mask_token)
    # Move the weights to the device once, not in every call.
    params = jax.tree.map(jnp.asarray, params)
    total = _total_nll(config, params, read, goals, batch_size, progress)
    targets = int((goals >= 0).sum())
    with np.errstate(over="ignore"):
        value = float(np.exp(np.float64(total / targets)))
    return {
        "perplexity": value,
        "nll_per_token": total / targets,
        "tokens": targets,
        "protocol": {
            "tokenizer": tokenizer_name,
            "bos": bos,
            "window": ids.shape[1],
            "stride": ids.shape[1],
            "windows": len(ids),
            "token_count": ids.size,
            # Activations have the dtype of the embedding.
            "dtype": str(params["embed"]["embedding"].dtype),
            "matmul_precision": "highest",
            "tokens_sha256": fingerprint(ids),
            **objective.protocol(config, mask_token),
        },
    }


def _checked(config: ModelConfig, tokens: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns the token ids as int32; raises ValueError if they or the model do not fit."""
    tokens = np.asarray(tokens)
    check_windows(tokens)
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}; expected 1 or more")
    if config.head not in ("causal", "masked"):
        raise ValueError(
            f"a model with head {config.head!r} predicts no tokens, so it has no perplexity; "
            "expected a causal or masked language model"
        )
    check_ids(tokens, config.vocab_size)
    return tokens.astype(np.int32)


def _total_nll(
    config: ModelConfig,
    params: Any,
    inputs: np.ndarray,
    targets: np.ndarray,
    batch_size: int,
    progress: Progress | None,
) -> float:
    """Returns the sum of the negative log-likelihoods of all targets, in nats."""
    total, count = 0.0, len(inputs)
    batch_size = min(batch_size, count)
    for start in range(0, count, batch_size):
        batch, goal = (a[start : start + batch_size] for a in (inputs, targets))
        rows = len(batch)
        # Pad a last, shorter batch: another shape would be compiled again.
        fill = ((0, batch_size - rows), (0, 0))
        batch, filled = (np.pad(a, fill, mode="edge") for a in (batch, goal))
        with jax.default_matmul_precision("highest"):
            nll = np.asarray(_token_nll(config, params, batch, filled), np.float64)[:rows]
        check_finite(config, nll, start)
        total += float(nll[goal >= 0].sum())
        if progress:
            progress("evaluate", start + rows, count)
    return total


@functools.partial(jax.jit, static_argnums=0)
def _token_nll(
    config: ModelConfig, params: Any, tokens: Int[Array, "b s"], targets: Int[Array, "b s"]
) -> Float[Array, "b s"]:
    """Returns the negative log-likelihood of the targets, 0 where there is no target."""
    model = Transformer(config)
    x: Any = model.apply({"params": params}, tokens, method=Transformer.hidden)
    return objective.losses(config, params, x, targets)
