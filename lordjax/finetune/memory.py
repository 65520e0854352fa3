"""What a step of fine-tuning will hold in memory, from shapes alone; nothing is allocated.

`predict` counts; `compiled` asks the compiler, which takes as long as compiling does::

    base         what is not trained, codes packed
    trained      4 bytes a number for the parameter, Adam's two moments, the gradient of a
                 micro-batch, the sum of those, and two on the way to the new parameter
    activations  the input of every block; and of one block at a time, what its gradient needs

The last is, for a micro-batch, the largest of: the logits of a chunk of positions with their
gradient; the MLP's hidden states with theirs; the attention's probabilities with theirs. Of codes,
one matrix is held besides: codes, levels, scales and their product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lordjax.data.examples import Examples
from lordjax.finetune import recipes
from lordjax.finetune import step as finetune
from lordjax.finetune.recipes import Recipe
from lordjax.finetune.step import Settings, State
from lordjax.kernels import base, quantized, trees
from lordjax.models.config import ModelConfig
from lordjax.models.objective import CHUNK

COPIES = 7  # of what is trained, see above


def abstract_state(
    config: ModelConfig, params: Any, recipe: Recipe, settings: Settings, seq_len: int
) -> tuple[State, Any, Examples]:
    """The state, what is not trained, and a batch, as shapes.

    Args:
      config: the model.
      params: its parameters, or their shapes.
      recipe: what is trained.
      settings: of the run.
      seq_len: tokens per example.
    """

    def begun(params: Any) -> tuple[State, Any]:
        found = finetune.begin(config, params, recipe, settings)
        return found.state, found.frozen

    state, frozen = jax.eval_shape(begun, params)
    rows = settings.micro_batches, settings.batch // settings.micro_batches
    tokens: Any = jax.ShapeDtypeStruct((*rows, seq_len), jnp.int32)
    targets: Any = jax.ShapeDtypeStruct(
        (*rows, 1 if config.head == "classes" else seq_len), jnp.int32
    )
    return state, frozen, Examples(tokens, targets)


def predict(
    config: ModelConfig, params: Any, recipe: Recipe, settings: Settings, seq_len: int
) -> dict[str, int]:
    """Bytes of ``base``, ``trained``, ``activations`` and their sum; arguments as of `abstract`."""
    state, frozen, _ = abstract_state(config, params, recipe, settings, seq_len)
    rows, size = settings.batch // settings.micro_batches, jnp.dtype(settings.dtype).itemsize
    stream = rows * seq_len * config.hidden_size * size
    blocks = [
        [leaf for path, leaf in trees.flatten(frozen).items() if path.startswith(f"layer_{i}/")]
        for i in range(config.num_layers)
    ]
    decoded = max((_decoded(leaf, size) for block in blocks for leaf in block), default=0)
    hidden = rows * seq_len * config.mlp_size * size * (3 if config.gated else 2)
    # On CPU one window and key head at a time, see `models.layers.attend`.
    at_once = 1 if jax.default_backend() == "cpu" else rows * config.num_kv_heads
    heads = at_once * config.num_heads // config.num_kv_heads
    scores = 2 * heads * seq_len**2 * 4
    logits = 3 * rows * min(CHUNK, seq_len) * config.vocab_size * 4
    found = {
        "base": base.nbytes(frozen),
        "trained": COPIES * base.nbytes(state.params),
        "activations": (config.num_layers + 1) * stream
        + max(logits, 2 * hidden + 4 * stream, scores + 6 * stream)
        + 4 * decoded,
    }
    return {**found, "total": sum(found.values())}


def _decoded(leaf: Any, size: int) -> int:
    """Bytes of the matrix that codes become when they are used."""
    if isinstance(leaf, quantized.NFQuantized):
        return leaf.fan_in * leaf.fan_out * size
    if isinstance(leaf, base.Kernel):
        return max(_decoded(getattr(leaf, name), size) for name in base.kernel_fields(leaf)[0])
    return 0


def compiled_bytes(
    config: ModelConfig, params: Any, recipe: Recipe, settings: Settings, seq_len: int
) -> dict[str, int]:
    """Bytes of ``arguments``, ``temporaries`` and their sum, as the compiler has laid them out."""
    state, frozen, batch = abstract_state(config, params, recipe, settings, seq_len)
    optimizer = recipes.optimizer(recipe, settings.steps)
    step = finetune.make_step(config, optimizer, dtype=settings.dtype)
    found = step.lower(state, frozen, batch).compile().memory_analysis()
    # The new state lies where the old one was.
    parts = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}
