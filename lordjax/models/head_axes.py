"""The modules of a block as arrays with head axes, as `methods.modular` wants them, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lordjax.models.config import ModelConfig
from lordjax.models.sites import LAST_LAYER

# Name in head form -> parameter, and which axis is split into heads: ``h`` or ``k``, the last into
# query or key heads; ``H``, the one before it into query heads.
_LEAVES: dict[str, dict[str, tuple[str, str]]] = {
    "qk": {
        "q": ("attention/q/kernel", "h"),
        "k": ("attention/k/kernel", "k"),
        "q_bias": ("attention/q/bias", "h"),
        "k_bias": ("attention/k/bias", "k"),
    },
    "vo": {
        "v": ("attention/v/kernel", "k"),
        "o": ("attention/o/kernel", "H"),
        "v_bias": ("attention/v/bias", "k"),
    },
    "mlp": {
        "gate": ("mlp/gate/kernel", ""),
        "up": ("mlp/up/kernel", ""),
        "down": ("mlp/down/kernel", ""),
        "gate_bias": ("mlp/gate/bias", ""),
        "up_bias": ("mlp/up/bias", ""),
    },
}
LAST_NAME = {"vo": "o", "mlp": "down"}  # what `sites.LAST_LAYER` is called in head form
ROPE_INDEX = "attention/rope_index"


def gather(kind: str, flat: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A module's arrays in head form.

    Args:
      kind: ``qk``, ``vo`` or ``mlp``.
      flat: parameters of the block by path.
      config: number of heads.

    Returns:
      name -> array; absent biases and gates are absent. Rotary queries and keys come with
      ``rope_index`` ``[k, d/2]``, the frequencies that their pairs turn at.
    """
    heads = {"h": config.num_heads, "k": config.num_kv_heads}
    found = {}
    for name, (path, axes) in _LEAVES[kind].items():
        if path not in flat:
            continue
        a = flat[path]
        if axes in heads:
            a = a.reshape(*a.shape[:-1], heads[axes], -1)
        elif axes == "H":
            a = a.reshape(config.num_heads, -1, a.shape[-1])
        found[name] = a
    if kind == "qk" and config.rope is not None:
        found["rope_index"] = flat.get(ROPE_INDEX, _all_pairs(config))
    return found


def _all_pairs(config: ModelConfig) -> np.ndarray:
    """The rotary pairs of every key head, ``[k, d/2]``."""
    pairs = np.arange(config.head_size // 2, dtype=np.int32)
    return np.tile(pairs, (config.num_kv_heads, 1))


def scatter(kind: str, new: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by path with a module's new arrays in their place, in the old ones' dtypes.

    Args:
      kind: as for `gather`.
      new: arrays in head form; ``out_bias`` is added to the last layer's bias.
      flat: parameters of the block by path; untouched.
    """
    table = dict(flat)
    for name, value in new.items():
        if name in ("out_bias", "rope_index"):
            continue
        path, axes = _LEAVES[kind][name]
        a = np.asarray(value, flat[path].dtype)
        if axes == "H":
            a = a.reshape(-1, a.shape[-1])
        elif axes:
            a = a.reshape(*a.shape[:-2], -1)
        table[path] = a
    if "rope_index" in new:
        table[ROPE_INDEX] = np.asarray(new["rope_index"], np.int32)
    if "out_bias" in new:
        kernel = LAST_LAYER[kind]
        bias = kernel.replace("/kernel", "/bias")
        total = np.asarray(new["out_bias"]) + np.asarray(flat.get(bias, 0))
        table[bias] = np.asarray(total, flat[kernel].dtype)
    return table


def widen(kind: str, new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """A narrow module in arrays of its former shapes, filled up with zeros: the same function.

    Args:
      kind: as for `gather`.
      new: the narrow module's arrays, in head form.
      old: the arrays it was made of.
    """
    wide = {name: new[name] for name in new if name == "out_bias"}
    for name in set(new) & set(old) - {"rope_index"}:
        a = np.asarray(new[name])
        full: Any = np.zeros(old[name].shape, a.dtype)
        if "rope_index" in new:
            at = _columns(new["rope_index"], old["rope_index"])  # [k, width]
            at = np.repeat(at, full.shape[-2] // len(at), axis=0)
            at = at.reshape((1,) * (full.ndim - 2) + at.shape)
            np.put_along_axis(full, np.broadcast_to(at, a.shape), a, axis=-1)
        else:
            full[tuple(slice(n) for n in a.shape)] = a
        wide[name] = full
    return wide


def _columns(kept: Any, all_pairs: Any) -> np.ndarray:
    """Where the columns of kept rotary pairs were, half-split like the columns themselves."""
    kept, all_pairs = np.asarray(kept), np.asarray(all_pairs)
    at = np.argmax(kept[:, :, None] == all_pairs[:, None], axis=2)
    return np.concatenate([at, at + all_pairs.shape[1]], axis=1)


def narrowed(
    kind: str, flat: Mapping[str, Any], width: int, config: ModelConfig, *, bias: bool
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype, by path, of what `scatter` puts in for a module of another width.

    Args:
      kind: as for `gather`.
      flat: parameters of the block by path, or their shapes.
      width: of a head, or inside the MLP.
      config: number of heads.
      bias: whether the method corrects the last layer's bias.
    """
    heads = {"h": config.num_heads, "k": config.num_kv_heads, "H": config.num_heads, "": 1}
    new: dict[str, tuple[tuple[int, ...], Any]] = {}
    for name, (path, axes) in _LEAVES[kind].items():
        if path in flat:
            shape, inner = list(flat[path].shape), heads[axes] * width
            shape[0 if name == LAST_NAME.get(kind) else -1] = inner
            new[path] = tuple(shape), flat[path].dtype
    if kind == "qk" and config.rope is not None:
        new[ROPE_INDEX] = (config.num_kv_heads, width // 2), np.int32
    if bias or (kind == "vo" and "attention/v/bias" in flat):
        kernel = flat[LAST_LAYER[kind]]
        new[LAST_LAYER[kind].replace("/kernel", "/bias")] = (kernel.shape[1],), kernel.dtype
    return new


def places(
    flat: Mapping[str, Any], config: ModelConfig
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Which inputs and outputs of the original layers those of a block are.

    Args:
      flat: parameters of the block by path, kernels of any kind.
      config: the original sizes.

    Returns:
      kernel's path -> (inputs, outputs), as numbers; a model with zeros elsewhere is the same.
    """
    heads = {"h": config.num_heads, "k": config.num_kv_heads}
    found = {}
    for kind, leaves in _LEAVES.items():
        for name, (path, axes) in leaves.items():
            if path not in flat or not path.endswith("/kernel"):
                continue
            is_last = name == LAST_NAME.get(kind)
            rows, columns = (np.arange(size) for size in flat[path].shape)
            inner = rows if is_last else columns
            if axes:
                pairs = flat.get(ROPE_INDEX) if kind == "qk" else None
                inner = _head_columns(len(inner), heads[axes.lower()], pairs, config)
            found[path] = (inner, columns) if is_last else (rows, inner)
    return found


def _head_columns(size: int, heads: int, pairs: Any, config: ModelConfig) -> np.ndarray:
    """Where the columns of heads were: the first of each, or those of kept rotary pairs."""
    own = np.tile(np.arange(size // heads), (heads, 1))
    if pairs is not None:
        kept = _columns(pairs, _all_pairs(config))
        own = np.repeat(kept, heads // len(kept), axis=0)
    return (own + config.head_size * np.arange(heads)[:, None]).reshape(-1)
