"""Perplexity under one stated protocol.

Every window is read alone from its first token; the targets are its tokens 1 … L-1::

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

from lordjax.data import check_ids, fingerprint
from lordjax.models.config import ModelConfig
from lordjax.models.transformer import Transformer

# Positions whose logits are held at once: 256 x 49152 float32 are 50 MB.
_CHUNK = 256


def perplexity(
    config: ModelConfig,
    params: Any,
    tokens: np.ndarray,
    *,
    batch_size: int = 1,
    tokenizer_name: str | None = None,
    bos: bool = False,
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
      progress: called with ("evaluate", windows done, windows in all).

    Returns:
      ``perplexity``, ``nll_per_token`` (nats), ``tokens`` (number of targets) and ``protocol``.

    Raises:
      ValueError: if an id is not in the vocabulary, or a negative log-likelihood is not finite;
        names the window and the position.
    """
    tokens = np.asarray(tokens)
    check_windows(tokens)
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}; expected 1 or more")
    check_ids(tokens, config.vocab_size)
    # Once, or every call would move the weights to the device again.
    params = jax.tree.map(jnp.asarray, params)
    count, length = tokens.shape
    batch_size = min(batch_size, count)
    total = 0.0
    for start in range(0, count, batch_size):
        batch = tokens[start : start + batch_size].astype(np.int32)
        rows = len(batch)
        # A last, shorter batch is filled up: another shape would be compiled again.
        batch = np.pad(batch, ((0, batch_size - rows), (0, 0)), mode="edge")
        with jax.default_matmul_precision("highest"):
            nll = np.asarray(_token_nll(config, params, batch), np.float64)[:rows]
        check_finite(nll, start)
        total += float(nll.sum())
        if progress:
            progress("evaluate", start + rows, count)
    targets = count * (length - 1)
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
    }
    return {
        "perplexity": value,
        "nll_per_token": total / targets,
        "tokens": targets,
        "protocol": protocol,
    }


@functools.partial(jax.jit, static_argnums=0)
def _token_nll(
    config: ModelConfig, params: Any, tokens: Int[Array, "b s"]
) -> Float[Array, "b s-1"]:
    """Negative log-likelihood of tokens 1 … s-1."""
    model = Transformer(config)
    x: Any = model.apply({"params": params}, tokens, method=Transformer.hidden)
    return nll_behind(config, params, x, tokens)


@functools.partial(jax.jit, static_argnums=0)
def nll_behind(
    config: ModelConfig, params: Any, x: Float[Array, "b s m"], tokens: Int[Array, "b s"]
) -> Float[Array, "b s-1"]:
    """Negative log-likelihood of tokens 1 … s-1 from the residual stream behind the last block.

    Logits are taken chunk by chunk. Of ``params`` only what is outside the blocks is read.
    """
    model, variables = Transformer(config), {"params": params}

    def chunk_nll(chunk: tuple[Array, Array]) -> Float[Array, "b c"]:
        hidden, targets = chunk
        logits: Any = model.apply(variables, hidden, method=Transformer.unembed)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    batch, length = tokens.shape
    size = min(_CHUNK, length)
    chunks = -(-length // size)
    # The last position has no target; it and the filling of the last chunk are cut off again.
    fill = chunks * size - length
    x = jnp.pad(x, ((0, 0), (0, fill), (0, 0))).reshape(batch, chunks, size, -1)
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, fill + 1))).reshape(batch, chunks, size)
    nll = jax.lax.map(chunk_nll, (jnp.moveaxis(x, 1, 0), jnp.moveaxis(targets, 1, 0)))
    return jnp.moveaxis(nll, 0, 1).reshape(batch, -1)[:, : length - 1]


def check_windows(tokens: np.ndarray) -> None:
    """Raises ValueError unless there is a window with a target."""
    if tokens.ndim != 2 or not tokens.shape[0] or tokens.shape[1] < 2:
        raise ValueError(f"tokens {list(tokens.shape)}; expected [windows ≥ 1, length ≥ 2]")


def check_finite(nll: np.ndarray, first_window: int) -> None:
    """Raises ValueError if a negative log-likelihood is not finite; names window and token."""
    if np.isfinite(nll).all():
        return
    window, position = np.argwhere(~np.isfinite(nll))[0]
    raise ValueError(
        f"window {first_window + window}, token {position + 1}: negative log-likelihood is "
        f"{nll[window, position]}, expected a finite number; the weights hold NaN, or "
        "activations overflow in the dtype of the embedding"
    )
