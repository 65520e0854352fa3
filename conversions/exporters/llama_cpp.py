"""llama.cpp itself, through the C functions of the library that the package xllamacpp ships.

Structs of parameters are passed as llama.cpp's own defaults in a larger block of bytes. Some of
their numbers are replaced. Where these stand is that of `VERSION`, so no other one is used.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE, VERSION = "xllamacpp", "2026.10.11549"  # as in the extra `llamacpp`
# Place of a number in the parameters of a context -> its default.
_DEFAULTS = {0: 512, 1: 2048, 2: 512, 5: 0, 6: 1, 7: 4, 8: 4, 26: 1, 27: 1}
_TOKENS = (0, 1, 2, 5, 6)  # n_ctx, n_batch, n_ubatch; outputs at most, and per sequence
_THREADS = (7, 8)  # n_threads, and of a batch
_CACHE = (26, 27)  # type_k, type_v: 0 is F32, 1 is F16


def is_installed() -> bool:
    """Returns whether the version of llama.cpp is installed that this module can call."""
    if importlib.util.find_spec(PACKAGE) is None:
        return False
    return importlib.metadata.version(PACKAGE) == VERSION


class _Bytes(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * 1024),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, data: None
)


@functools.cache
def _library() -> Any:
    spec = importlib.util.find_spec(PACKAGE)
    if not is_installed() or spec is None or spec.origin is None:
        raise ImportError(
            f"llama.cpp needs {PACKAGE}=={VERSION}, which is not installed; pip install "
            "'lordjax[llamacpp]'"
        )
    (file,) = (
        path for path in Path(spec.origin).parent.glob(f"{PACKAGE}*") if path.suffix != ".py"
    )
    lib = ctypes.CDLL(str(file))
    for name in ("model_default_params", "context_default_params"):
        getattr(lib, f"llama_{name}").restype = _Bytes
    for name in ("model_load_from_file", "init_from_model", "model_get_vocab"):
        getattr(lib, f"llama_{name}").restype = ctypes.c_void_p
    lib.llama_batch_init.restype = _Batch
    lib.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    lib.llama_log_set(_SILENT, None)
    lib.llama_backend_init()
    return lib


class LlamaCpp:
    """A GGUF file that llama.cpp has opened, on the CPU.

    Args:
      path: the file.

    Raises:
      ImportError: if llama.cpp is not installed.
      ValueError: if llama.cpp does not open the file.
    """

    def __init__(self, path: Path):
        self._lib = _library()
        given = self._lib.llama_model_default_params()
        model = self._lib.llama_model_load_from_file(str(path).encode(), given)
        if not model:
            raise ValueError(f"{path}: llama.cpp does not open it; export it again")
        self._model = ctypes.c_void_p(model)
        self._vocab = ctypes.c_void_p(self._lib.llama_model_get_vocab(self._model))
        self.rows = self._lib.llama_vocab_n_tokens(self._vocab)

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns the logits ``[L, vocab]`` of a sequence ``[L]``, on one thread."""
        context = Context(self, len(tokens))
        found = context.decode(tokens, last=False)
        context.close()
        return found

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text, with the tokens that the file adds."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        given = (self._vocab, data, len(data), ids, len(ids), True, True)
        return list(ids[: self._lib.llama_tokenize(*given)])

    def close(self) -> None:
        """Frees the model."""
        self._lib.llama_model_free(self._model)


class Context:
    """A sequence with its key/value cache in F32.

    Args:
      model: the model.
      length: most tokens of the sequence.
      threads: number of threads.
    """

    def __init__(self, model: LlamaCpp, length: int, threads: int = 1):
        self._lib, self._rows, self._length, self._done = model._lib, model.rows, length, 0
        given = self._lib.llama_context_default_params()
        numbers = ctypes.cast(given.bytes, ctypes.POINTER(ctypes.c_int32))
        for at, default in _DEFAULTS.items():
            assert numbers[at] == default, "not the parameters of this version"
        own = dict.fromkeys(_TOKENS, length) | dict.fromkeys(_THREADS, threads)
        for at, number in (own | dict.fromkeys(_CACHE, 0)).items():
            numbers[at] = number
        self._context = ctypes.c_void_p(self._lib.llama_init_from_model(model._model, given))
        self._batch = self._lib.llama_batch_init(length, 0, 1)

    def decode(self, tokens: Sequence[int] | np.ndarray, *, last: bool = True) -> np.ndarray:
        """Reads further tokens; returns the logits of the last one ``[1, vocab]``, or of all.

        Raises:
          ValueError: if the sequence becomes too long, or llama.cpp reports an error.
        """
        count, batch = len(tokens), self._batch
        if self._done + count > self._length:
            raise ValueError(f"{self._done + count} tokens; expected at most {self._length}")
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = int(token), self._done + i
            batch.logits[i] = not last or i == count - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if (code := self._lib.llama_decode(self._context, batch)) != 0:
            raise ValueError(f"llama.cpp cannot decode {count} tokens (code {code})")
        self._done += count
        shape = (1 if last else count, self._rows)
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), shape).copy()

    def close(self) -> None:
        """Frees the cache."""
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
