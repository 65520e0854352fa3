"""What the verbs of the command line share: models, checks, progress, output.

Nothing heavy is imported before it is needed: ``lordjax --help`` must be instant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from lordjax.models.config import ModelConfig
    from lordjax.models.source import Source
    from lordjax.runtime.progress import Progress

KEEP = 0.8  # share of the block linear weights that stays, where nothing is said
WINDOW = 1024  # tokens per window of text, unless the model is shorter
# Of RoBERTa, of BERT.
MASK_TOKENS = ("<mask>", "[MASK]")
SEQUENCE_ENDS = (("<s>", "</s>"), ("[CLS]", "[SEP]"))
DOCUMENT_TOKENS = 2048  # of every module of the standard library: many styles, no long tables


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as the verbs see it, wherever it comes from.

    Attributes:
      name: the path or hub id as it was given.
      path: where it is on this machine.
      kind: ``huggingface``, ``gguf``, ``native`` (ours, nothing compressed) or ``compressed``.
      config: what it is.
      hf_config: the same in Hugging Face's words.
      source: its parameters, a block at a time.
      params: all of its parameters.
      tokenizer: opens its tokenizer.
      write_tokenizer: writes the tokenizer's files into a directory.
      leaves: parameter path -> kernel or ``ShapeDtypeStruct``, without reading weights if possible.
    """

    name: str
    path: Path
    kind: str
    config: ModelConfig
    hf_config: dict[str, Any]
    source: Source
    params: Callable[[], Any]
    tokenizer: Callable[[], Any]
    write_tokenizer: Callable[[Path], None]
    leaves: Callable[[], dict[str, Any]]

    def arrays(self) -> dict[str, Any]:
        """All of its parameters where jax computes, read a block at a time: never held twice."""
        import jax
        import jax.numpy as jnp

        def placed(tree: Any) -> Any:
            return jax.block_until_ready(jax.tree.map(jnp.asarray, tree))

        blocks = {f"layer_{i}": placed(self.source.block(i)) for i in range(self.config.num_layers)}
        return placed(self.source.rest()) | blocks


def open_model(name: str) -> Model:
    """Opens a Hugging Face directory or hub id, a GGUF file or a directory of ours.

    Raises:
      FileNotFoundError: if there is no such model.
      ValueError: if it cannot be read or is not supported.
    """
    from lordjax.storage import saved_model

    quiet_transformers()
    path = Path(name).expanduser()
    return _native(name, path) if saved_model.is_compressed(path) else _original(name)


def _original(name: str) -> Model:
    from lordjax.conversions.readers.checkpoint import open_checkpoint

    opened = open_checkpoint(name)
    return Model(
        name=name,
        path=opened.path,
        kind="gguf" if opened.path.suffix == ".gguf" else "huggingface",
        config=opened.config,
        hf_config=opened.hf_config,
        source=opened,
        params=opened.params,
        tokenizer=opened.tokenizer,
        write_tokenizer=opened.tokenizer_files,
        leaves=opened.leaves,
    )


def _native(name: str, path: Path) -> Model:
    from lordjax.conversions.readers.checkpoint import DirectoryTokenizer
    from lordjax.storage import saved_model

    saved = saved_model.open_saved(path)
    tokens = DirectoryTokenizer(path)
    return Model(
        name=name,
        path=path,
        kind="native" if saved.is_original() else "compressed",
        config=saved.config,
        hf_config=saved.hf_config,
        source=saved,
        params=saved.params,
        tokenizer=tokens.tokenizer,
        write_tokenizer=tokens.tokenizer_files,
        leaves=saved.leaves,
    )


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights."""
    if path.is_file():
        return [path]
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


def file_bytes(path: Path) -> int:
    """Size of the files that hold a model's weights."""
    return sum(file.stat().st_size for file in weight_files(path))


def model_checksums(path: Path) -> dict[str, str]:
    """File -> sha256, of a model's weights and ``config.json``."""
    from lordjax.storage.tensor_files import checksum

    files = [*weight_files(path), *path.glob("config.json")]
    return {file.name: checksum(file).sha256 for file in files}


def directory_bytes(path: Path) -> int:
    """Size of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def quiet_transformers() -> None:
    """Texts longer than a model's context are cut into windows here; no need to warn of them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def window_length(path: Any, asked: int | None, config: ModelConfig) -> int:
    """What was asked for, else an array's own length, else `WINDOW` or the model's context."""
    from lordjax.data.token_windows import array_length

    own = None if path is None else array_length(path)
    return asked or own or min(WINDOW, config.max_positions)


