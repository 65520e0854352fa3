"""Token windows for the commands: from texts, sources or arrays of ids."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from lordjax.models.config import ModelConfig
from lordjax.scripts.opened_model import Model

WINDOW = 1024  # tokens per window of text, unless the model is shorter


# Of RoBERTa, of BERT.
MASK_TOKENS = ("<mask>", "[MASK]")


SEQUENCE_ENDS = (("<s>", "</s>"), ("[CLS]", "[SEP]"))


DOCUMENT_TOKENS = 2048  # of every module of the standard library: many styles, no long tables


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
