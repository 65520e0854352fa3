"""Reads GGUF, the file format of llama.cpp: config, tensors and tokenizer.

`architectures.registry` says for each GGUF architecture which Hugging Face model it is. To support
another one, add a row there.
"""

from lordjax.conversions.readers.gguf.reader import Gguf, open_gguf

__all__ = ["Gguf", "open_gguf"]