def read_tokens(
    model: Model, path: str | None, *, seq_len: int | None, samples: int | None, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Token windows of a path (None: the Python standard library), and what they are.

    Windows of text for an encoder begin and end as its sequences do.
    """
    import numpy as np

    from lordjax.data.token_windows import fingerprint, load_tokens, standard_library

    is_array = path is not None and Path(path).suffix == ".npy"
    # Ids need no tokenizer, and a model may come without one.
    tokenizer = None if is_array else model.tokenizer()
    ends = [] if is_array or model.config.causal else sequence_ends(tokenizer)
    tokens = load_tokens(
        standard_library() if path is None else path,
        tokenizer=tokenizer,
        seq_len=window_length(path, seq_len, model.config) - len(ends),
        vocab_size=model.config.vocab_size,
        samples=samples,
        document_tokens=DOCUMENT_TOKENS if path is None else None,
        seed=seed,
    )
    if ends:
        first, last = (np.full((len(tokens), 1), end, tokens.dtype) for end in ends)
        tokens = np.concatenate([first, tokens, last], axis=1)
    what = path or f"Python {sys.version_info.major}.{sys.version_info.minor} standard library"
    windows, length = tokens.shape
    facts = {"source": what, "windows": windows, "seq_len": length}
    facts |= {"sequence_ends": ends} if ends else {}
    return tokens, facts | {"tokens_sha256": fingerprint(tokens)}


def sequence_ends(tokenizer: Any) -> list[int]:
    """The ids that stand before and behind every sequence of an encoder; none if not known."""
    vocabulary = tokenizer.get_vocab()
    for pair in ((tokenizer.cls_token, tokenizer.sep_token), *SEQUENCE_ENDS):
        if all(name in vocabulary for name in pair):
            return [vocabulary[name] for name in pair]
    return []


def mask_token(model: Model) -> int | None:
    """The id of the mask token, of a model that predicts masked tokens; else None.

    A ``tokenizer.json`` alone does not say which token that is, so known names are looked for.

    Raises:
      FileNotFoundError: if the model has no tokenizer.
      ValueError: if the tokenizer has no mask token.
    """
    if model.config.head != "masked":
        return None
    tokenizer = model.tokenizer()
    names, vocabulary = [tokenizer.mask_token, *MASK_TOKENS], tokenizer.get_vocab()
    found = [vocabulary[name] for name in names if name in vocabulary]
    if not found:
        raise ValueError(
            f"{model.name}: the model predicts masked tokens, but its tokenizer has no mask_token, "
            f"and none of {', '.join(MASK_TOKENS)}; name it in tokenizer_config.json"
        )
    return found[0]


def protocol_tokens(
    data: str | Path, domain: str, calibration: int, windows: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first calibration and evaluation windows of a benchmark's domain, token ids."""
    import numpy as np

    counts = {"calib": calibration, "eval": windows}
    first, second = (np.load(Path(data) / f"{n}_{domain}.npy")[:k] for n, k in counts.items())
    return first, second


def environment() -> dict[str, str]:
    """Where a number was measured: commit, device, versions, dtype."""
    import platform

    import jax

    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        commit = found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "commit": commit,
        "device": str(jax.devices()[0].device_kind),
        "cores": str(os.cpu_count()),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "dtype": "float32",
    }


def check_output(directory: Path) -> None:
    """Checks that a model can be written to a directory, before anything expensive is done.

    Raises:
      FileExistsError: if something is there already.
      PermissionError: if it cannot be made.
    """
    from lordjax.storage.atomic_directory import check_destination

    check_destination(directory)
    parent = directory.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"{directory}: cannot be made, {parent} is not a writable directory")


def check_file(name: str) -> None:
    """Checks that a new file can be written; errors as of `check_output`."""
    if Path(name).expanduser().exists():
        raise FileExistsError(f"{name}: exists; choose another output or remove it")
    check_output(Path(name).expanduser())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a ``.jsonl`` file: all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(fresh, path)


def size(count: int | float) -> str:
    """Bytes as people read them: ``98.4 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def say(text: str) -> None:
    """A line for people, on stderr: stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_report() -> Iterator[Progress]:
    """Progress on stderr: bars on a terminal, else a line per stage and every ten seconds."""
    if not sys.stderr.isatty():
        yield _progress_lines()
        return
    from rich import progress as rich
    from rich.console import Console

    columns = [rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()]
    columns += [rich.TimeElapsedColumn(), rich.TimeRemainingColumn()]
    with rich.Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks or done < bars.tasks[tasks[stage]].completed:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _progress_lines() -> Progress:
    last: dict[str, float] = {}

    def report(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - last.get(stage, -10.0) >= 10:
            last[stage] = now
            say(f"{stage}: {done}/{total}")

    return report
