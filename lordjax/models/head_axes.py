"""Reshapes the modules of a block to arrays with head axes and back.

`methods.modular` works on arrays in this *head form*.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lordjax.models.config import ModelConfig
from lordjax.models.sites import LAST_LAYER

_ATTENTION = {"q": "h", "k": "k", "v": "k", "o": "H"}
# Name in head form -> parameter path, and the axis that is split into heads. ``h``: the last axis
# into query heads; ``k``: the last into key heads; ``H``: the one before the last into query heads.
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
    "heads": {
        **{name: (f"attention/{name}/kernel", axes) for name, axes in _ATTENTION.items()},
        **{f"{name}_bias": (f"attention/{name}/bias", _ATTENTION[name]) for name in "qkv"},
    },
    "mlp": {
        "gate": ("mlp/gate/kernel", ""),
        "up": ("mlp/up/kernel", ""),
        "down": ("mlp/down/kernel", ""),
        "gate_bias": ("mlp/gate/bias", ""),
        "up_bias": ("mlp/up/bias", ""),
    },
}
LAST_NAME = {"vo": "o", "heads": "o", "mlp": "down"}  # the name of `sites.LAST_LAYER` in head form
ROPE_INDEX = "attention/rope_index"


def gather(kind: str, flat: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns a module's arrays in head form.

    Args:
      kind: kind of the module: ``qk``, ``vo``, ``heads`` or ``mlp``.
      flat: parameters of the block by path.
      config: the architecture, for the numbers of heads.

    Returns:
      name -> array, without biases and gates that the block does not have. With rotary positions,
      ``qk`` has ``rope_index`` ``[k, d/2]``: the index of every pair's frequency.
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
    """Indices of all rotary pairs, for every key head: ``[k, d/2]``."""
    pairs = np.arange(config.head_size // 2, dtype=np.int32)
    return np.tile(pairs, (config.num_kv_heads, 1))


def scatter(kind: str, new: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the block's parameters with a module's arrays replaced; dtypes stay the same.

    Args:
      kind: kind of the module: ``qk``, ``vo``, ``heads`` or ``mlp``.
      new: arrays in head form; ``out_bias`` is added to the last layer's bias.
      flat: parameters of the block by path; they are not changed.
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
    """Zero-pads a pruned module to its original shapes; it computes the same function.

    Args:
      kind: kind of the module: ``qk``, ``vo``, ``heads`` or ``mlp``.
      new: arrays of the pruned module, in head form.
      old: arrays of the original module, in head form.
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
    """Original columns of the kept rotary pairs; the halves of a pair are half a head apart."""
    kept, all_pairs = np.asarray(kept), np.asarray(all_pairs)
    at = np.argmax(kept[:, :, None] == all_pairs[:, None], axis=2)
    return np.concatenate([at, at + all_pairs.shape[1]], axis=1)


def narrowed(
    kind: str, flat: Mapping[str, Any], width: int, config: ModelConfig, *, bias: bool
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Returns shape and dtype of the parameters that `scatter` writes for a pruned module.

    Args:
      kind: kind of the module: ``qk``, ``vo``, ``heads`` or ``mlp``.
      flat: parameters of the block by path, or their shapes.
      width: new width of a head, or of the MLP; for ``heads``, the number of key/value heads.
      config: the architecture, for the numbers of heads.
      bias: whether the method corrects the last layer's bias.

    Returns:
      parameter path -> (shape, dtype).
    """
    heads = {"h": config.num_heads, "k": config.num_kv_heads, "H": config.num_heads, "": 1}
    new: dict[str, tuple[tuple[int, ...], Any]] = {}
    for name, (path, axes) in _LEAVES[kind].items():
        if path in flat:
            shape, at = list(flat[path].shape), 0 if name == LAST_NAME.get(kind) else -1
            whole = kind == "heads"  # heads of the original width; `width` counts them
            shape[at] = (shape[at] // config.num_kv_heads if whole else heads[axes]) * width
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
    """Returns where the rows and columns of a pruned block's kernels were in the original ones.

    Args:
      flat: parameters of the block by path; kernels of any kind.
      config: the architecture, with the original sizes.

    Returns:
      kernel's path -> (original input indices, original output indices). A kernel of the original
      shape with these entries, and zeros elsewhere, computes the same function.
    """
    heads = {"h": config.num_heads, "k": config.num_kv_heads}
    found = {}
    for kind, leaves in _LEAVES.items():
        for name, (path, axes) in leaves.items() if kind != "heads" else ():
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
    """Original columns of pruned heads: the first of each head, or those of kept rotary pairs."""
    own = np.tile(np.arange(size // heads), (heads, 1))
    if pairs is not None:
        kept = _columns(pairs, _all_pairs(config))
        own = np.repeat(kept, heads // len(kept), axis=0)
    return (own + config.head_size * np.arange(heads)[:, None]).reshape(-1)
