"""Checks of tensors that a file holds, whoever wrote it: names, shapes, dtypes, finite values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lordjax.models.config import ModelConfig
from lordjax.models.head_axes import ROPE_INDEX, narrowed
from lordjax.models.output_heads import CARRIED
from lordjax.models.transformer import parameter_shapes
from lordjax.names import layer, listed

Shape = tuple[int, ...]
_CHUNK = 2**16  # numbers that are looked at together: they fit into a core's cache


def mismatches(
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    where: Callable[[str], str] = str,
) -> list[str]:
    """Returns a line for every tensor that is missing, unknown or of the wrong shape.

    The first lines show every kind of problem.

    Args:
      expected: name -> shape of the tensors that the config asks for.
      found: name -> shape of the tensors that are there.
      where: function from a name to the words for it in a message.
    """
    lines = [f"missing: {name} {expected[name]}" for name in sorted(expected.keys() - found.keys())]
    lines += [
        f"unknown: {where(name)} {found[name]}" for name in sorted(found.keys() - expected.keys())
    ]
    lines += [
        f"wrong shape: {where(name)} is {found[name]}, not {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    return _mixed(lines)


def _mixed(lines: Iterable[str]) -> list[str]:
    """Orders the lines so that the first of them show every kind of problem."""
    seen: Counter[str] = Counter()
    ranked = []
    for line in lines:
        kind = line.partition(":")[0]
        ranked.append((seen[kind], line))
        seen[kind] += 1
    return [line for _, line in sorted(ranked, key=lambda pair: pair[0])]


def check_finite(array: np.ndarray, where: str) -> None:
    """Raises ValueError if a floating-point array holds a NaN or an infinite number.

    Args:
      array: any array; integers are finite.
      where: the words before "… non-finite value(s)" in the message.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating) or _all_finite(array):
        return
    with np.errstate(invalid="ignore"):
        broken = ~np.isfinite(array)
    first = tuple(int(i) for i in np.argwhere(broken)[0])
    raise ValueError(f"{where} {int(broken.sum())} non-finite value(s), the first at {first}")


def _all_finite(array: np.ndarray) -> bool:
    """Looks at numbers as integers, because what is not finite has the largest exponent."""
    bits = 8 * array.dtype.itemsize
    flat = np.ascontiguousarray(array).reshape(-1)
    signed, unsigned = flat.view(f"i{bits // 8}"), flat.view(f"u{bits // 8}")
    infinite = int(np.array(np.inf, array.dtype).view(unsigned.dtype))
    negative = infinite | 1 << (bits - 1)
    return all(
        signed[i : i + _CHUNK].max() < infinite and unsigned[i : i + _CHUNK].max() < negative
        for i in range(0, flat.size, _CHUNK)
    )


def check_parameters(config: ModelConfig, leaves: Mapping[str, Any]) -> None:
    """Checks that the parameters of a model, compressed or not, are those that its config needs.

    Compression may narrow the modules of a block, add biases to its linear layers, and add the
    indices of the rotary pairs that are left; it changes nothing else.

    Args:
      config: the architecture.
      leaves: parameter path -> an array or a kernel, or its shape and dtype.

    Raises:
      ValueError: if a parameter is missing or unknown, or has a wrong shape or dtype; names them.
    """
    numbers = {int(n[1]) for path in leaves if (n := re.match(r"layer_(\d+)/", path))}
    if numbers != set(range(config.num_layers)):
        raise ValueError(
            f"{len(numbers)} blocks are there (layer_{min(numbers, default=0)} to "
            f"layer_{max(numbers, default=0)}), but the config says {config.num_layers} layers"
        )
    rest, block = parameter_shapes(config)
    expected = {path: tuple(leaf.shape) for path, leaf in rest.items()}
    for i in range(config.num_layers):
        start = f"{layer(i)}/"
        own = {path: leaves[f"{start}{path}"] for path in _of_block(leaves, start)}
        expected |= {f"{start}{path}": shape for path, shape in _block(block, own, config).items()}
    found = {
        path: tuple(leaf.shape)
        for path, leaf in leaves.items()
        if path.split("/", 1)[0] not in CARRIED
    }
    lines = mismatches(expected, found) + [
        f"wrong dtype: {path} is {leaf.dtype}, not {'int32' if is_index else 'floating-point'}"
        for path, leaf in leaves.items()
        for is_index in [path.endswith(ROPE_INDEX)]
        if not (leaf.dtype == np.int32 if is_index else jnp.issubdtype(leaf.dtype, jnp.floating))
    ]
    if lines:
        raise ValueError(
            f"{len(lines):,} parameter(s) do not match the config ({config.num_layers} layers): "
            f"{listed(_mixed(lines), '; ')}"
        )


def _of_block(leaves: Mapping[str, Any], start: str) -> list[str]:
    return [path.removeprefix(start) for path in leaves if path.startswith(start)]


def _block(
    original: Mapping[str, Any], found: Mapping[str, Any], config: ModelConfig
) -> dict[str, Shape]:
    """Returns the shapes that a block's parameters must have, given its modules' widths.

    Args:
      original: path inside a block -> shape in the original model.
      found: path inside the block -> parameter.
      config: the architecture.
    """
    expected = {path: tuple(leaf.shape) for path, leaf in original.items()}
    modules = {"mlp": ("mlp/down/kernel", 0, 1), "vo": ("attention/o/kernel", 0, config.num_heads)}
    if not config.qk_norm:
        modules["qk"] = ("attention/q/kernel", 1, config.num_heads)
    for kind, (path, axis, heads) in modules.items():
        shape = tuple(found[path].shape) if path in found else ()
        size = shape[axis] if len(shape) == 2 else 0
        if 0 < size < expected[path][axis] and size % heads == 0:
            narrow = narrowed(kind, original, size // heads, config, bias=False)
            expected |= {path: tuple(shape) for path, (shape, _) in narrow.items()}
    if config.rope is not None and not config.qk_norm and ROPE_INDEX in found:
        width = expected["attention/q/kernel"][1] // config.num_heads
        expected[ROPE_INDEX] = (config.num_kv_heads, width // 2)
    for path in [path for path in expected if path.endswith("/kernel")]:
        if (bias := path.replace("/kernel", "/bias")) in found:
            expected[bias] = expected[path][1:]
    return expected
