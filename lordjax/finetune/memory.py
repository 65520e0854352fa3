"""Peak memory of a fine-tuning step, estimated from shapes; nothing is allocated.

`predict` estimates by a formula. `compiled_bytes` compiles the step and reads the compiler's
numbers. The formula has three terms::

    base         frozen parameters; quantized weights are packed
    trained      7 float32 copies of each trained parameter: the parameter, Adam's two moments,
                 the gradient of a micro-batch, the sum of the gradients, and two temporaries
                 of the update
    activations  the input of every block, and what the gradient of one block needs

The gradient of one block needs, for a micro-batch, the largest of three: the logits of a chunk of
positions, the MLP's hidden states, or the attention probabilities, each with its gradient. One
dequantized matrix is added: its codes, levels, scales and their product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lordjax.data.examples import Examples
from lordjax.finetune import recipes, step
from lordjax.finetune.recipes import Recipe
from lordjax.finetune.step import Settings, State
from lordjax.kernels import base, quantized, trees
from lordjax.models.config import ModelConfig
from lordjax.models.objective import CHUNK
from lordjax.names import layer
from lordjax.runtime import target

COPIES = 7  # float32 copies of each trained parameter; see the module's docstring


def abstract_state(
    config: ModelConfig, params: Any, recipe: Recipe, settings: Settings, seq_len: int
) -> tuple[State, Any, Examples]:
    """Returns the shapes of the training state, the frozen parameters and a batch.

    Args:
      config: the model's architecture.
      params: the model's parameters, or their shapes.
      recipe: what is trained, and how.
      settings: settings of the run.
      seq_len: tokens per example.
    """

    def initial(params: Any) -> tuple[State, Any]:
        setup = step.prepare_training(config, params, recipe, settings)
        return setup.state, setup.frozen

    state, frozen = jax.eval_shape(initial, params)
    rows = settings.micro_batches, settings.batch // settings.micro_batches
    tokens: Any = jax.ShapeDtypeStruct((*rows, seq_len), jnp.int32)
    targets: Any = jax.ShapeDtypeStruct(
        (*rows, 1 if config.head == "classes" else seq_len), jnp.int32
    )
    return state, frozen, Examples(tokens, targets)


def predict(
    config: ModelConfig, params: Any, recipe: Recipe, settings: Settings, seq_len: int
) -> dict[str, int]:
    """Estimates the bytes of ``base``, ``trained`` and ``activations``, and their ``total``.

    The arguments are those of `abstract_state`.
    """
    state, frozen, _ = abstract_state(config, params, recipe, settings, seq_len)
    rows, size = settings.batch // settings.micro_batches, jnp.dtype(settings.dtype).itemsize
    stream = rows * seq_len * config.hidden_size * size
    blocks = [
        [leaf for path, leaf in trees.flatten(frozen).items() if path.startswith(f"{layer(i)}/")]
        for i in range(config.num_layers)
    ]
    largest = (_dequantized_bytes(leaf, size) for block in blocks for leaf in block)
    dequantized = max(largest, default=0)
    hidden = rows * seq_len * config.mlp_size * size * (3 if config.gated else 2)
    # On CPU, attention runs one sequence and key head at a time; see `models.attention.in_chunks`.
    at_once = 1 if target.platform() == "cpu" else rows * config.num_kv_heads
    heads = at_once * config.num_heads // config.num_kv_heads
    scores = 2 * heads * seq_len**2 * 4
    logits = 3 * rows * min(CHUNK, seq_len) * config.vocab_size * 4
    found = {
        "base": base.nbytes(frozen),
        "trained": COPIES * base.nbytes(state.params),
        "activations": (config.num_layers + 1) * stream
        + max(logits, 2 * hidden + 4 * stream, scores + 6 * stream)
        + 4 * dequantized,
    }
    return {**found, "total": sum(found.values())}


def _dequantized_bytes(leaf: Any, size: int) -> int:
    """Bytes of the largest matrix that a kernel dequantizes when it is applied."""
    if isinstance(leaf, quantized.NFQuantized):
        return leaf.fan_in * leaf.fan_out * size
    if isinstance(leaf, base.Kernel):
        arrays = base.kernel_fields(leaf)[0]
        return max(_dequantized_bytes(getattr(leaf, name), size) for name in arrays)
    return 0


def compiled_bytes(
    config: ModelConfig, params: Any, recipe: Recipe, settings: Settings, seq_len: int
) -> dict[str, int]:
    """Returns the bytes of ``arguments`` and ``temporaries`` of the compiled step, and their total.

    The arguments are those of `abstract_state`. Takes as long as compiling the step.
    """
    state, frozen, batch = abstract_state(config, params, recipe, settings, seq_len)
    optimizer = recipes.optimizer(recipe, settings.steps)
    jitted: Any = step.make_step(config, optimizer, dtype=settings.dtype)
    memory = jitted.lower(state, frozen, batch).compile().memory_analysis()
    # The new state takes the donated memory of the old one.
    found = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
    }
    return {**found, "total": sum(found.values())}
