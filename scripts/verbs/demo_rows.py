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


def measured(variant: Variant, directory: Path, evaluation: Any) -> dict[str, Any]:
    """Row of the table: bytes on disk, perplexity, decoding speed, and a continued prompt.

    The weights are those on disk. Matrix products and activations are float32.
    """
    from lordjax.evaluate import perplexity
    from lordjax.generation.completion import end_tokens, tokenize
    from lordjax.generation.decode import decode, prefill
    from lordjax.kernels.kinds import astype
    from lordjax.scripts.verbs.inspect import inspect_model
    from lordjax.storage.saved_model import open_saved

    path = directory / variant.name
    say(f"measuring {path} on {len(evaluation)} windows of {evaluation.shape[1]} tokens")
    opened = open_model(str(path))
    params, tokenizer = astype(opened.arrays(), "float32"), opened.tokenizer()
    dense = in_shapes_of(open_model(str(directory / DENSE)), params)
    with progress_report() as progress:
        found = perplexity(
            opened.config, dense, evaluation, tokenizer_name=WHEEL, progress=progress
        )
    del dense
    tokens, speed = decoded(opened.config, params, tokenize(tokenizer, PROMPT))
    ends = [tokens.index(end) for end in end_tokens(tokenizer) if end in tokens]
    linear = inspect_model(str(path))["block_linear"]
    for program in (prefill, decode):  # the next model has other shapes and needs other programs
        program.clear_cache()
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
    computed by one compiled program.
    """
    import jax
    import numpy as np

    from lordjax.kernels import trees
    from lordjax.kernels.base import materialize

    def padded(path: str, leaf: Any) -> Any:
        array = np.asarray(multiplied_out(leaf))
        missing = zip(leaves[path].shape, array.shape, strict=True)
        return np.pad(array, [(0, whole - kept) for whole, kept in missing])

    leaves, multiplied_out = model.leaves(), jax.jit(materialize)
    with jax.default_matmul_precision("highest"):
        return trees.unflatten(
            {path: padded(path, leaf) for path, leaf in trees.flatten(params).items()}
        )


def decoded(config: Any, params: Any, prompt: list[int]) -> tuple[list[int], float]:
    """Greedily decodes `NEW` tokens after a prompt, and measures the speed.

    The first run compiles and is not timed. The fastest of the `REPEATS` other runs counts.

    Returns:
      The token ids, and the tokens per second after the first token.
    """
    from lordjax.generation.decode import stream

    tokens: list[int] = []
    speeds = []
    for _ in range(1 + REPEATS):
        chunks = stream(config, params, [prompt], max_new_tokens=NEW)
        first = next(chunks)
        start = time.perf_counter()
        rows = [first, *chunks]
        speeds.append((NEW - 1) / (time.perf_counter() - start))
        tokens = [int(token) for row in rows for token in row[0]]
    return tokens[:NEW], max(speeds[1:])
