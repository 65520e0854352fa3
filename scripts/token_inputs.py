"""Tokens that the commands read: from texts, source files or arrays of ids."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lordjax.data.record_files import FIELD
from lordjax.models.config import ModelConfig
from lordjax.scripts.console import say
from lordjax.scripts.opened_model import Model

if TYPE_CHECKING:
    from lordjax.data.token_windows import Windows

WINDOW = 1024  # tokens of a window of text; less if the model's longest sequence is shorter
MASK_TOKENS = ("<mask>", "[MASK]")  # of RoBERTa and BERT
SEQUENCE_ENDS = (("<s>", "</s>"), ("[CLS]", "[SEP]"))
# First tokens of a standard library module that are read, so that no long table dominates.
DOCUMENT_TOKENS = 2048


def window_length(path: Any, asked: int | None, config: ModelConfig) -> int:
    """Returns the number of tokens of a window.

    Args:
      path: data; the default of a .npy array is its own length.
      asked: the length that a flag gives, if any.
      config: architecture of the model; the default for text is `WINDOW`, or its longest sequence.
    """
    from lordjax.data.token_windows import array_length

    own = None if path is None else array_length(path)
    return asked or own or min(WINDOW, config.max_positions)


def check_length(length: int, config: ModelConfig) -> None:
    """Checks windows against the model's longest sequence.

    Rotary positions exist beyond it, but nobody trained them; so a note says it.

    Args:
      length: tokens of a window.
      config: architecture of the model.

    Raises:
      ValueError: if the model has learned positions, and fewer of them.
    """
    from lordjax.runtime import multihost

    most = config.max_positions
    if length <= most:
        return
    if config.position_rows is not None:
        raise ValueError(
            f"windows of {length} tokens, but the model has learned {most} positions; choose "
            f"--seq-len {most} or less"
        )
    if multihost.is_primary():
        say(
            f"note: windows of {length} tokens, but the model's longest sequence is {most}: it was "
            f"not trained on positions beyond that; --seq-len {most} or less keeps to them"
        )


def read_tokens(
    model: Model,
    path: str | None,
    *,
    seq_len: int | None,
    samples: int | None,
    seed: int,
    field: str = FIELD,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Reads windows of tokens. Windows for an encoder begin and end with its special tokens.

    Args:
      model: the model, whose tokenizer is used.
      path: text, source files or a .npy array; None: the Python standard library.
      seq_len: tokens of a window; None: see `window_length`.
      samples: largest number of windows; None: all.
      seed: seed that draws the documents.
      field: name of the text in a record.

    Returns:
      token ids ``[windows, length]``, and facts about them for a report.
    """
    from lordjax.data.token_windows import fingerprint

    length = window_length(path, seq_len, model.config)
    check_length(length, model.config)
    found, ends = read_windows(
        model,
        path,
        length=length,
        samples=samples,
        seed=seed,
        document_tokens=DOCUMENT_TOKENS,
        field=field,
    )
    windows, length = found.tokens.shape
    facts = {"source": path or standard_library_name(), "windows": windows, "seq_len": length}
    facts |= {"sequence_ends": ends} if ends else {}
    return found.tokens, facts | {"tokens_sha256": fingerprint(found.tokens)}


def read_windows(
    model: Model,
    path: str | None,
    *,
    length: int,
    samples: int | None,
    seed: int,
    document_tokens: int | None = None,
    spread: bool = False,
    field: str = FIELD,
) -> tuple[Windows, list[int]]:
    """Reads windows, with the special tokens of an encoder around text.

    Args:
      model: the model, whose tokenizer is used.
      path: text, source files or a .npy array; None: the Python standard library.
      length: tokens of a window.
      samples: largest number of windows; None: all.
      seed: seed that draws the documents.
      document_tokens: first tokens of a standard library module that are read; None: all.
      spread: takes the windows from as many documents as possible; see `load_tokens`.
      field: name of the text in a record.

    Returns:
      The windows, and the special tokens around each of them.
    """
    import numpy as np

    from lordjax.data.token_windows import load_windows, standard_library

    is_array = path is not None and Path(path).suffix == ".npy"
    # Ids need no tokenizer, and a model may come without one.
    tokenizer = None if is_array else model.tokenizer()
    ends = [] if is_array or model.config.causal else sequence_ends(tokenizer)
    found = load_windows(
        standard_library() if path is None else path,
        tokenizer=tokenizer,
        seq_len=length - len(ends),
        vocab_size=model.config.vocab_size,
        samples=samples,
        document_tokens=document_tokens if path is None else None,
        seed=seed,
        spread=spread,
        field=field,
    )
    if ends:
        tokens = found.tokens
        first, last = (np.full((len(tokens), 1), end, tokens.dtype) for end in ends)
        found = found._replace(tokens=np.concatenate([first, tokens, last], axis=1))
    return found, ends


def standard_library_name() -> str:
    """Returns the name of the Python standard library for reports."""
    return f"Python {sys.version_info.major}.{sys.version_info.minor} standard library"


def sequence_ends(tokenizer: Any) -> list[int]:
    """Returns the ids of an encoder's first and last token of a sequence; empty if unknown."""
    vocabulary = tokenizer.get_vocab()
    for pair in ((tokenizer.cls_token, tokenizer.sep_token), *SEQUENCE_ENDS):
        if all(name in vocabulary for name in pair):
            return [vocabulary[name] for name in pair]
    return []


def mask_token(model: Model) -> int | None:
    """Returns the id of the mask token; None if the model does not predict masked tokens.

    A ``tokenizer.json`` alone does not name the mask token, so known names are looked for.

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
