"""Takes queries, keys and values that a file stores as one matrix apart."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from lordjax.conversions.readers.gguf.architectures.row import Architecture
from lordjax.conversions.readers.gguf.header import StoredTensor

_FUSED = "attn_qkv"


def apart(
    tensors: Mapping[str, StoredTensor], row: Architecture, queries: int, keys: int
) -> dict[str, StoredTensor]:
    """Returns the tensors with ``attn_q``, ``attn_k`` and ``attn_v`` in place of ``attn_qkv``.

    llama.cpp reads either form. Rows follow each other in a file, so every part is a range of its
    bytes. Nothing changes if the architecture's Hugging Face model has one matrix, too, or if the
    number of rows is another one.

    Args:
      tensors: tensors by their names in the file.
      row: the architecture.
      queries: rows of the queries.
      keys: rows of the keys, and of the values.
    """
    if _FUSED in row.tensors or "attn_q" not in row.tensors:
        return dict(tensors)
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"(blk\.\d+\.){_FUSED}(\.weight|\.bias)", name)
        if match is None or not tensor.shape or tensor.shape[0] != queries + 2 * keys:
            found[name] = tensor
            continue
        each, offset = tensor.nbytes // tensor.shape[0], tensor.offset
        for part, rows in (("attn_q", queries), ("attn_k", keys), ("attn_v", keys)):
            own, shape = f"{match[1]}{part}{match[2]}", (rows, *tensor.shape[1:])
            found[own] = dataclasses.replace(
                tensor, name=own, shape=shape, offset=offset, nbytes=rows * each
            )
            offset += rows * each
    return found
