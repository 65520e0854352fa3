"""llama.cpp itself, through the C functions of the library that the package xllamacpp ships.

Structs of parameters are passed as llama.cpp's own defaults in a larger block of bytes. Some of
their numbers are replaced; where these stand is that of the version in pyproject.toml, and is
checked by their defaults.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest

# Place of a number in the parameters of a context -> its default, and what we set; None: as many as
# there are tokens. Threads are 1, keys and values F32.
_NUMBERS = {
    0: (512, None),
    1: (2048, None),
    2: (512, None),  # n_ctx, n_batch, n_ubatch
    5: (0, None),
    6: (1, None),  # n_outputs_max, and per sequence
    7: (4, 1),
    8: (4, 1),
    26: (1, 0),
    27: (1, 0),  # n_threads, and of a batch; type_k, type_v
}


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


@functools.cache
def _library():
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama.cpp is not installed: pip install 'lordjax[llamacpp]'")
    (file,) = Path(spec.origin).parent.glob("xllamacpp*.so")
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


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, data: None
)


class Model:
    """A GGUF file that llama.cpp has opened, on one thread of the CPU."""

    def __init__(self, path):
        self._lib = _library()
        given = self._lib.llama_model_default_params()
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), given)
        if not self._model:
            raise ValueError(f"{path}: llama.cpp does not open it")
        self._vocab = ctypes.c_void_p(self._lib.llama_model_get_vocab(ctypes.c_void_p(self._model)))
        self.rows = self._lib.llama_vocab_n_tokens(self._vocab)

    def logits(self, tokens):
        """``[L, vocab]`` of a sequence ``[L]``."""
        count = len(tokens)
        given = self._lib.llama_context_default_params()
        numbers = ctypes.cast(given.bytes, ctypes.POINTER(ctypes.c_int32))
        for at, (default, value) in _NUMBERS.items():
            assert numbers[at] == default, "another version of llama.cpp"
            numbers[at] = count if value is None else value
        context = ctypes.c_void_p(
            self._lib.llama_init_from_model(ctypes.c_void_p(self._model), given)
        )
        batch = self._lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert self._lib.llama_decode(context, batch) == 0
        found = np.ctypeslib.as_array(
            self._lib.llama_get_logits(context), (count, self.rows)
        ).copy()
        self._lib.llama_batch_free(batch)
        self._lib.llama_free(context)
        return found

    def tokenize(self, text):
        """Token ids of a text, with the tokens that the file adds."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        given = (self._vocab, data, len(data), ids, len(ids), True, True)
        return list(ids[: self._lib.llama_tokenize(*given)])

    def close(self):
        self._lib.llama_model_free(ctypes.c_void_p(self._model))
