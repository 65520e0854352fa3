"""The table of ``lordjax demo``: size, perplexity and speed of a model, and a continued prompt."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from lordjax.scripts.console import progress_report, say
from lordjax.scripts.demo_model import WHEEL
from lordjax.scripts.opened_model import Model, file_bytes, open_model

DENSE = "dense"  # the original model
PROMPT = 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'
NEW = 32  # tokens generated after the prompt
REPEATS = 2  # timed runs; the fastest one counts


@dataclasses.dataclass(frozen=True)
class Variant:
    """Model that the demo makes.

    Attributes:
      method: name of a method, or `DENSE` for the original model.
      budget: kept fraction of the block weights, or bits per block weight for a quantizing method;
        None for `DENSE`.
    """

    method: str
    budget: float | None = None

    @property
    def name(self) -> str:
        """Name of the model's directory."""
        return self.method if self.budget is None else f"{self.method}-{self.budget:g}"


def measured(variant: Variant, directory: Path, evaluation: Any, tokenizer: Any) -> dict[str, Any]:
    """Row of the table: bytes on disk, perplexity, decoding speed, and a continued prompt.

    The weights are those on disk. Matrix products and activations are float32.

    Args:
      variant: the model.
      directory: where all models are.
      evaluation: token ids ``[windows, length]``.
      tokenizer: tokenizer of all models.
    """
    from lordjax.evaluate import perplexity
    from lordjax.generation.completion import tokenize
    from lordjax.generation.decode import decode
    from lordjax.kernels.kinds import astype
    from lordjax.scripts.report.parameters import block_linear, parameter_rows
    from lordjax.storage.saved_model import open_saved

    path = directory / variant.name
    say(f"measuring {path} on {len(evaluation)} windows of {evaluation.shape[1]} tokens")
    opened = open_model(str(path))
    params = astype(opened.arrays(), "float32")
    multiplied_out = in_shapes_of(open_model(str(directory / DENSE)), params)
    with progress_report() as progress:
        found = perplexity(
            opened.config, multiplied_out, evaluation, tokenizer_name=WHEEL, progress=progress
        )
    tokens, speed = decoded(opened.config, params, multiplied_out, tokenize(tokenizer, PROMPT))
    ends = [tokens.index(end) for end in opened.stop_tokens(tokenizer) if end in tokens]
    linear = block_linear(parameter_rows(opened.config, opened.leaves()))
    decode.clear_cache()  # the next model has other shapes and needs another program
    return {
        "name": variant.name,
        **dataclasses.asdict(variant),
        "kept": linear["kept"],
        "bits_per_weight": linear["bits_per_weight"],
        "bytes": file_bytes(path),
        "perplexity": found["perplexity"],
        "tokens_per_second": speed,
        "seconds": open_saved(path).report()["demo_seconds"],
        "text": tokenizer.decode(tokens[: min(ends, default=NEW)]),
        "protocol": found["protocol"],
    }


def in_shapes_of(model: Model, params: Any) -> Any:
    """Returns arrays of a model's shapes that compute the same as parameters of a compressed one.

    Kernels are multiplied out, and pruned neurons are zeros. So the perplexities of all models are
    computed by one compiled program, and one reads all prompts.
    """
    import jax
    import numpy as np

    from lordjax.kernels import trees
    from lordjax.kernels.base import is_kernel, materialize
    from lordjax.kernels.low_rank import LowRank
    from lordjax.kernels.quantized import LowRankPlusQuantized

    def whole(leaf: Any) -> Any:
        # Ranks are multiplied out on the host: each would need a program of its own.
        if isinstance(leaf, LowRankPlusQuantized):
            return whole(leaf.base) + whole(leaf.low_rank)
        if isinstance(leaf, LowRank):
            return whole(leaf.left) @ whole(leaf.right)
        return np.asarray(decode_weights(leaf) if is_kernel(leaf) else leaf)

    def padded(path: str, leaf: Any) -> Any:
        array = whole(leaf)
        missing = zip(leaves[path].shape, array.shape, strict=True)
        return np.pad(array, [(0, before - kept) for before, kept in missing])

    leaves, decode_weights = model.leaves(), jax.jit(materialize)
    return trees.unflatten(
        {path: padded(path, leaf) for path, leaf in trees.flatten(params).items()}
    )


def decoded(
    config: Any, params: Any, multiplied_out: Any, prompt: list[int]
) -> tuple[list[int], float]:
    """Greedily decodes `NEW` tokens after a prompt, and measures the speed.

    The fastest of `REPEATS` runs counts; compilation is not timed.

    Args:
      config: the architecture.
      params: parameters of the model that decodes.
      multiplied_out: the same model by `in_shapes_of`. It reads the prompt, by a program that all
        models share.
      prompt: token ids.

    Returns:
      The token ids, and the tokens per second after the first token.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lordjax.generation.decode import CHUNK, begin, decode
    from lordjax.generation.sampling import GREEDY

    def run(steps: int) -> tuple[list[int], float]:
        state, settings = begin(config, multiplied_out, [prompt], max_new_tokens=NEW)
        rows, start = [np.asarray(state.token)], time.perf_counter()
        for _ in range(0, NEW, CHUNK):
            state, out = decode(
                params, state, settings, jnp.asarray(steps), config=config, kind=GREEDY.kind
            )
            rows.append(np.asarray(out)[0])
        seconds = time.perf_counter() - start
        return [int(token) for token in np.concatenate(rows)[:NEW]], (NEW - 1) / seconds

    params, multiplied_out = jax.tree.map(jnp.asarray, (params, multiplied_out))
    run(0)  # compiles
    runs = [run(CHUNK) for _ in range(REPEATS)]
    return runs[0][0], max(speed for _, speed in runs)
