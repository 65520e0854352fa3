"""Calibration windows that a model writes itself, kept in the cache of the command line.

A set of windows is a folder, whose name holds all that the ids depend on. Windows are written in
batches, each of which is one file of the folder as soon as it is finished. So a run that was killed
goes on with the next batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lordjax.runtime import json_files
from lordjax.scripts.console import say
from lordjax.scripts.opened_model import Model, model_checksums
from lordjax.scripts.program_cache import cache_directory, writable

if TYPE_CHECKING:
    from lordjax.runtime.progress import Progress

STAGE = "own text"
# Windows that are written at the same time. On CPU more of them are hardly faster.
BATCH, ACCELERATOR_BATCH = 16, 128


def own_windows(
    model: Model, *, windows: int, length: int, seed: int, progress: Progress | None = None
) -> np.ndarray:
    """Returns windows of the model's own text, from the cache or newly written.

    Of several processes, the first one writes them for all.

    Args:
      model: a causal model with a tokenizer.
      windows: number of windows.
      length: tokens of a window.
      seed: seed of the random draws.
      progress: called with the number of windows so far.

    Returns:
      Token ids ``[windows, length]``, int32.

    Raises:
      FileNotFoundError: if the model has no tokenizer.
      ValueError: if the model does not generate text, or a window is longer than its longest
        sequence.
    """
    from lordjax.runtime import multihost

    _check(model, length)
    if multihost.process_count() == 1:
        return _written(model, windows, length, seed, progress)
    own = b""
    if multihost.is_primary():
        own = _written(model, windows, length, seed, progress).tobytes()
    return np.frombuffer(multihost.all_gather_bytes(own)[0], np.int32).reshape(windows, length)


def _check(model: Model, length: int) -> None:
    config = model.config
    if config.head != "causal" or not config.causal:
        raise ValueError(
            f"self: {model.name} has head {config.head!r} and writes no text; give a path with "
            "--calibration"
        )
    if not 2 <= length <= config.max_positions:
        raise ValueError(
            f"self: windows of {length} tokens; expected 2 to {config.max_positions}, the model's "
            "longest sequence (--seq-len)"
        )


def _written(
    model: Model, windows: int, length: int, seed: int, progress: Progress | None
) -> np.ndarray:
    """Returns the windows, and keeps every finished batch."""
    folder = cache_folder(model, windows, length, seed)
    keep, found, write = writable(folder), [], None
    for i, numbers in enumerate(_batches(windows)):
        file = folder / f"{i:05}.safetensors"
        tokens = _kept(file, (len(numbers), length))
        if tokens is None:
            write = write or _writer(model, length, seed)
            tokens = write(numbers, _reporter(progress, numbers, windows, length))
            if keep:
                _keep(file, tokens)
        found.append(tokens)
    return np.concatenate(found)


def _reporter(
    progress: Progress | None, numbers: range, windows: int, length: int
) -> Callable[[int], None]:
    """Returns what turns tokens of every window of a batch into windows so far."""

    def report(tokens: int) -> None:
        if progress is not None:
            progress(STAGE, numbers.start + len(numbers) * tokens // length, windows)

    return report


def _batches(windows: int) -> Iterator[range]:
    """Yields the numbers of the windows of every batch, as many in each as can be."""
    import jax

    most = BATCH if jax.default_backend() == "cpu" else ACCELERATOR_BATCH
    edges = np.linspace(0, windows, -(-windows // most) + 1).round().astype(int).tolist()
    for start, end in itertools.pairwise(edges):
        yield range(start, end)


def _writer(
    model: Model, length: int, seed: int
) -> Callable[[range, Callable[[int], None]], np.ndarray]:
    """Returns a function that writes the windows of some numbers; it holds the whole model."""
    from lordjax.generation.own_text import write_windows, writing_of

    ends = model.generation_defaults().ends
    how = writing_of(model.tokenizer(), model.config.vocab_size, ends)
    params = model.arrays()

    def write(numbers: range, report: Callable[[int], None]) -> np.ndarray:
        return write_windows(
            model.config, params, how, numbers, length=length, seed=seed, progress=report
        )

    return write


def cache_folder(model: Model, windows: int, length: int, seed: int) -> Path:
    """Returns the folder of a set of windows in the cache."""
    import jax

    from lordjax.generation.own_text import VERSION

    # The tokenizer decides where documents start and end; kinds of devices round differently.
    facts = [model_checksums(model), _tokenizer_checksum(model), jax.devices()[0].device_kind]
    if generation := model.generation_config():  # it names end tokens
        facts.append(generation)
    checksum = hashlib.sha256(json_files.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    name = f"{checksum}-seed{seed}-{windows}x{length}-v{VERSION}"
    return cache_directory() / "own_text" / name


def _tokenizer_checksum(model: Model) -> str:
    tokenizer = model.tokenizer()
    facts = [tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.encode("")]
    return hashlib.sha256(json_files.dumps(facts, sort_keys=True).encode()).hexdigest()


def _kept(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Returns the windows of a file; None if there is none, or with a note if it is damaged."""
    from lordjax.data.token_windows import fingerprint
    from lordjax.storage.tensor_files import TensorFile

    if not file.exists():
        return None
    try:
        opened = TensorFile(file)
        tokens, expected = np.array(opened["tokens"]), opened.metadata["sha256"]
        if tokens.shape == shape and fingerprint(tokens) == expected:
            return tokens
        reason = "its content has another checksum"
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = str(error)
    say(f"note: {file} is damaged ({reason}); its windows are written again")
    return None


def _keep(file: Path, tokens: np.ndarray) -> None:
    from lordjax.data.token_windows import fingerprint
    from lordjax.storage.lock import lock_directory, unlock_directory
    from lordjax.storage.tensor_files import write_tensors

    try:
        lock = lock_directory(file.parent)
    except BlockingIOError:  # another process keeps the same windows
        return
    try:
        write_tensors(file, {"tokens": tokens}, {"sha256": fingerprint(tokens)})
    finally:
        unlock_directory(file.parent, lock)
